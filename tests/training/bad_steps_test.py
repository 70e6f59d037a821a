"""Dumps of steps come back as they were, and damaged ones are refused."""

import jax
import numpy as np
import pytest

from mcjepa_jax import errors, replay
from mcjepa_jax.distributed import sharding
from mcjepa_jax.storage import checkpoint_reader
from mcjepa_jax.training import bad_steps
from tests.helpers import dumps, tiny


def test_a_dump_holds_the_batch_the_parameters_and_the_config(tmp_path):
  folder = dumps.save(tmp_path)
  meta, config = bad_steps.read_meta(folder)
  assert (meta["step"], meta["kind"]) == (7, "both")
  assert meta["key"] == [7, 2**32 - 1]
  assert meta["records"] == {"content": ["a", "b"], "motion": ["c"]}
  assert np.isnan(meta["logs"]["loss"])
  assert config.to_dict() == tiny.config().to_dict()
  arrays = bad_steps.read_arrays(folder, "both")
  batch = tiny.batch()
  assert arrays.keys() == batch.keys()
  for name, x in arrays.items():
    np.testing.assert_array_equal(x, batch[name])
  assert set(bad_steps.read_arrays(folder, "content")) == {"views"}
  shapes = jax.eval_shape(lambda: dumps.state().params)
  kept = checkpoint_reader.restore_params(
      folder,
      jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None),
          shapes,
      ),
  )
  np.testing.assert_array_equal(kept["encoder"]["kernel"], np.arange(6.0))


def test_a_workdir_has_so_many_dumps_and_no_more(tmp_path):
  assert all(dumps.save(tmp_path, step) for step in (1, 2))
  assert dumps.save(tmp_path, 3) is None
  assert dumps.save(tmp_path, 2) is None  # met again by a run that resumed
  names = {path.name for path in (tmp_path / "dumps").iterdir()}
  assert names == {"step_1", "step_2"}


def test_what_a_kill_left_of_a_dump_takes_no_place_and_goes(tmp_path):
  for step in (1, 2):
    folder = tmp_path / "dumps" / f"step_{step}" / "checkpoints"
    folder.mkdir(parents=True)
    (folder.parent / "views.0.npy").write_bytes(b"half")
  assert dumps.save(tmp_path, 2)
  assert {path.name for path in (tmp_path / "dumps").iterdir()} == {"step_2"}


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "gone", "type"])
def test_a_damaged_batch_is_refused_by_its_name(tmp_path, damage):
  path = dumps.save(tmp_path) / "views.0.npy"
  if damage == "cut":
    path.write_bytes(path.read_bytes()[:1000])
  elif damage == "text":
    path.write_text("no array")
  elif damage == "pickle":
    np.save(path, np.array([{}], object), allow_pickle=True)
  elif damage == "gone":
    path.unlink()
  else:
    np.save(path, np.zeros((2, 8, 8, 3), np.float32))
  with pytest.raises(errors.UserError, match="views.0.npy: expected"):
    bad_steps.read_arrays(path.parent, "content")


def test_the_rows_of_all_hosts_are_one_batch_and_those_of_each_are_needed(
    tmp_path,
):
  folder = dumps.save(tmp_path)
  whole = np.load(folder / "views.0.npy")
  np.save(folder / "views.0.npy", whole[:3])
  np.save(folder / "views.1.npy", whole[3:])
  arrays = bad_steps.read_arrays(folder, "content", 2)
  np.testing.assert_array_equal(arrays["views"], whole)
  with pytest.raises(errors.UserError, match="views.2.npy: expected"):
    bad_steps.read_arrays(folder, "content", 3)
  np.save(folder / "views.1.npy", whole[3:, :8])
  with pytest.raises(errors.UserError, match="views of one size"):
    bad_steps.read_arrays(folder, "content", 2)


def test_rows_over_devices_are_kept_in_their_order(tmp_path):
  mesh = sharding.make_mesh(8)
  rows = np.arange(16 * 3, dtype=np.uint8).reshape(16, 1, 1, 3)
  x = sharding.to_global({"views": rows}, mesh)["views"]
  np.testing.assert_array_equal(bad_steps._own_rows(x), rows)
  whole = jax.device_put(rows, sharding.replicated(mesh))
  np.testing.assert_array_equal(bad_steps._own_rows(whole), rows)


def test_replay_names_what_is_no_dump(tmp_path, capsys, untrained):
  for folder, words in (
      (tmp_path / "nowhere", "does not exist"),
      (untrained, "expected the dump of a step"),
  ):
    assert replay.main([f"--dump={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
