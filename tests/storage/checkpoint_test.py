"""What was saved comes back bit for bit, or not at all."""

import errno
import json
import signal
import subprocess
import sys
import time

from etils import epath
import gcsfs
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import checkpoint, checkpoint_reader
from tests.helpers import saved_states
from tests.helpers.repository import ROOT


def test_state_streams_and_meta_come_back_bit_for_bit(tmp_path):
  state = saved_states.save(tmp_path)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 3
    restored, streams, meta = checkpoints.restore(3, saved_states.shapes(state))
  saved_states.assert_bit_equal(restored, state)
  assert streams == saved_states.STREAMS
  assert meta == {"model": {"width": 4}, "step": 3}
  assert checkpoint_reader.read_meta(tmp_path) == meta


@pytest.mark.parametrize("before, after", [(8, 1), (1, 8), (8, 2)])
def test_a_state_moves_to_another_number_of_devices(tmp_path, before, after):
  state = saved_states.make_state()

  def shardings(count):
    mesh = jax.make_mesh(
        (count,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:count],
    )
    return jax.tree.map(
        lambda x: NamedSharding(
            mesh, PartitionSpec(*["data"] * (x.shape[:1] == (8,)))
        ),
        state,
    )

  saved_states.save(tmp_path, state=jax.device_put(state, shardings(before)))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    abstract = saved_states.shapes(state, shardings(after))
    restored, _, _ = checkpoints.restore(3, abstract)
  saved_states.assert_bit_equal(restored, state)
  kernel = restored.params["encoder"]["kernel"]
  assert kernel.sharding == abstract.params["encoder"]["kernel"].sharding
  assert len(kernel.sharding.device_set) == after


