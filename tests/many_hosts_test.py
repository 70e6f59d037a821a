"""Processes as hosts: the same run as one process, and what is said if not."""

import json
import re
import signal
import socket
import time

import numpy as np
import pytest

from mcjepa_jax import replay
from mcjepa_jax.training import bad_steps
from tests.helpers import job, poison, workdirs

_STEPS = 3
_CONFIG = f"""
from configs import quickstart
from tests.helpers import tiny

def get_config():
  config = tiny.config(quickstart, num_steps={_STEPS}, save_every=100, workers=0,
                       log_every=1, log_records=True, hang_seconds=600.0,
                       model__encoder__drop_path=0.5, motion__jitter__p=0.5)
  return config.lock()
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
  return job.written(tmp_path_factory, "tiny", _CONFIG)


# A worker that dies, and a clock that is wrong, each on one host.
_FAULTY = f"""{_CONFIG}
import os
import time

if "TEST_FAULT" in os.environ:
  from mcjepa_jax import errors
  from mcjepa_jax.data.pipeline import stream

  take = stream.Stream._take

  def dying(self):
    if self._next_batch == 8:
      raise errors.TransientError("a worker of the content stream died")
    return take(self)

  stream.Stream._take = dying
if "TEST_REFUSE" in os.environ:
  import errno

  import orbax.checkpoint as ocp

  name = os.environ["TEST_REFUSE"]
  written, begun = ocp.JsonCheckpointHandler._save_fn, ocp.CheckpointManager.save

  async def write(self, x, directory):
    if "checkpoints/20." in str(directory) and name == "write":
      raise OSError(errno.EACCES, "Permission denied", str(directory))
    await written(self, x, directory)

  def begin(self, step, *args, **kwargs):
    if step == 20 and name == "begin":
      raise OSError(errno.ESTALE, "Stale file handle")
    return begun(self, step, *args, **kwargs)

  ocp.JsonCheckpointHandler._save_fn, ocp.CheckpointManager.save = write, begin
if "TEST_SLEEP" in os.environ:
  from mcjepa_jax.data.pipeline import stream

  take = stream.Stream._take

  def late(self):
    if self._next_batch == 8:
      time.sleep(6)
    return take(self)

  stream.Stream._take = late
if "TEST_CLOCK" in os.environ:
  true = time.time
  time.time = lambda: true() + float(os.environ["TEST_CLOCK"])
