"""Training that meets what is not finite: skipped, dumped, rolled back, ended.

The fault is a record of one flat colour and an augmentation that divides by an
image's range, as code without an epsilon does.
"""

import errno
import itertools
import json
import multiprocessing
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mcjepa_jax import errors, replay, train
from mcjepa_jax.compiled.compiled_steps import CompiledSteps
from mcjepa_jax.distributed import sharding
from mcjepa_jax.runtime import log_files, process_lifetimes, run_clock, signals
from mcjepa_jax.storage import (
    checkpoint,
    checkpoint_reader,
    local_files,
    paths,
    run_folder,
)
from mcjepa_jax.training import bad_steps, build, context, reports, saving
from tests.helpers import poison, tiny, workdirs

pytestmark = pytest.mark.slow

_IMAGES = 12  # of two a step: one step in six is poisoned


@pytest.fixture
def data(tmp_path):
  return poison.data(tmp_path / "data", _IMAGES)


@pytest.fixture
def no_epsilon(monkeypatch):
  """Stretches each view to its own range: 0 / 0 for a flat one."""
  poison.stretch(monkeypatch)


def _config(data, **changes):
  return tiny.config(
      **dict(
          mode="content",
          mesh__devices=1,
          data_root=str(data),
          content__sources=(("images", 1.0),),
          content__batch_size=2,
          # A photometric change would give the flat image a range.
          content__jitter__p=0.0,
          num_steps=8,
          save_every=2,
          keep_last=9,
          log_every=1,
          log_records=True,
          alarms__diagnose_every=0,
      )
      | changes
  )


def _poisoned(workdir):
  return [
      line["step"]
      for line in workdirs.lines(workdir / "records.jsonl")
      if poison.RECORD in line["content"]
  ]


def _skipped(workdir):
  return [
      line["step"]
      for line in workdirs.lines(workdir / "metrics.jsonl")
      if line.get("skipped")
  ]


def test_an_update_that_is_not_finite_changes_nothing_but_the_step():
  state, step, mesh = tiny.state_and_step(tiny.config(), "content")
  batch = sharding.to_global({"views": tiny.batch()["views"]}, mesh)
  good = jax.tree.map(np.array, state)
  spoilt = jax.tree.map(np.array, good)
  spoilt.params["expander"]["fc_2"]["kernel"][0, 0] = np.inf

  def ran(host):
    after, logs = step(jax.tree.map(jnp.array, host), batch)
    return jax.tree.map(np.array, after), float(logs["skipped"])

  after, skipped = ran(spoilt)
  assert skipped and after.skipped and after.step == spoilt.step + 1
  jax.tree.map(
      np.testing.assert_array_equal,
      (after.params, after.opt_state),
      (spoilt.params, spoilt.opt_state),
  )
  # The one after it waits, whatever its batch.
  held, skipped = ran(good.replace(skipped=np.array(True), step=after.step))
  assert not skipped and held.skipped and held.step == after.step
  jax.tree.map(np.testing.assert_array_equal, held.params, good.params)
  moved, _ = ran(good)
  assert not moved.skipped and moved.step == 1
  assert not all(
      map(
          np.array_equal,
          jax.tree.leaves(moved.params),
          jax.tree.leaves(good.params),
      )
  )


