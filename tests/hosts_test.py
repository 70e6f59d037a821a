"""Processes as hosts: the same run as one process, and what is said if not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from mcjepa_jax import errors, replay
from mcjepa_jax.distributed import cluster, hosts, rendezvous, sharding
from mcjepa_jax.runtime import signals
from mcjepa_jax.training import bad_steps
from tests import job, poison, workdirs
from tests.helpers.repository import ROOT

_STEPS = 3
_CONFIG = f"""
from configs import quickstart
from tests import tiny

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
  from mcjepa_jax.data import feed

  take = feed.Stream._take

  def dying(self):
    if self._next_batch == 8:
      raise feed.Passing("a worker of the content stream died")
    return take(self)

  feed.Stream._take = dying
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
  from mcjepa_jax.data import feed

  take = feed.Stream._take

  def late(self):
    if self._next_batch == 8:
      time.sleep(6)
    return take(self)

  feed.Stream._take = late
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


def _call_all(these, seconds=5.0):
  """What each place's roll call ends with."""
  results = {}

  def one(i, place):
    try:
      names, connections = rendezvous.roll_call(place, seconds)
      for connection in connections.values():
        connection.close()
      assert names == [socket.gethostname()] * place.count
      assert connections.keys() == (
          {0} if place.index else set(range(1, place.count))
      )
      results[i] = "all here"
    except (errors.Stop, errors.UserError) as error:
      results[i] = str(error)

  threads = [
      threading.Thread(target=one, args=item) for item in enumerate(these)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return [results[i] for i in range(len(these))]


def test_the_roll_ends_when_all_are_here():
  address = f"127.0.0.1:{job.free_port()}"
  these = [cluster.Process(address, 3, i) for i in (2, 0, 1)]
  assert _call_all(these) == ["all here"] * 3


def test_the_absent_are_named_to_all_that_came():
  address = f"127.0.0.1:{job.free_port()}"
  names = ("tpu-a", "tpu-b", "tpu-c")
  these = [cluster.Process(address, 3, i, names) for i in (0, 2)]
  for fault in _call_all(these, 0.5):
    assert fault.endswith("these did not come: process 1 (tpu-b)")


def test_two_with_one_place_and_another_count_are_told():
  address = f"127.0.0.1:{job.free_port()}"
  these = [cluster.Process(address, 3, i) for i in (0, 1, 1)]
  assert all("both say they are process 1" in f for f in _call_all(these))
  address = f"127.0.0.1:{job.free_port()}"
  these = [cluster.Process(address, 3, 0), cluster.Process(address, 2, 1)]
  assert all("process 0 expects 3" in f for f in _call_all(these))


def test_one_that_left_and_was_started_again_is_no_second_one():
  port = job.free_port()
  left = []

  def leave():
    deadline = time.monotonic() + 20
    while not left and time.monotonic() < deadline:
      try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
          connection.sendall(b"mcjepa 3 1 here\n")
          time.sleep(0.3)
        left.append(True)
      except OSError:
        time.sleep(0.02)

  these = [cluster.Process(f"127.0.0.1:{port}", 3, i) for i in range(3)]
  found = []
  caller = threading.Thread(
      target=lambda: found.extend(_call_all(these[:1], 20.0))
  )
  caller.start()
  leave()
  others = _call_all(these[1:], 20.0)
  caller.join()
  assert found + others == ["all here"] * 3


def test_sigterm_is_heard_while_hosts_are_awaited():
  place = cluster.Process(f"127.0.0.1:{job.free_port()}", 2, 0)
  pid = os.getpid()
  timer = threading.Timer(0.5, lambda: os.kill(pid, signal.SIGTERM))
  # As of the first process of a container.
  before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
  try:
    timer.start()
    with pytest.raises(errors.Stop) as stop:
      rendezvous.start(place, seconds=20.0)
    timer.join()
  finally:
    signal.signal(signal.SIGTERM, before)
  assert stop.value.code == errors.EXIT_PREEMPTED


def test_without_process_0_the_others_say_so():
  place = cluster.Process(f"127.0.0.1:{job.free_port()}", 2, 1)
  (fault,) = _call_all([place], 0.5)
  assert fault.startswith("process 0 at 127.0.0.1:")
  assert "did not call the roll: Connection refused" in fault


def test_a_stranger_on_the_port_is_not_counted():
  port = job.free_port()
  threads = []

  def stranger():
    for line in (b"GET / HTTP/1.1\r\n", b"\xff\xfe\n", b"mcjepa 2 x y\n"):
      for _ in range(100):
        try:
          with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(line)
          break
        except OSError:
          time.sleep(0.02)

  threads.append(threading.Thread(target=stranger))
  threads[0].start()
  address = f"127.0.0.1:{port}"
  (fault,) = _call_all([cluster.Process(address, 2, 0)], 2.0)
  threads[0].join()
  assert "these did not come: process 1" in fault


def test_another_service_on_the_coordinators_port_is_no_roll_call():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]

    def serve():
      for _ in range(2):
        connection, _ = server.accept()
        with connection:
          connection.sendall(b"\x00\x00\x18\x04\xff\xff\n")  # HTTP/2

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    place = cluster.Process(f"127.0.0.1:{port}", 2, 1)
    (fault,) = _call_all([place], 0.3)
  assert "did not call the roll: another service answers there" in fault


