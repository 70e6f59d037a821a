"""A run that goes on, on other devices or processes than it began on."""

import jax
import numpy as np
import pytest

from configs import quickstart
from mcjepa_jax import train
from tests.helpers import job, tiny, workdirs

_SAVED, _STEPS = 20, 40  # where another goes on, and for how long


def _train(workdir, devices, shard_min_mib):
  """Trains on so many devices, from what the workdir holds."""
  config = tiny.config(
      quickstart,
      num_steps=_STEPS,
      save_every=10,
      keep_last=9,
      log_every=1,
      log_records=True,
      mesh__devices=devices,
      mesh__shard_min_mib=shard_min_mib,
      motion__batch_size=8,
      content__batch_size=8,
  )
  train.train(config.lock(), workdir)
  return workdir


def _distance(a, b):
  """Between the parameters that two runs ended with."""
  a, b = (workdirs.flat(workdirs.saved(w, _STEPS)[0]["params"]) for w in (a, b))
  return np.sqrt(sum(np.sum((a[key] - b[key]) ** 2) for key in a))


def _losses(workdir):
  return [line["loss"] for line in workdirs.lines(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module", params=[4.0, 0.0005], ids=["whole", "sharded"])
def runs(request, tmp_path_factory):
  """Uninterrupted runs by their number of devices; the sharding's threshold."""
  shard_min_mib = request.param
  folder = tmp_path_factory.mktemp("runs")
  return shard_min_mib, {
      devices: _train(folder / str(devices), devices, shard_min_mib)
      for devices in (8, 4, 1)
  }


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(8, 4), (4, 1), (1, 8)], ids=str)
def test_a_run_goes_on_where_it_was_on_other_devices(
    runs, before, after, tmp_path, monkeypatch
):
  shard_min_mib, alone = runs
  first = []
  loop = train.run_loop

  def looked_at(run, state):
    # Copies: the step takes the state's own memory.
    first.append(jax.tree.map(np.array, workdirs.flat(state)))
    return loop(run, state)

  monkeypatch.setattr(train, "run_loop", looked_at)
  moved = workdirs.cut(alone[before], _SAVED, tmp_path / "moved")
  _train(moved, after, shard_min_mib)

  written = workdirs.flat(workdirs.saved(alone[before], _SAVED)[0])
  assert not workdirs.differences(written, first[0])
  records = [
      workdirs.lines(w / "records.jsonl") for w in (moved, alone[before])
  ]
  _goes_on(moved, alone[before], alone[after], records)


def _goes_on(moved, whole, there, records):
  """Asserts that a run that moved is as near to the one that did not as can be.

  Args:
    moved: the workdir of the run that went on elsewhere.
    whole: that of the same run, left where it began.
    there: that of a run which began where the other went.
    records: of the first two, the ids by step.
  """
  assert len(records[0]) == _STEPS
  assert records[0] == records[1]

  losses, expected = _losses(moved), _losses(whole)
  np.testing.assert_allclose(losses[_SAVED], expected[_SAVED], rtol=1e-5)

  # Other devices sum in another order: an uninterrupted run there drifts too.
  drift = _distance(there, whole)
  assert 0 < drift
  assert _distance(moved, whole) <= drift


@pytest.mark.proof
@pytest.mark.slow
def test_a_run_moves_from_8_to_4_to_1_to_8_devices(runs, tmp_path):
  shard_min_mib, alone = runs
  moved = alone[8]
  for step, devices in ((10, 4), (20, 1), (30, 8)):
    moved = workdirs.cut(moved, step, tmp_path / str(step))
    _train(moved, devices, shard_min_mib)
  ids = [workdirs.lines(w / "records.jsonl") for w in (moved, alone[8])]
  assert len(ids[0]) == _STEPS and ids[0] == ids[1]
  drifts = [_distance(alone[devices], alone[8]) for devices in (4, 1)]
  assert 0 < _distance(moved, alone[8]) <= sum(drifts)


# Each process leaves what it holds of the state that it goes on with.
_PROCESSES = f"""
import os
import pathlib

from configs import quickstart
from mcjepa_jax import train
from tests.helpers import tiny, workdirs

def get_config():
  config = tiny.config(quickstart, num_steps={_STEPS}, save_every={_SAVED},
                       keep_last=9, log_every=1, log_records=True)
  return config.lock()

loop = train.run_loop

def looked_at(run, state):
  workdirs.keep_shards(pathlib.Path(os.environ["TEST_SHARDS"]), state)
  return loop(run, state)

if "TEST_SHARDS" in os.environ:
  train.run_loop = looked_at
"""


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("shard_min_mib", [4.0, 0.0005], ids=str)
def test_a_run_goes_on_where_it_was_in_other_processes(
    tmp_path_factory, tmp_path, shard_min_mib
):
  path = job.written(tmp_path_factory, "elsewhere", _PROCESSES)
  option = f"--config.mesh.shard_min_mib={shard_min_mib}"
  alone = {}
  for count in (1, 2):
    alone[count] = tmp_path / str(count)
    job.run(path, alone[count], option, count=count)
  for before, after in ((2, 1), (1, 2)):
    moved = workdirs.cut(alone[before], _SAVED, tmp_path / f"to_{after}")
    shards = tmp_path / f"shards_{after}"
    results = job.run(path, moved, option, count=after, TEST_SHARDS=str(shards))
    assert f"Resumed at step {_SAVED}" in results[0][1]
    written = workdirs.flat(workdirs.saved(alone[before], _SAVED)[0])
    held = workdirs.from_shards(shards, written)
    assert not workdirs.differences(written, held)
    whole = job.records(alone[before], before)
    since = job.records(moved, after, since=_SAVED)
    ids = (whole[:_SAVED] + since, whole)
    _goes_on(moved, alone[before], alone[after], ids)