def test_a_step_that_is_not_finite_is_skipped_dumped_and_replayed(
    data, no_epsilon, tmp_path, capsys
):
  workdir, cache = tmp_path / "w", tmp_path / "cache"
  # It is diagnosed before it is skipped.
  config = _config(
      data, alarms__dumps=1, alarms__diagnose_every=1, data_cache=str(cache)
  )
  results = train.train(config, workdir)
  poisoned = _poisoned(workdir)
  assert poisoned and _skipped(workdir) == poisoned
  assert results["alarm/not_finite"] == len(poisoned)
  assert results["meta/step"] == 8
  state, _ = workdirs.saved(workdir, 8)
  flat = workdirs.flat(state)
  assert all(np.isfinite(x).all() for x in flat.values())
  (count,) = {
      int(x)
      for key, x in flat.items()
      if "encoder" in key and key.endswith("count")
  }
  assert count == 8 - len(poisoned)

  (dump,) = (workdir / "dumps").iterdir()
  assert dump.name == f"step_{poisoned[0]}"
  noticed = [
      line
      for line in workdirs.lines(workdir / "alarms.jsonl")
      if line["alarm"] == "not_finite"
  ]
  assert [line["step"] for line in noticed] == poisoned
  assert all(poison.RECORD in line["records"]["content"] for line in noticed)
  # The machine that runs it again need not be as the run's.
  cache.rmdir()
  capsys.readouterr()
  assert replay.main([f"--dump={dump}"]) == 0
  assert not cache.exists()
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert (
      report["step"] == poisoned[0]
      and poison.RECORD in report["records"]["content"]
  )
  assert {"loss", "content/variance"} <= set(report["terms"])
  assert any(leaf.startswith("encoder/") for leaf in report["gradients"])
  assert "nan" in report["operation"]


@pytest.mark.proof
def test_a_step_of_both_tasks_is_skipped_dumped_and_replayed(
    data, no_epsilon, tmp_path, capsys
):
  config = _config(data, mode="combined", motion__start_step=0, num_steps=6)
  results = train.train(config, tmp_path)
  poisoned = _poisoned(tmp_path)
  assert poisoned and _skipped(tmp_path) == poisoned
  assert results["alarm/not_finite"] == len(poisoned)
  capsys.readouterr()
  dump = tmp_path / "dumps" / f"step_{poisoned[0]}"
  assert replay.main([f"--dump={dump}"]) == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert len(report["records"]["motion"]) == config.motion.batch_size
  assert poison.RECORD in report["records"]["content"]
  # The flow is sound, and the estimator learns from nothing else.
  assert not any("reconstruction" in term for term in report["terms"])
  assert "content/variance" in report["terms"]
  assert not any(x.startswith("estimator/") for x in report["gradients"])
  assert any(x.startswith("encoder/") for x in report["gradients"])


def test_the_dumped_parameters_are_those_of_the_skipped_step(
    data, no_epsilon, tmp_path, monkeypatch
):
  workdir = tmp_path / "w"
  train.train(_config(data), workdir)
  step = _poisoned(workdir)[0]
  assert step % 2 == 0  # so that there is a checkpoint from just before it
  dump = workdir / "dumps" / f"step_{step}"
  # The same step without the fault: finite, and of the same parameters.
  monkeypatch.undo()
  report = replay.replay(dump)
  assert not report["terms"] and not report["gradients"]
  assert replay.main([f"--dump={dump}"]) == 1
  saved, _ = workdirs.saved(workdir, step)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    kept = checkpointer.restore(dump / "checkpoints" / str(step) / "state")
  assert not workdirs.differences(kept["params"], saved["params"])


def test_after_a_row_of_skips_it_goes_back_and_past_them_also_when_resumed(
    data, no_epsilon, tmp_path, monkeypatch
):
  changes = dict(alarms__skips_in_a_row=1, num_steps=9)
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  results = train.train(_config(data, **changes), whole)
  assert results["alarm/rollback"] >= 1
  assert results["alarm/rollback"] == results["alarm/not_finite"]
  assert not _poisoned(whole) and not _skipped(whole)
  records = workdirs.lines(whole / "records.jsonl")
  assert [line["step"] for line in records] == list(range(9))
  back = [
      x
      for x in workdirs.lines(whole / "alarms.jsonl")
      if x["alarm"] == "rollback"
  ]
  # Where it goes back to it reads the batch after the poisoned one.
  bad = [
      x["records"]["content"]
      for x in workdirs.lines(whole / "alarms.jsonl")
      if x["alarm"] == "not_finite"
  ]
  stream = build.streams(_config(data, **changes))["content"]
  order = [stream[i].records for i in range(30)]
  after = [new for old, new in itertools.pairwise(order) if old == bad[-1]]
  assert records[back[-1]["step"]]["content"] in after
  first, *_ = back
  # Its first step is saved, so that no resumed run meets the batch.
  assert (whole / "checkpoints" / str(first["step"] + 1)).is_dir()

  class Killed(BaseException):
    pass

  saves = saving.save

  def killed(run, state, *args, **kwargs):
    saves(run, state, *args, **kwargs)
    if run.monitor.counts()["alarm/rollback"]:
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(saving, "save", killed)
    with pytest.raises(Killed):
      train.train(_config(data, **changes), cut)
  train.train(_config(data, **changes), cut)
  one, other = (workdirs.saved(w, 9) for w in (whole, cut))
  assert not workdirs.differences(one[0], other[0])
  assert one[1] == other[1]
  assert records == workdirs.lines(cut / "records.jsonl")
  spans = json.loads((cut / "results.json").read_text())
  assert spans["goodput/restart"] > 0