def test_where_each_may_end_alone_sigterm_is_heard_in_spite_of_jax(monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  heard = []
  before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
  try:
    with signals.on_sigterm(lambda *_: heard.append("together")):
      os.kill(os.getpid(), signal.SIGTERM)
      with signals.on_sigterm(lambda *_: heard.append("alone"), alone=True):
        os.kill(os.getpid(), signal.SIGTERM)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert heard == ["alone"]


def test_after_it_sigterm_ends_the_process_where_jax_had_heard_it(monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  set_to = []
  # As where the handler before is not of Python.
  monkeypatch.setattr(signal, "signal", lambda _, to: set_to.append(to))
  with signals.on_sigterm(print, alone=True):
    pass
  assert set_to == [print, signal.SIG_DFL]


def test_flags_go_before_variables_and_both_before_none(monkeypatch):
  monkeypatch.setenv("MCJEPA_COORDINATOR", "10.0.0.1:1234")
  monkeypatch.setenv("MCJEPA_PROCESSES", "4")
  monkeypatch.setenv("MCJEPA_PROCESS", "3")
  place = cluster.find({"process": ["2"]})
  assert place == cluster.Process("10.0.0.1:1234", 4, 2)
  monkeypatch.setenv("MCJEPA_PROCESSES", "1")
  assert cluster.find({"process": ["0"]}) is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (dict(coordinator=["a:1"]), ["--processes or", "--process or"]),
        (
            dict(coordinator=["a"], processes=["2"], process=["0"]),
            ["--coordinator or MCJEPA_COORDINATOR: expected HOST:PORT"],
        ),
        (
            dict(coordinator=["a:1"], processes=["2"], process=["2"]),
            ["--process: expected 0 to 1, got 2"],
        ),
        (
            dict(coordinator=["a:1"], processes=["x"], process=["-1"]),
            ["--processes or", "--process or"],
        ),
    ],
)
def test_a_place_that_is_none_is_told(flags, expected):
  with pytest.raises(errors.UserError) as caught:
    cluster.find(flags)
  messages = caught.value.messages
  assert len(messages) == len(expected)
  assert all(m.startswith(e) for m, e in zip(messages, expected, strict=True))


def test_slurm_gives_the_place(monkeypatch):
  for name, value in (
      ("JOB_ID", "17"), ("STEP_NODELIST", "node[004-007,9]"), ("NTASKS", "4"),
      ("PROCID", "3"), ("LOCALID", "0"),
  ):  # fmt: skip
    monkeypatch.setenv(f"SLURM_{name}", value)
  place = cluster.find({})
  assert place.address.startswith("node004:")
  assert (place.count, place.index, place.cluster) == (4, 3, "slurm")
  assert place.names == ()
  monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2),2,1")
  monkeypatch.setenv("SLURM_NTASKS", "5")
  place = cluster.find({})
  assert place.names == ("node004", "node005", "node006", "node006", "node007")
  assert place.name(3) == "process 3 (node006)"
  monkeypatch.setenv("SLURM_STEP_NODELIST", "login,gpu[9-10,12]")
  monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2,1(x3)")
  assert cluster.find({}).names == ("login", "login", "gpu9", "gpu10", "gpu12")
  monkeypatch.setenv("SLURM_DISTRIBUTION", "cyclic")
  assert cluster.find({}).names == ()
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert cluster.find({}) is None