def test_the_last_and_the_best_steps_stay(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: np.nan, 4: 2.0, 5: 4.0, 6: 5.0}
  metrics = {step: {"loss": loss} for step, loss in losses.items()}
  saved_states.save(
      tmp_path, range(1, 6), metrics=metrics, keep_last=1, keep_best=2
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.all_steps() == [2, 4, 5]
  # The metrics are on disk: what was best before a restart still is.
  saved_states.save(tmp_path, [6], metrics=metrics, keep_last=2, keep_best=1)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.all_steps() == [2, 5, 6]


def test_one_each_so_many_hours_stays(tmp_path):
  saved_states.save(tmp_path, range(1, 6), keep_last=9)
  # As if they had been written half an hour apart.
  for step in range(1, 6):
    folder = tmp_path / "checkpoints" / str(step)
    (path,) = folder.glob("_CHECKPOINT_METADATA")
    meta = json.loads(path.read_text())
    for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
      meta[key] = meta[key] - int((6 - step) * 1800e9)
    path.write_text(json.dumps(meta))
  saved_states.save(tmp_path, [6], keep_last=2, keep_hours=1.0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.all_steps() == [1, 3, 5, 6]
  saved_states.save(tmp_path, [7], keep_last=1, keep_hours=1.0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.all_steps() == [1, 3, 5, 7]


def test_the_largest_metric_can_be_the_best(tmp_path):
  metrics = {1: {"top1": 1.0}, 2: {"top1": 3.0}, 3: {}, 4: {"top1": 2.0}}
  saved_states.save(
      tmp_path,
      range(1, 5),
      metrics=metrics,
      keep_best=1,
      metric="top1",
      larger_is_better=True,
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.all_steps() == [2, 4]


def test_a_step_is_written_once(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.save(1, saved_states.make_state(seed=0), {}, {})
    assert not checkpoints.save(1, saved_states.make_state(seed=1), {}, {})
  restored = checkpoint_reader.restore_params(
      tmp_path, saved_states.shapes(saved_states.make_state().params)
  )
  saved_states.assert_bit_equal(
      restored, saved_states.make_state(seed=0).params
  )


def test_updates_in_place_do_not_reach_a_save_under_way(tmp_path):
  state = {"params": {"a": jnp.arange(2_000_000, dtype=jnp.float32)}}
  update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path, keep_last=3) as checkpoints:
    expected = {}
    for step in (1, 2, 3):
      expected[step] = np.array(state["params"]["a"])
      checkpoints.save(step, state, {}, {})
      for _ in range(5):
        state = update(state)
    checkpoints.wait_until_finished()
    for step, values in expected.items():
      restored, _, _ = checkpoints.restore(step, saved_states.shapes(state))
      np.testing.assert_array_equal(restored["params"]["a"], values)


_KILLED = """
import os, pathlib, signal, sys, time
import jax.numpy as jnp
from mcjepa_jax.storage import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep_last=2)
for step, size in ((1, 10), (2, 8_000_000)):
  params = {"a": jnp.full(size, float(step))}
  checkpoints.save(step, {"params": params}, {"motion": step}, {})
deadline = time.monotonic() + 60
while not any(pathlib.Path(sys.argv[1], "checkpoints").glob("2.*")):
  assert time.monotonic() < deadline
  time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_step_torn_by_a_kill_is_never_chosen(tmp_path):
  process = subprocess.run(
      [sys.executable, "-c", _KILLED, str(tmp_path)],
      cwd=ROOT,
      timeout=120,
      check=False,
  )
  assert process.returncode == -signal.SIGKILL
  folder = tmp_path / "checkpoints"
  (torn,) = [p for p in folder.iterdir() if p.name.startswith("2")]
  assert checkpoint_reader.read_meta(tmp_path)["step"] == 1
  with pytest.raises(UserError, match="no complete checkpoint"):
    checkpoint_reader.read_meta(torn)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    abstract = {"params": {"a": jax.ShapeDtypeStruct((10,), jnp.float32)}}
    restored, streams, _ = checkpoints.restore(1, abstract)
    assert streams == {"motion": 1}
    assert float(restored["params"]["a"][0]) == 1.0
  assert not torn.exists()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.save(2, restored, {"motion": 2}, {})
  assert checkpoint_reader.read_meta(tmp_path)["step"] == 2


def test_another_optimizer_is_refused_on_resuming(tmp_path):
  saved_states.save(
      tmp_path, state=saved_states.make_state(tx=optax.sgd(0.1, momentum=0.9))
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="opt_state/encoder"):
      checkpoints.restore(3, saved_states.shapes(saved_states.make_state()))


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("in the way")
  workdir = tmp_path / "file" / "run"
  with pytest.raises(UserError, match=f"{workdir} cannot be written: Not a"):
    checkpoint.Checkpoints(workdir)


def test_going_back_deletes_what_is_newer_but_never_the_oldest(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep_last=9) as checkpoints:
    assert checkpoints.go_back(5) is None
    for step in (2, 4, 6):
      checkpoints.save(step, saved_states.make_state(), {}, {})
    checkpoints.wait_until_finished()
    assert checkpoints.go_back(5) == 4
    assert checkpoints.all_steps() == [2, 4]
    assert checkpoints.go_back(1) == 2
    assert checkpoints.all_steps() == [2]


def test_a_full_disk_is_named_and_what_was_saved_stays(tmp_path):
  if subprocess.run(
      ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path],
      capture_output=True,
  ).returncode:
    pytest.skip("no right to mount a file system of 3 MiB")
  try:
    large = {"params": {"a": jnp.asarray(np.random.rand(256, 1024))}}  # 1 MiB
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=9)
    with pytest.raises(
        UserError, match="No space left on device; step . stays"
    ):
      for step in range(4):
        checkpoints.save(step, large, {}, {})
        checkpoints.wait_until_finished()
    checkpoints.close()
    kept = checkpoint_reader.restore_params(
        tmp_path, saved_states.shapes(large["params"])
    )
    np.testing.assert_array_equal(kept["a"], large["params"]["a"])
  finally:
    subprocess.run(["umount", "-l", tmp_path], check=True)


async def _refused(self, x, directory):
  raise OSError(errno.EROFS, "Read-only file system", str(directory))


def test_a_write_that_fails_is_told_without_waiting_for_the_next(
    tmp_path, monkeypatch
):
  with checkpoint.Checkpoints(tmp_path, keep_last=9) as checkpoints:
    checkpoints.save(1, saved_states.make_state(), {}, {})
    checkpoints.wait_until_finished()

    with monkeypatch.context() as patch:
      patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", _refused)
      checkpoints.save(2, saved_states.make_state(), {}, {})
      checkpoints.latest_step()  # it has begun
      deadline = time.monotonic() + 60
      with pytest.raises(UserError, match="Read-only .* step 1 stays"):
        while True:
          checkpoints.check_errors()
          assert time.monotonic() < deadline
          time.sleep(0.01)
    assert checkpoints.latest_step() == 1
    checkpoints.check_errors()  # told once
    # What the failed write left goes, once its last threads have ended: the
    # disk may be full.
    step, left = 2, ["2.orbax-checkpoint-tmp"]
    while any("tmp" in name for name in left) and step < 60:
      time.sleep(0.1)
      step += 1
      checkpoints.save(step, saved_states.make_state(), {}, {})
      checkpoints.wait_until_finished()
      left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert checkpoints.all_steps()[-1] == step < 60


@pytest.mark.parametrize("early", [True, False])
def test_a_save_that_cannot_begin_is_told_once_and_the_next_is_made(
    tmp_path, monkeypatch, early
):
  with checkpoint.Checkpoints(tmp_path, keep_last=9) as checkpoints:

    def refused(*args, **kwargs):
      raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
      # The manager, or what it calls once it has noted a save under way.
      manager = checkpoints._manager
      patch.setattr(
          manager if early else manager._checkpointer, "save", refused
      )
      checkpoints.save(1, saved_states.make_state(), {}, {})
      deadline = time.monotonic() + 60
      with pytest.raises(UserError, match="No space .* there is none before"):
        while True:
          checkpoints.check_errors()
          assert time.monotonic() < deadline
          time.sleep(0.01)
    checkpoints.check_errors()
    assert checkpoints.latest_step() is None
    checkpoints.save(2, saved_states.make_state(), {}, {})
    assert checkpoints.all_steps() == [2]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out."),
            "not every host has written its part",
        ),
        (
            TimeoutError("Timed out while waiting for async_write_complete"),
            "not every host has written its part",
        ),
        (ValueError("UNAVAILABLE: Error writing b/state"), "UNAVAILABLE"),
        (
            gcsfs.retry.HttpError({"code": 429, "message": "slow"}),
            "HttpError: slow",
        ),
    ],
)
def test_what_other_hosts_and_buckets_refuse_is_told(
    tmp_path, monkeypatch, error, words
):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:

    def refused():
      raise error

    with monkeypatch.context() as patch:
      patch.setattr(checkpoints._manager, "wait_until_finished", refused)
      if isinstance(error, gcsfs.retry.HttpError):
        patch.setattr(checkpoints, "_folder", epath.Path("gs://b/run"))
        patch.setattr(checkpoint_reader, "complete_steps", lambda folder: [])
      with pytest.raises(
          UserError, match=f"cannot be written: {words}.*; there"
      ):
        checkpoints.wait_until_finished()
    assert checkpoints.failures == 1


def test_a_bucket_that_cannot_be_listed_either_is_told(tmp_path, monkeypatch):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:

    def refused(*_):
      raise ValueError("UNAVAILABLE: no route")

    with monkeypatch.context() as patch:
      patch.setattr(checkpoints._manager, "wait_until_finished", refused)
      patch.setattr(checkpoint_reader, "complete_steps", refused)
      with pytest.raises(UserError, match="UNAVAILABLE; what was there before"):
        checkpoints.wait_until_finished()
    assert checkpoints.failures == 1


def test_after_a_save_that_failed_it_goes_back_to_what_that_was_to_replace(
    tmp_path, monkeypatch
):
  with checkpoint.Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(2, saved_states.make_state(), {}, {})
    checkpoints.wait_until_finished()

    with monkeypatch.context() as patch:
      patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", _refused)
      checkpoints.save(4, saved_states.make_state(), {}, {})
      with pytest.raises(UserError, match="Read-only .* step 2 stays"):
        checkpoints.wait_until_finished()
    assert checkpoints.go_back(3) == 2


def test_what_ends_a_run_is_not_hidden_by_its_last_save(tmp_path, capsys):
  with pytest.raises(RuntimeError, match="what ends it"):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:

      def refused(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

      checkpoints._manager.save = refused
      checkpoints.save(1, saved_states.make_state(), {}, {})
      raise RuntimeError("what ends it")
  assert "No space left on device" in capsys.readouterr().err


def test_a_save_after_one_that_failed_is_made_before_that_is_told(
    tmp_path, monkeypatch
):
  with checkpoint.Checkpoints(tmp_path, keep_last=9) as checkpoints:

    with monkeypatch.context() as patch:
      patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", _refused)
      checkpoints.save(1, saved_states.make_state(), {}, {})
      with pytest.raises(UserError, match="Read-only"):
        checkpoints.wait_until_finished()
      checkpoints.save(2, saved_states.make_state(), {}, {})
      checkpoints.latest_step()  # it has begun
      checkpoints._there(lambda: None)
      while checkpoints._manager.is_saving_in_progress():
        time.sleep(0.01)
    with pytest.raises(UserError, match="Read-only .* there is none before"):
      checkpoints.save(3, saved_states.make_state(), {}, {})
    assert checkpoints.failures == 2  # though the third may be written by now
    checkpoints.wait_until_finished()
    assert checkpoints.failures == 0
    assert checkpoints.all_steps() == [3]


def test_room_is_taken_once_and_a_save_uses_it(tmp_path):
  state = saved_states.make_state()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.make_room(state)
    before = jax.tree.leaves(checkpoints._copied)
    where = {leaf.unsafe_buffer_pointer() for leaf in before if leaf.size}
    checkpoints.save(1, state, {}, {})
    after = jax.tree.leaves(checkpoints._copied)
    assert where == {x.unsafe_buffer_pointer() for x in after if x.size}
  restored = checkpoint_reader.restore_params(
      tmp_path, saved_states.shapes(state.params)
  )
  saved_states.assert_bit_equal(restored, state.params)


def test_a_save_that_fails_in_the_background_surfaces(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, saved_states.make_state(), {"motion": {1, 2}}, {})
  with pytest.raises(TypeError, match="not JSON serializable"):
    checkpoints.close()
  with pytest.raises(UserError, match="no complete checkpoint"):
    checkpoint_reader.read_meta(tmp_path)