def test_without_a_checkpoint_it_goes_back_to_the_start(
    data, no_epsilon, tmp_path
):
  cfg = _config(data, alarms__skips_in_a_row=1, save_every=100)
  results = train.train(cfg, tmp_path / "w")
  line, *_ = (
      x
      for x in workdirs.lines(tmp_path / "w" / "alarms.jsonl")
      if x["alarm"] == "rollback"
  )
  assert line["step"] == 0
  assert results["meta/step"] == 8 and not _poisoned(tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(alarms__skips=1), "1 updates were skipped"),
        pytest.param(
            dict(alarms__skips_in_a_row=1, alarms__rollbacks=0),
            "rolled back 0 times before",
            marks=pytest.mark.proof,
        ),
    ],
)
def test_too_many_end_the_run_with_76_and_a_checkpoint_stays(
    data, no_epsilon, tmp_path, changes, words
):
  cfg = _config(data, num_steps=12, **changes)
  with pytest.raises(errors.Stop, match=words) as caught:
    train.train(cfg, tmp_path)
  assert caught.value.code == 76
  assert list((tmp_path / "checkpoints").iterdir())
  for folder in (tmp_path / "checkpoints").iterdir():
    state, _ = workdirs.saved(tmp_path, int(folder.name))
    assert all(np.isfinite(x).all() for x in workdirs.flat(state).values())


def test_a_dump_is_written_when_no_checkpoint_is(
    data, no_epsilon, tmp_path, monkeypatch
):
  managers, overlaps = [], []
  plain = ocp.CheckpointManager.save

  def save(self, step, *args, **kwargs):
    begins, others = [self, True], [x for x in managers if x[0] is not self]
    managers.append(begins)
    overlaps.extend(
        step for x, begins in others if begins or x.is_saving_in_progress()
    )
    time.sleep(0.3)
    saved = plain(self, step, *args, **kwargs)
    begins[1] = False
    return saved

  monkeypatch.setattr(ocp.CheckpointManager, "save", save)
  # Each step begins while its save does.
  train.train(_config(data, save_every=1), tmp_path)
  folders = {str(x.directory.parent) for x, _ in managers}
  assert len(folders) > 1 and not overlaps
  assert not any(begins for _, begins in managers)


def test_healthy_records_are_neither_skipped_nor_dumped(data, tmp_path):
  results = train.train(_config(data), tmp_path)
  fired = [k for k, n in results.items() if k.startswith("alarm/") and n]
  assert not fired
  assert not (tmp_path / "dumps").exists()
  parts = [x for k, x in results.items() if k.startswith("goodput/")]
  assert len(parts) == 6 and sum(parts) == pytest.approx(100, abs=1)
  assert results["compiles"] == 1
  assert results["images_per_second"] > 0 and results["tflops_per_device"] > 0
  assert "pairs_per_second" not in results and "percent_of_peak" not in results


def test_logs_on_a_full_disk_end_the_run_and_it_goes_on_when_there_is_room(
    data, tmp_path, monkeypatch
):
  scalars = log_files.Journal.scalars

  def full(self, step, values):
    if step >= 3:
      self._metrics = open("/dev/full", "w")
    scalars(self, step, values)

  with monkeypatch.context() as patch:
    patch.setattr(log_files.Journal, "scalars", full)
    with pytest.raises(errors.UserError, match="No space left on device") as e:
      train.train(_config(data), tmp_path)
  (message,) = e.value.messages
  assert message.startswith(f"workdir: cannot write {tmp_path}")
  saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
  # Noticed by the step after the first that could not be logged.
  assert saved and max(saved) <= 4
  assert train.train(_config(data), tmp_path)["meta/step"] == 8