def test_a_slice_of_gke_gives_the_place_and_the_names(monkeypatch):
  kind = cluster.clusters.GkeTpuCluster
  module = cluster.clusters.cloud_tpu_cluster
  monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(kind, "wait_for_coordinator", lambda *_: None)
  monkeypatch.setattr(module, "get_tpu_env_value", os.environ.get)
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "pod-0.svc,pod-1.svc")
  monkeypatch.setenv("TPU_WORKER_ID", "1")
  place = cluster.find({})
  assert place.address.startswith("pod-0.svc:")
  assert (place.count, place.index) == (2, 1)
  assert place.name(1) == "process 1 (pod-1.svc)"
  # Two slices: places go on, names are of this slice only.
  monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
  monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
  monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "pod-0.first")
  place = cluster.find({})
  assert place.address.startswith("pod-0.first:")
  assert (place.count, place.index) == (4, 3)
  assert place.name(2) == "process 2 (slice 1, worker 0)"


def test_a_first_host_whose_name_is_never_known_is_told(monkeypatch):
  monkeypatch.setattr(
      cluster.clusters.cloud_tpu_cluster, "running_in_cloud_tpu_vm", True
  )
  for name, value in (
      ("TPU_WORKER_HOSTNAMES", "a.invalid,b.invalid"), ("TPU_WORKER_ID", "1"),
      ("MEGASCALE_COORDINATOR_ADDRESS", "a.invalid"),
      ("MEGASCALE_NUM_SLICES", "1"), ("MEGASCALE_SLICE_ID", "0"),
  ):  # fmt: skip
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(time, "sleep", lambda seconds: None)
  with pytest.raises(
      errors.Stop, match="process 0 did not come: .*a.inval"
  ) as e:
    cluster.find({}, seconds=0.1)
  assert e.value.code == 77


def test_a_slice_of_compute_engine_gives_the_place_and_the_names(monkeypatch):
  module = cluster.clusters.cloud_tpu_cluster
  metadata = {
      "agent-worker-number": "1",
      # As queued resources have it; older ones name:id:address.
      "worker-network-endpoints": "a:0:10.0.0.2,b:1:10.0.0.3",
      "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nZONE: 'us-east5-b'",
  }
  monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(
      module,
      "get_metadata",
      lambda key: (metadata[key], 200) if key in metadata else ("", 404),
  )
  kind = cluster.clusters.GceTpuCluster
  monkeypatch.setattr(kind, "wait_for_coordinator", lambda *_: None)
  for name in os.environ:
    if name.startswith(("TPU_", "MEGASCALE_")):
      monkeypatch.delenv(name)
  place = cluster.find({})
  assert place.address.startswith("10.0.0.2:")
  assert (place.count, place.index, place.cluster) == (2, 1, "gcetpu")
  assert place.name(0) == "process 0 (10.0.0.2)"
  # The second of two slices.
  metadata["worker-network-endpoints"] = "c,d"
  metadata["tpu-env"] += (
      "\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"
      "\nMEGASCALE_COORDINATOR_ADDRESS: 'a:8080'"
  )
  place = cluster.find({})
  assert place.address.startswith("a:") and not place.address.endswith("8080")
  assert (place.count, place.index) == (4, 3)
  assert place.name(1) == "process 1 (slice 0, worker 1)"
  # One host is no run of several.
  metadata["worker-network-endpoints"] = "c"
  metadata["tpu-env"] = ""
  assert cluster.find({}) is None
  # A machine without a TPU.
  del metadata["agent-worker-number"]
  assert cluster.find({}) is None


class _Store:
  """JAX's key-value store, of two hosts, of which this is the first."""

  def __init__(self, theirs):
    self._values = {}
    self._theirs = theirs  # what the other says, by the exchange's name

  def key_value_set(self, key, value):
    self._values[key] = value

  def blocking_key_value_get(self, key, milliseconds):
    _, name, index = key.split("/")
    if index == "0":
      return self._values[key]
    if name not in self._theirs:
      time.sleep(milliseconds / 1000)
      raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
    return json.dumps(self._theirs[name])


@pytest.fixture
def two(monkeypatch):
  """Of two hosts the first; sets what the other says."""

  def set_up(**theirs):
    client = _Store(theirs)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(hosts.distributed.global_state, "client", client)
    held = types.SimpleNamespace(names=["process 0 (a)", "process 1 (b)"])
    monkeypatch.setattr(hosts.heartbeat, "_heartbeat", held)

  return set_up