"""


@pytest.fixture(scope="module")
def faulty_path(tmp_path_factory):
  return job.written(tmp_path_factory, "faulty", _FAULTY)


def _same_as_one(config_path, tmp_path, count, *overrides, readers=1):
  one, many = tmp_path / "one", tmp_path / "many"
  job.run(config_path, one, *overrides)
  results = job.run(config_path, many, *overrides, count=count)
  assert job.records(many, count, readers) == job.records(one, 1)
  losses = [
      [line["loss"] for line in workdirs.lines(w / "metrics.jsonl")]
      for w in (one, many)
  ]
  assert len(losses[0]) == _STEPS
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  for folder in (one, many):
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["3"]
  # One host writes: the others keep what is their own.
  assert (many / "results.json").exists()
  assert (many / "tensorboard").is_dir()
  for i in range(1, count):
    own = {p.name for p in (many / "hosts" / str(i)).iterdir()}
    assert not own & {"results.json", "tensorboard", "pictures"}
    assert "Pictures and curves" not in results[i][1]
  assert "Pictures and curves" in results[0][1]
  return many


@pytest.mark.slow
def test_two_processes_are_one_run_and_resume(config_path, tmp_path):
  many = _same_as_one(config_path, tmp_path, 2)
  # What two wrote, one goes on from; here to evaluate it.
  (many / "results.json").unlink()
  again = job.run(config_path, many, "--config.num_steps=3")
  assert "Resumed at step 3 of 3" in again[0][1]
  assert json.loads((many / "results.json").read_text())["meta/step"] == 3


@pytest.mark.proof
@pytest.mark.slow
def test_four_processes_are_one_run(config_path, tmp_path):
  _same_as_one(
      config_path, tmp_path, 4, "--config.mesh.shard_min_mib=0.0005",
      "--config.panel_every=2",
  )  # fmt: skip


def _two_in_training(config_path, workdir, *overrides, lines=5, **env):
  """Two processes of a run that has logged so many lines."""
  port = job.free_port()
  processes = [
      job.start(config_path, workdir, "--config.mode=content", *overrides,
             index=i, count=2, port=port, **env)
      for i in range(2)
  ]  # fmt: skip
  log, deadline = workdir / "metrics.jsonl", time.monotonic() + 400
  while lines and not (log.exists() and log.read_text().count("\n") >= lines):
    assert time.monotonic() < deadline
    if any(p.poll() is not None for p in processes):
      raise AssertionError(job.wait(processes))
    time.sleep(0.05)
  return processes


@pytest.mark.proof
@pytest.mark.slow
def test_four_processes_share_two_pairs_by_their_frames(config_path, tmp_path):
  many = _same_as_one(
      config_path, tmp_path, 4, "--config.mode=motion",
      "--config.motion.batch_size=2", readers=2,
  )  # fmt: skip
  halves = [job.records(many / "hosts" / str(i), 1) for i in (2, 3)]
  assert halves[0] == halves[1]
  assert (many / "pictures" / "flow.png").exists()


def _preempted(processes):
  """The step at which both have saved, and ended with 75."""
  results = job.wait(processes)
  assert [code for code, _, _ in results] == [75, 75], results
  steps = [
      int(err.rsplit("saved at step ", 1)[1].split()[0])
      for _, _, err in results
  ]
  assert steps[0] == steps[1]
  return steps[0]


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("shard_min_mib, host", [(4.0, 0), (0.0005, 1)])
def test_sigterm_to_one_process_saves_and_ends_all_and_they_go_on(
    config_path, tmp_path, shard_min_mib, host
):
  options = (
      "--config.num_steps=400",
      f"--config.mesh.shard_min_mib={shard_min_mib}",
  )
  ended, whole = tmp_path / "ended", tmp_path / "whole"
  processes = _two_in_training(config_path, ended, *options)
  processes[host].send_signal(signal.SIGTERM)
  step = _preempted(processes)
  assert (ended / "checkpoints" / str(step)).is_dir()

  options = "--config.mode=content", *options
  job.run(config_path, ended, *options, count=2)
  job.run(config_path, whole, *options, count=2)
  (state, streams), other = (workdirs.saved(w, 400) for w in (ended, whole))
  assert not workdirs.differences(state, other[0])
  assert streams == other[1]
  assert job.records(ended, 2) == job.records(whole, 2)


@pytest.mark.proof
@pytest.mark.slow
def test_sigterm_to_a_resumed_run_is_heard_before_its_first_step_and_after_saves(
    config_path, tmp_path
):
  endless = ("--config.num_steps=100000", "--config.save_every=20")

  def pair():
    return _two_in_training(
        config_path, tmp_path, *endless, lines=0, PYTHONUNBUFFERED="1"
    )

  def logged(count):
    deadline = time.monotonic() + 400
    while len(workdirs.lines(tmp_path / "metrics.jsonl")) < count:
      assert time.monotonic() < deadline
      time.sleep(0.1)

  processes = pair()
  logged(300)  # more than a resumed run asks by the time of its first saves
  processes[1].send_signal(signal.SIGTERM)
  step = _preempted(processes)
  processes = pair()
  for line in processes[0].stdout:
    if line.startswith("Resumed at step"):
      break
  processes[1].send_signal(signal.SIGTERM)  # it compiles
  saved = _preempted(processes)
  assert step < saved <= step + 3
  processes = pair()
  logged(saved + 50)
  processes[0].send_signal(signal.SIGTERM)
  sent = len(workdirs.lines(tmp_path / "metrics.jsonl"))
  assert _preempted(processes) <= sent + 30


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_is_named_by_the_other_and_the_run_goes_on(
    config_path, tmp_path, lost
):
  options, workdir = (
      ("--config.num_steps=100", "--config.save_every=2"),
      tmp_path / "lost",
  )
  processes = _two_in_training(config_path, workdir, *options)
  processes[lost].kill()
  began = time.monotonic()
  results = job.wait(processes)
  assert time.monotonic() - began < 15
  code, _, err = results[1 - lost]
  text = f"process {lost} ({socket.gethostname()}) is lost: its connection was"
  assert code == 77 and text in err, (code, err[-3000:])
  options = "--config.mode=content", *options
  again = job.run(config_path, workdir, *options, count=2)
  assert "Resumed at step " in again[0][1]
  whole = tmp_path / "whole"
  job.run(config_path, whole, *options, count=2)
  (state, streams), other = (workdirs.saved(w, 100) for w in (workdir, whole))
  assert not workdirs.differences(state, other[0]) and streams == other[1]
  assert job.records(workdir, 2) == job.records(whole, 2)


@pytest.mark.proof
@pytest.mark.slow
def test_a_silent_host_is_lost(config_path, tmp_path):
  processes = _two_in_training(
      config_path, tmp_path, "--config.num_steps=100000",
      MCJEPA_LOST_SECONDS="6",
  )  # fmt: skip
  processes[1].send_signal(signal.SIGSTOP)
  began = time.monotonic()
  code = processes[0].wait(60)
  seconds = time.monotonic() - began
  processes[1].kill()
  (_, _, err), _ = job.wait(processes)
  assert code == 77 and 5 < seconds < 20, (code, seconds)
  assert "is lost: nothing came from it for 6 s; started again" in err


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_fault_of_one_host_in_training_ends_both_with_it(
    faulty_path, tmp_path, which
):
  port = job.free_port()
  processes = [
      job.start(faulty_path, tmp_path, "--config.mode=content",
             "--config.num_steps=100", index=i, count=2, port=port,
             **({"TEST_FAULT": "1"} if i == which else {"TEST_CLOCK": "3600"}))
      for i in range(2)
  ]  # fmt: skip
  ended = {}
  deadline = time.monotonic() + 400
  while len(ended) < 2 and time.monotonic() < deadline:
    for i, process in enumerate(processes):
      if process.poll() is not None:
        ended.setdefault(i, time.monotonic())
    time.sleep(0.05)
  results = job.wait(processes)
  assert [code for code, _, _ in results] == [77, 77], results
  assert abs(ended[0] - ended[1]) < 15
  own, other = results[which][2], results[1 - which][2]
  assert "\nerror: a worker of the content stream died" in own
  host = socket.gethostname()
  assert (
      f"process {which} ({host}): error: a worker of the content stream died;"
      " started again, the run goes on" in other
  )
  # The other one's clock is an hour ahead: told from the start on.
  relation = "ahead of" if which == 0 else "behind"
  (line,) = (
      line
      for line in results[0][2].splitlines()
      if line.startswith("warning: clock")
  )
  assert re.search(
      rf"process 1 \({host}\) is 3[56]\d\d s {relation} process 0 \({host}\):",
      line,
  )


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("host, fault", [(0, "write"), (1, "begin")])
def test_a_checkpoint_that_one_host_cannot_write_ends_all_and_they_go_on(
    faulty_path, tmp_path, host, fault
):
  options = (
      "--config.mode=content", "--config.num_steps=200",
      "--config.save_every=10", "--config.hang_seconds=60.0",
  )  # fmt: skip
  port = job.free_port()
  processes = [
      job.start(faulty_path, tmp_path, *options, index=i, count=2, port=port,
             **({"TEST_REFUSE": fault} if i == host else {}))
      for i in range(2)
  ]  # fmt: skip
  results = job.wait(processes)
  reason = {"write": "Permission denied", "begin": "Stale file handle"}[fault]
  for code, _, err in results:
    assert code == 77 and f"cannot be written: {reason}; step 10 stays" in err
    assert "Timeout" not in err  # of a step that came late
  steps = [x["step"] for x in workdirs.lines(tmp_path / "metrics.jsonl")]
  assert 19 <= max(steps) < 30  # before the next save
  again = job.run(faulty_path, tmp_path, *options, count=2)
  assert "Resumed at step 10 " in again[0][1]


@pytest.mark.proof
@pytest.mark.slow
def test_a_late_step_prints_the_stacks_of_every_host_and_goes_on(
    faulty_path, tmp_path
):
  port = job.free_port()
  processes = [
      job.start(faulty_path, tmp_path, "--config.mode=content",
             "--config.num_steps=20", "--config.hang_seconds=3.0",
             index=i, count=2, port=port, **({"TEST_SLEEP": "1"} if i else {}))
      for i in range(2)
  ]  # fmt: skip
  for code, _, err in job.wait(processes):
    assert code == 0, err[-3000:]
    stacks = err[err.index("Timeout (0:00:03)!") :]
    assert "Thread 0x" in stacks and "train.py" in stacks


@pytest.mark.proof
@pytest.mark.slow
def test_two_hosts_skip_dump_and_roll_back_as_one(
    tmp_path, monkeypatch, capsys
):
  path, option = poison.run(tmp_path, images=24)
  one, many = tmp_path / "one", tmp_path / "many"
  job.run(path, one, option)
  job.run(path, many, option, count=2)
  # Past the poisoned batch, with all that comes after it.
  assert job.records(many, 2) == job.records(one, 1)
  alarms = [workdirs.lines(w / "alarms.jsonl") for w in (one, many)]
  for lines in alarms:
    assert {line["alarm"] for line in lines} == {"not_finite", "rollback"}
  assert [[line["step"] for line in lines] for lines in alarms][1:] == [
      [line["step"] for line in alarms[0]]
  ]
  counts = [
      {k: v for k, v in results.items() if k.startswith("alarm/")}
      for results in (
          json.loads((w / "results.json").read_text()) for w in (one, many)
      )
  ]
  assert counts[0] == counts[1] and counts[0]["alarm/rollback"] >= 1
  # One dump of both, which one process runs again.
  folders = [sorted((w / "dumps").iterdir()) for w in (one, many)]
  assert [f.name for f in folders[0]] == [f.name for f in folders[1]]
  whole, parted = folders[0][0], folders[1][0]
  np.testing.assert_array_equal(
      bad_steps.read_arrays(parted, "content", 2)["views"],
      np.load(whole / "views.0.npy"),
  )
  metas = [bad_steps.read_meta(folder)[0] for folder in (whole, parted)]
  assert metas[0]["records"] == metas[1]["records"]
  assert poison.RECORD in metas[1]["records"]["content"]
  assert (metas[0]["hosts"], metas[1]["hosts"]) == (1, 2)
  poison.stretch(monkeypatch)
  capsys.readouterr()
  assert replay.main([f"--dump={parted}"]) == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert "loss" in report["terms"] and "nan" in report["operation"]


@pytest.mark.proof
@pytest.mark.slow
def test_a_host_with_another_config_is_shown(config_path, tmp_path):
  port = job.free_port()
  processes = [
      job.start(config_path, tmp_path, *overrides, index=i, count=2, port=port)
      for i, overrides in enumerate(
          [[], ["--config.seed=7", "--config.workers=1"]]
      )
  ]
  for code, _, err in job.wait(processes):
    assert code == 2, err[-3000:]
    assert "config.seed: process 0 (" in err and "has 0, process 1 (" in err
    assert "data.content.seed" in err
    assert "workers" not in err  # which may differ


@pytest.mark.proof
@pytest.mark.slow
def test_a_fault_of_one_host_ends_all(config_path, tmp_path):
  port = job.free_port()
  processes = [
      job.start(config_path, tmp_path, f"--config.motion.weight={weight}",
             index=i, count=2, port=port)
      for i, weight in enumerate((1.0, -1.0))
  ]  # fmt: skip
  for code, _, err in job.wait(processes):
    assert code == 2, err[-3000:]
    assert "error: process 1 (" in err and "motion.weight: expected 0" in err


@pytest.mark.proof
@pytest.mark.slow
def test_workdirs_that_are_not_one_are_told(config_path, tmp_path):
  port = job.free_port()
  processes = [
      job.start(config_path, tmp_path / str(i), index=i, count=2, port=port)
      for i in range(2)
  ]
  for code, _, err in job.wait(processes):
    assert code == 2, err[-3000:]
    assert "workdir: expected one folder that all hosts share" in err
    assert "on process 1 (" in err


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named(config_path, tmp_path):
  port = job.free_port()
  processes = [
      job.start(config_path, tmp_path, index=i, count=4, port=port,
             MCJEPA_START_SECONDS="15")
      for i in (0, 2)
  ]  # fmt: skip
  for code, _, err in job.wait(processes):
    assert code == 77, err[-3000:]
    assert "for 4 processes; these did not come: process 1, process 3" in err