def _refused(monkeypatch, steps, folder="checkpoints"):
  """Writing the checkpoints of these steps fails in the background."""
  written = ocp.JsonCheckpointHandler._save_fn

  async def save(self, x, directory):
    path = str(directory)
    if any(f"{folder}/{step}." in path for step in steps):
      raise OSError(errno.EACCES, "Permission denied", path)
    await written(self, x, directory)

  monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", save)


def test_a_checkpoint_that_fails_is_told_and_the_next_is_saved(
    data, tmp_path, monkeypatch
):
  _refused(monkeypatch, {2, 6})
  workdir = tmp_path / "run"
  assert train.train(_config(data), workdir)["alarm/checkpoint"] == 2
  saved = {path.name for path in (workdir / "checkpoints").iterdir()}
  assert {name for name in saved if name.isdigit()} == {"4", "8"}
  told = [
      alarm["text"]
      for alarm in local_files.read_lines(workdir / "alarms.jsonl")
      if alarm["alarm"] == "checkpoint"
  ]
  assert len(told) == 2 and "Permission denied" in told[0]


def test_a_failure_told_once_the_next_is_written_is_not_of_a_row(
    data, tmp_path, monkeypatch
):
  _refused(monkeypatch, {2, 6})
  plain = checkpoint.Checkpoints.save

  def save(self, *args):
    try:
      return plain(self, *args)
    except errors.UserError:
      self.wait_until_finished()
      raise

  monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
  # As on a machine so busy that each failure is only met by the next save.
  monkeypatch.setattr(checkpoint.Checkpoints, "check_errors", lambda self: None)
  assert train.train(_config(data), tmp_path)["alarm/checkpoint"] == 2
  assert (tmp_path / "checkpoints" / "8").is_dir()


def test_where_the_save_before_a_rollback_fails_it_goes_back_to_an_earlier_one(
    data, no_epsilon, tmp_path, monkeypatch
):
  def alarms(workdir, name):
    lines = workdirs.lines(workdir / "alarms.jsonl")
    return [line for line in lines if line["alarm"] == name]

  config = _config(
      data, alarms__skips_in_a_row=1, alarms__dumps=0, save_every=1
  )
  train.train(config, tmp_path / "well")
  step = alarms(tmp_path / "well", "rollback")[0]["step"]
  assert step > 1
  refused, go_back = {step}, checkpoint.Checkpoints.go_back
  _refused(monkeypatch, refused)

  def relieved(self, step):
    refused.clear()
    return go_back(self, step)

  monkeypatch.setattr(checkpoint.Checkpoints, "go_back", relieved)
  # So that it is the rollback that meets it, which waits for the save.
  monkeypatch.setattr(checkpoint.Checkpoints, "check_errors", lambda self: None)
  results = train.train(config, tmp_path / "ill")
  assert alarms(tmp_path / "ill", "rollback")[0]["step"] == step - 1
  (told,) = alarms(tmp_path / "ill", "checkpoint")
  assert f"step {step - 1} stays" in told["text"]
  assert results["alarm/checkpoint"] == 1 and results["meta/step"] == 8
  assert not _poisoned(tmp_path / "ill")


def test_a_second_checkpoint_in_a_row_that_fails_ends_a_run_that_dumps(
    data, no_epsilon, tmp_path, monkeypatch
):
  config = _config(data, save_every=1)
  train.train(config, tmp_path / "well")
  step = next(x for x in _poisoned(tmp_path / "well") if x > 1)
  _refused(monkeypatch, {step - 1, step})
  # So that it is the dump that meets the second, which waits for the save.
  monkeypatch.setattr(checkpoint.Checkpoints, "check_errors", lambda self: None)
  with pytest.raises(errors.UserError, match="Permission denied"):
    train.train(config, tmp_path / "ill")
  assert not (tmp_path / "ill" / "dumps").exists()