def test_a_host_that_does_not_come_to_an_exchange_is_named(two):
  two(here=[1, 2])
  assert hosts.exchange("here", "x", seconds=5.0) == ["x", [1, 2]]
  began = time.monotonic()
  with pytest.raises(errors.Stop) as caught:
    hosts.exchange("start", 1, seconds=0.3)
  assert caught.value.code == 77
  assert 0.2 < time.monotonic() - began < 2
  assert str(caught.value) == (
      "start: waited 0 s for all hosts; these did not come: process 1 (b)"
  )


def test_hosts_of_another_code_or_other_data_are_shown(two):
  def start(**changes):
    facts = {"data.ids": "ab"} | {
        f"code.{k}": v for k, v in hosts.code().items()
    }
    return {"name": "process 1 (b)", "faults": [], "facts": facts | changes}

  two(start=start())
  hosts.agree({"data": {"ids": "ab"}}, [])
  changed = {"code.mcjepa_jax": "0123456789ab", "code.jax": "0.1"}
  two(start=start(**changed, **{"data.ids": "cd"}))
  with pytest.raises(errors.UserError) as caught:
    hosts.agree({"data": {"ids": "ab"}}, [])
  ours = hosts.code()
  assert list(caught.value.messages) == [
      f"{key}: process 0 (a) has {own!r}, process 1 (b) {theirs!r}"
      for key, own, theirs in (
          ("code.jax", ours["jax"], "0.1"),
          ("code.mcjepa_jax", ours["mcjepa_jax"], "0123456789ab"),
          ("data.ids", "ab", "cd"),
      )
  ]


def test_what_hosts_share_and_see_otherwise_ends_them_to_be_started_again(two):
  two(newest=100)
  hosts.check_alike("newest", 100)
  with pytest.raises(errors.Stop) as caught:
    hosts.check_alike("newest", 200)
  assert caught.value.code == 77
  assert str(caught.value) == (
      "newest: expected one for all hosts, got process 0 (a) 200, process 1 (b)"
      " 100"
  )


def test_a_fault_of_ones_disk_is_passing_where_others_wait(two):
  def refused():
    with hosts.as_one():
      raise errors.UserError("a checkpoint cannot be written")

  with pytest.raises(errors.UserError) as alone:
    refused()
  two()
  with pytest.raises(errors.Passing, match="a checkpoint cannot be written"):
    refused()
  assert not isinstance(alone.value, errors.Passing)


def test_a_mesh_of_many_hosts_keeps_each_hosts_devices_together():
  # As of a 4x4 torus with 2x2 hosts, where the numbers go along the rows.
  devices = [
      types.SimpleNamespace(id=i, process_index=i // 8 * 2 + i % 4 // 2)
      for i in range(16)
  ]
  order = sorted(devices, key=sharding.device_order)
  assert [d.process_index for d in order] == [i // 4 for i in range(16)]


def test_one_process_agrees_with_itself_or_tells_its_faults():
  hosts.agree({"config": {"a": 1}}, [])
  with pytest.raises(errors.UserError, match="no such"):
    hosts.agree({}, ["no such"])


def test_a_late_step_prints_the_stacks():
  script = (
      "import time\nfrom mcjepa_jax.runtime import signals\n"
      "def hang():\n  time.sleep(1.5)\n"
      "timer = signals.HangTimer(0.5)\ntimer.step()\nhang()\ntimer.close()\n"
      "timer = signals.HangTimer(0)\ntimer.step()\ntime.sleep(0.1)\n"
  )
  run = subprocess.run(
      [sys.executable, "-c", script],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=True,
  )
  assert "in hang" in run.stderr and "Timeout" in run.stderr


def test_code_is_told_apart_by_its_files(monkeypatch, tmp_path):
  file = str(tmp_path / "distributed" / "hosts.py")
  monkeypatch.setattr(hosts, "__file__", file)
  (tmp_path / "errors.py").write_text("a = 1\n")
  before = hosts.code()
  assert before == hosts.code()
  (tmp_path / "errors.py").write_text("a = 2\n")
  after = hosts.code()
  assert before.pop("mcjepa_jax") != after.pop("mcjepa_jax")
  assert before == after and "jax" in after
