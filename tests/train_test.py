"""The command as a user has it: trains, is killed, resumes bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mcjepa_jax import errors, train
from mcjepa_jax.storage import run_folder
from mcjepa_jax.training import preconditions
from tests.helpers import tiny, workdirs
from tests.helpers.repository import ROOT

_STEPS = 9
_CONFIG = f"""
from configs import quickstart
from tests.helpers import tiny

def get_config():
  config = tiny.config(quickstart, num_steps={_STEPS}, workers=1, save_every=4,
                       keep_last=9, log_every=1, log_records=True,
                       model__encoder__drop_path=0.5, motion__jitter__p=0.5)
  return config.lock()
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "configs"
  folder.mkdir()
  path = folder / "tiny_run.py"
  path.write_text(_CONFIG)
  return path


def _command(config_path, workdir, *overrides):
  return [
      sys.executable, "-m", "mcjepa_jax.main", f"--config={config_path}",
      f"--workdir={workdir}", *overrides,
  ]  # fmt: skip


def _environment():
  return os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "",
      "PYTHONPATH": str(ROOT),
  }


def _run(config_path, workdir, *overrides):
  run = subprocess.run(
      _command(config_path, workdir, *overrides),
      env=_environment(),
      cwd=ROOT,
      capture_output=True,
      text=True,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  return run


def _killed(config_path, workdir, *, after):
  """Ends a run by SIGKILL once the records of step `after` are written."""
  process = subprocess.Popen(
      _command(config_path, workdir),
      env=_environment(),
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    steps = [line["step"] for line in _lines_so_far(workdir / "records.jsonl")]
    saved = (workdir / "checkpoints" / "4").is_dir()
    if saved and steps and steps[-1] >= after:
      break
    assert process.poll() is None, "the run ended before it could be killed"
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()


def _lines_so_far(path):
  text = path.read_text() if path.exists() else ""
  return [json.loads(x) for x in text.split("\n")[:-1]]


@pytest.fixture(scope="module")
def whole(config_path, tmp_path_factory):
  """The workdir of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole")
  _run(config_path, workdir)
  return workdir


@pytest.fixture(scope="module")
def resumed(config_path, tmp_path_factory):
  """The workdir of a run killed between two saves and started again."""
  workdir = tmp_path_factory.mktemp("resumed")
  _killed(config_path, workdir, after=5)
  run = _run(config_path, workdir)
  assert "Resumed at step 4 of 9" in run.stdout
  return workdir


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_the_uninterrupted_bit_for_bit(
    whole, resumed
):
  _assert_equal(whole, resumed)


def _assert_equal(whole, resumed):
  """Asserts that two runs ended in the same state, bit for bit."""
  state, streams = workdirs.saved(whole, _STEPS)
  other_state, other_streams = workdirs.saved(resumed, _STEPS)
  assert not workdirs.differences(state, other_state)
  assert streams == other_streams
  assert set(workdirs.flat(state)) >= {"step", "key"}


@pytest.mark.slow
def test_a_resumed_run_reads_the_same_records_at_every_step(whole, resumed):
  records = workdirs.lines(whole / "records.jsonl")
  assert [line["step"] for line in records] == list(range(_STEPS))
  assert records == workdirs.lines(resumed / "records.jsonl")


@pytest.mark.slow
def test_the_logs_of_a_resumed_run_are_those_of_the_uninterrupted(
    whole, resumed
):
  losses = [
      [
          (line["step"], line["loss"])
          for line in workdirs.lines(w / "metrics.jsonl")
      ]
      for w in (whole, resumed)
  ]
  assert losses[0] == losses[1]
  assert [step for step, _ in losses[0]] == list(range(_STEPS))


@pytest.mark.proof
@pytest.mark.slow
def test_evals_between_steps_change_nothing_that_is_read_or_learned(
    config_path, whole, tmp_path
):
  workdir = tmp_path / "evaluated"
  _run(
      config_path, workdir, "--config.eval_every=3", "--config.eval_limit=6",
      "--config.evals=('flow/synthetic', 'knn/synthetic', 'linear/synthetic')",
      "--config.linear.epochs=2",
  )  # fmt: skip
  assert workdirs.lines(workdir / "records.jsonl") == workdirs.lines(
      whole / "records.jsonl"
  )
  assert not workdirs.differences(
      workdirs.saved(whole, _STEPS)[0], workdirs.saved(workdir, _STEPS)[0]
  )
  lines = workdirs.lines(workdir / "metrics.jsonl")
  evaluated = [line for line in lines if "knn/synthetic/top1" in line]
  assert [line["step"] for line in evaluated] == [3, 6]
  for line in evaluated:
    assert line["knn/synthetic/count"] == line["flow/synthetic/count"] == 6
    assert "linear/synthetic/top1" not in line
  results = json.loads((workdir / "results.json").read_text())
  assert results["knn/synthetic/count"] == 1000
  assert "linear/synthetic/top1" in results


@pytest.mark.proof
@pytest.mark.slow
def test_without_the_iterators_a_resumed_run_differs(
    config_path, whole, tmp_path
):
  workdir = workdirs.cut(whole, 4, tmp_path / "control")
  # All is restored but the position in the streams.
  streams = workdir / "checkpoints" / "4" / "streams" / "metadata"
  content = json.loads(streams.read_text())
  for task in content:
    assert content[task]["next_batch"] == 4
    content[task]["next_batch"] = 0
  streams.write_text(json.dumps(content))
  _run(config_path, workdir)
  assert workdirs.differences(
      workdirs.saved(whole, _STEPS)[0], workdirs.saved(workdir, _STEPS)[0]
  )


@pytest.mark.slow
def test_a_finished_run_says_so_and_trains_nothing(config_path, whole):
  before = (whole / "metrics.jsonl").read_text()
  run = _run(config_path, whole)
  assert "Finished at step 9" in run.stdout
  assert (whole / "metrics.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("run", ["whole", "resumed"])
def test_the_parts_of_the_wall_clock_add_up(request, run):
  line = workdirs.lines(request.getfixturevalue(run) / "metrics.jsonl")[-1]
  parts = {k: v for k, v in line.items() if k.startswith("seconds/")}
  total = parts.pop("seconds/total")
  assert abs(sum(parts.values()) - total) < 0.01
  assert {"seconds/compile", "seconds/step", "seconds/input"} <= set(parts)


@pytest.mark.slow
def test_a_workdir_of_another_config_is_refused(config_path, whole):
  run = subprocess.run(
      _command(config_path, whole, "--config.content.batch_size=8"),
      env=_environment(),
      cwd=ROOT,
      capture_output=True,
      text=True,
  )
  assert run.returncode == 2
  assert "error: content.batch_size: the run in" in run.stderr
  assert "has 4, this config 8" in run.stderr


@pytest.mark.slow
def test_sigterm_saves_with_75_and_the_run_goes_on_as_if_it_had_not_come(
    config_path, whole, tmp_path
):
  workdir = tmp_path / "term"
  process = subprocess.Popen(
      _command(config_path, workdir),
      env=_environment(),
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
  )
  deadline = time.monotonic() + 300
  # The first is logged before the step is compiled.
  while len(_lines_so_far(workdir / "records.jsonl")) < 2:
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.002)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate()
  assert process.returncode == 75
  assert "SIGTERM: saved at step" in stderr
  step = int(stderr.rsplit("saved at step ", 1)[1].split()[0])
  assert 0 < step < _STEPS
  assert (workdir / "checkpoints" / str(step)).is_dir()
  run = _run(config_path, workdir)
  assert f"Resumed at step {step} of {_STEPS}" in run.stdout
  _assert_equal(whole, workdir)
  records = [workdirs.lines(w / "records.jsonl") for w in (whole, workdir)]
  assert records[0] == records[1]


_COMPILES_LONG = f"""{_CONFIG}
import pathlib
import time
from mcjepa_jax.step import update

def endless(*args):
  def trace(*args):
    pathlib.Path(__file__).with_name("compiles").touch()
    time.sleep(600)
  endless.trace = trace
  return endless

update.jit_train_step = endless
"""


@pytest.mark.slow
def test_sigterm_to_a_run_that_compiles_ends_it_before_it_has_compiled(
    tmp_path,
):
  path = tmp_path / "configs" / "long.py"
  path.parent.mkdir()
  path.write_text(_COMPILES_LONG)
  process = subprocess.Popen(
      _command(path, tmp_path / "run"),
      env=_environment(),
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
  )
  deadline = time.monotonic() + 300
  while not path.with_name("compiles").exists():
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 75 and "what is saved is all there is" in err


@pytest.mark.slow
def test_a_run_starts_from_the_encoder_of_another_and_the_rest_anew(
    whole, tmp_path, monkeypatch
):
  started = []

  def captured(run, state):
    started.append(state)
    raise errors.Stop(errors.EXIT_ALARM, "seen")

  monkeypatch.setattr(train, "run_loop", captured)
  for name, source in (("own", ""), ("taken", str(whole))):
    cfg = tiny.config(
        mesh__devices=1, init_checkpoint=source, num_steps=5, seed=3
    )
    with pytest.raises(errors.Stop, match="seen"):
      train.train(cfg, tmp_path / name)
  own, taken = (workdirs.flat(state.params) for state in started)
  trained = workdirs.flat(workdirs.saved(whole, _STEPS)[0]["params"])
  for name, x in taken.items():
    source = trained if name.startswith("encoder/") else own
    np.testing.assert_array_equal(x, source[name], err_msg=name)
  assert any((own[k] != taken[k]).any() for k in own)
  assert int(started[1].step) == 0
  # Once it has saved, it does not ask for the other again.
  cfg = tiny.config(init_checkpoint=str(tmp_path / "gone"))
  folder = run_folder.Folder(tmp_path / "taken", tmp_path / "taken")
  with pytest.raises(errors.UserError, match="gone does not exist"):
    preconditions.check_init_checkpoint(cfg, folder)
  preconditions.check_init_checkpoint(cfg, run_folder.Folder(whole, whole))