@pytest.mark.parametrize("part", ["rows", "parameters"])
def test_what_a_full_disk_keeps_from_being_dumped_is_told_and_takes_no_room(
    data, no_epsilon, tmp_path, monkeypatch, part
):
  def full(x):
    raise OSError(errno.ENOSPC, "No space left on device")

  reason = "[Errno 28] No space left on device"
  if part == "rows":
    monkeypatch.setattr(bad_steps, "_own_rows", full)
  else:
    reason = "cannot be written: Permission denied"
    for step in range(8):
      place = f"dumps/step_{step}/checkpoints"
      _refused(monkeypatch, {step}, folder=place)
  results = train.train(_config(data), tmp_path)
  told = [x["text"] for x in workdirs.lines(tmp_path / "alarms.jsonl")]
  assert told and all("; not dumped: " in x and reason in x for x in told)
  assert results["alarm/not_finite"] == len(told)
  # Of a failed one what did not fail may come late: it goes when one looks.
  assert not list((tmp_path / "dumps").rglob("*.npy"))
  time.sleep(1)
  assert bad_steps.has_room(tmp_path, step=99, limit=1)
  assert not list((tmp_path / "dumps").iterdir())
  assert results["meta/step"] == 8


@pytest.mark.parametrize("saves", [0, 2])
def test_what_a_killed_run_did_after_its_last_save_is_time_lost(
    data, tmp_path, monkeypatch, saves
):
  class Killed(BaseException):
    pass

  plain, made = saving.save, []

  def killed(run, *args, **kwargs):
    if len(made) == saves:
      time.sleep(1.5)  # in which it is seen to live
      raise Killed
    result = plain(run, *args, **kwargs)
    run.checkpoints.wait_until_finished()
    made.append(time.time())
    return result

  # Not that of these tests.
  monkeypatch.setattr(run_clock, "process_start", time.perf_counter)
  monkeypatch.setattr(process_lifetimes, "WRITE_SECONDS", 0.1)
  since = time.time()
  with monkeypatch.context() as patch:
    patch.setattr(saving, "save", killed)
    with pytest.raises(Killed):
      train.train(_config(data), tmp_path)
  ended = time.time()
  if saves:
    since = checkpoint_reader.read_meta(tmp_path)["time"]
  ((_, seen_last),) = json.loads((tmp_path / "lives.json").read_text())
  finish, seen = reports.finish, []

  def finished(run, *args):
    seen.append(run.clock.seconds()["lost"])
    return finish(run, *args)

  monkeypatch.setattr(reports, "finish", finished)
  time.sleep(2)  # what lies between the two is not lost
  results = train.train(_config(data), tmp_path)
  (lost,) = seen
  assert lost == pytest.approx(seen_last - since, abs=0.1)
  assert 1.2 < lost <= ended - since
  restart = results["goodput/restart"] * results["seconds/total"] / 100
  assert restart > lost
  assert all(x >= 0 for k, x in results.items() if k.startswith("goodput/"))


@pytest.mark.proof
def test_two_checkpoints_in_a_row_that_fail_end_the_run(
    data, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    _refused(patch, {4, 6})
    with pytest.raises(errors.UserError, match="Permission denied; step 2 st"):
      train.train(_config(data), tmp_path / "run")
  assert train.train(_config(data), tmp_path / "run")["meta/step"] == 8


def _preempted(run, state, **_):
  """An evaluation in which SIGTERM comes."""
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)
  raise AssertionError("SIGTERM was not heard")


def test_sigterm_in_an_evaluation_saves_and_the_next_run_evaluates_there(
    data, tmp_path, monkeypatch
):
  config = _config(
      data, eval_every=3, eval_limit=8, evals=("knn/synthetic",), save_every=100
  )
  train.train(config, tmp_path / "whole")

  with monkeypatch.context() as patch:
    patch.setattr(reports, "evaluations", _preempted)
    with pytest.raises(errors.Stop, match="saved at step 3") as stop:
      train.train(config, tmp_path / "cut")
  assert stop.value.code == 75
  train.train(config, tmp_path / "cut")
  told = [
      [
          {
              key: value
              for key, value in line.items()
              if key in ("step", "loss", "knn/synthetic/top1")
          }
          for line in workdirs.lines(tmp_path / name / "metrics.jsonl")
      ]
      for name in ("whole", "cut")
  ]
  assert told[0] == told[1]
  evaluated = [x["step"] for x in told[1] if "knn/synthetic/top1" in x]
  assert evaluated == [3, 6]


def _best(data, **changes):
  """A config that keeps its last checkpoint, and the best by kNN."""
  return _config(
      data,
      keep_best=1,
      keep_last=1,
      best_metric="knn/synthetic/top1",
      best_is_larger=True,
      evals=("knn/synthetic",),
      **changes,
  )


def test_a_save_whose_evaluation_sigterm_ends_is_made_and_not_the_best(
    data, tmp_path, monkeypatch
):
  config = _best(data, eval_limit=8)
  with monkeypatch.context() as patch:
    patch.setattr(reports, "evaluations", _preempted)
    with pytest.raises(errors.Stop, match="saved at step 2") as stop:
      train.train(config, tmp_path)
  assert stop.value.code == 75
  train.train(config, tmp_path)
  saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
  assert 8 in saved and 2 not in saved and len(saved) <= 2


def test_the_best_evaluated_checkpoint_outlives_those_after_it(
    data, tmp_path, monkeypatch
):
  top = {2: 30.0, 4: 60.0, 6: 50.0, 8: 40.0}

  def evaluations(run, state, **_):
    return {"knn/synthetic/top1": top[int(state.step)]}, []

  monkeypatch.setattr(reports, "evaluations", evaluations)
  config = _best(data)
  train.train(config, tmp_path)
  saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert saved == {"4", "8"}


def test_a_dead_worker_ends_the_run_with_77_and_it_goes_on(
    data, tmp_path, monkeypatch
):
  plain, killed = CompiledSteps.run, []

  def run(self, *args, **kwargs):
    if not killed:
      (worker,) = multiprocessing.active_children()
      os.kill(worker.pid, signal.SIGKILL)
      killed.append(time.monotonic())
    return plain(self, *args, **kwargs)

  # More than the worker has read before it is killed.
  config = _config(data, workers=1, num_steps=30, save_every=1, keep_last=2)
  with monkeypatch.context() as patch:
    patch.setattr(CompiledSteps, "run", run)
    with pytest.raises(errors.Stop, match="worker.*SIGKILL") as stop:
      train.train(config, tmp_path)
  assert stop.value.code == 77 and time.monotonic() - killed[0] < 60
  newest = max(int(x.name) for x in (tmp_path / "checkpoints").iterdir())
  assert 0 < newest < 30
  assert train.train(config, tmp_path)["meta/step"] == 30


def test_logs_that_a_bucket_refuses_are_told_and_the_state_is_saved(
    data, tmp_path, monkeypatch
):
  refused = [paths.Unreachable("gs://b/run/metrics.jsonl: cannot be written")]

  def push(folder):
    if refused:
      raise refused.pop()

  monkeypatch.setattr(run_folder.Folder, "push", push)
  results = train.train(_config(data), tmp_path)
  assert results["alarm/checkpoint"] == 1 and results["meta/step"] == 8
  assert (tmp_path / "checkpoints" / "2").is_dir()


@pytest.mark.parametrize("start_step", [0, 3])
def test_sigterm_while_a_step_compiles_loses_none_before_it(
    tmp_path, monkeypatch, start_step
):
  plain = CompiledSteps.compile

  def compile(self, kind, state, arrays):
    if kind == "both":
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(60)
      raise AssertionError("SIGTERM was not heard")
    plain(self, kind, state, arrays)

  monkeypatch.setattr(CompiledSteps, "compile", compile)
  monkeypatch.setattr(context, "begin_step", lambda run: None)
  config = tiny.config(motion__start_step=start_step, save_every=100)
  with pytest.raises(errors.Stop, match="what is saved is all there is") as e:
    train.train(config, tmp_path)
  assert e.value.code == 75
  saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert saved == ([str(start_step)] if start_step else [])


def test_an_evaluation_that_breaks_the_run_loses_no_step_before_it(
    data, tmp_path, monkeypatch
):
  def broken(run, state, **options):
    raise RuntimeError("a fault of ours")

  monkeypatch.setattr(reports, "evaluations", broken)
  with pytest.raises(RuntimeError, match="a fault of ours"):
    train.train(_config(data, eval_every=4, save_every=4), tmp_path)
  assert (tmp_path / "checkpoints" / "4").is_dir()


@pytest.mark.proof
def test_sigterm_in_the_last_evaluation_ends_it_and_the_next_run_evaluates(
    data, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(reports, "evaluations", _preempted)
    with pytest.raises(errors.Stop) as stop:
      train.train(_config(data, num_steps=2), tmp_path / "run")
  assert stop.value.code == 75
  assert train.train(_config(data, num_steps=2), tmp_path / "run")


def test_an_eval_that_fails_at_the_end_leaves_the_others_their_results(
    data, tmp_path, monkeypatch
):
  plain = reports.evaluations

  def evaluations(run, state, **options):
    results, _ = plain(run, state, **options)
    return results | {"knn/fine/top1": 50.0}, ["broken/a: damaged", "b: too"]

  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(reports, "evaluations", evaluations)
    with pytest.raises(errors.UserError) as error:
      train.train(_config(data, num_steps=2), workdir)
  assert error.value.messages == ("broken/a: damaged", "b: too")
  written = json.loads((workdir / "results.json").read_text())
  assert written["knn/fine/top1"] == 50.0 and written["meta/step"] == 2
  assert written["meta/not_evaluated"] == "broken/a: damaged; b: too"
  # It is not taken for finished: the next start evaluates, and trains nothing.
  lines = workdirs.lines(workdir / "metrics.jsonl")
  results = train.train(_config(data, num_steps=2), workdir)
  assert "meta/not_evaluated" not in results
  assert workdirs.lines(workdir / "metrics.jsonl") == lines


def test_a_run_that_is_preempted_saves_before_it_evaluates_or_draws(
    data, tmp_path, monkeypatch
):
  monkeypatch.setattr(signals, "stopping", lambda stop: True)
  monkeypatch.setattr(reports, "draw", None)
  monkeypatch.setattr(reports, "evaluations", None)
  with pytest.raises(errors.Stop, match="saved at step 1") as stop:
    train.train(_config(data, eval_every=1, panel_every=1), tmp_path / "run")
  assert stop.value.code == 75


@pytest.mark.proof
def test_each_size_of_a_mixture_is_compiled_once(tmp_path):
  for i in range(8):
    tiny.save_image(tmp_path / "data" / "images" / f"{i}.png", (96, 128), i)
  cfg = tiny.config(
      mode="motion",
      data_root=str(tmp_path / "data"),
      motion__sources=(("synthetic", 1.0), ("cutouts", 1.0, (32, 64))),
      num_steps=6,
  )
  results = train.train(cfg, tmp_path / "w")
  assert results["compiles"] == 2
  assert not results.get("alarm/recompilation")


def test_a_batch_of_another_shape_is_noticed(tmp_path, monkeypatch):
  cfg = _config(
      "", content__sources=(("synthetic", 1.0),), content__batch_size=4
  )
  whole = context.step_batches

  def uneven(run, start):
    for number, batch in enumerate(whole(run, start)):
      if number == 5:
        batch.arrays = {k: x[: len(x) // 2] for k, x in batch.arrays.items()}
      yield batch

  monkeypatch.setattr(context, "step_batches", uneven)
  results = train.train(cfg, tmp_path)
  assert results["alarm/recompilation"] == 1 and results["compiles"] == 2
  (line,) = workdirs.lines(tmp_path / "alarms.jsonl")
  assert line["step"] == 5 and "(4, 32, 32, 3)" in line["text"]
