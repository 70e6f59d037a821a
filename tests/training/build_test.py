"""From a config to its streams."""

import pathlib

import jax
import pytest

from mcjepa_jax.training import build
from tests.helpers import layouts, tiny


@pytest.fixture
def data_root(tmp_path, monkeypatch) -> pathlib.Path:
  """A folder with sequences of 4 and of 7 frames: 3 and 6 pairs."""
  monkeypatch.setenv("MCJEPA_CACHE", str(tmp_path / "cache"))
  for folder, count in (("frames/a", 4), ("DAVIS/JPEGImages/480p/b", 7)):
    for i in range(count):
      layouts.image(tmp_path / folder / f"{i:05d}.png", 8 * i, size=(40, 64))
  return tmp_path


def _names(data_root, batches, **changes):
  """Name and size of each batch of motion."""
  cfg = tiny.config(data_root=str(data_root), mode="motion", **changes)
  stream = build.streams(cfg)["motion"]
  parts = [stream[k] for k in range(batches)]
  return [
      (part.records[0].split("/")[0], part.arrays["frames"].shape[1:3])
      for part in parts
  ]


def test_weights_are_shares_of_the_batches_and_a_source_may_have_its_size(
    data_root,
):
  names = _names(
      data_root, 8, motion__sources=(("frames", 3.0), ("davis", 1.0, (32, 64)))
  )
  assert names.count(("frames", (32, 32))) == 6
  assert names.count(("davis", (32, 64))) == 2


def test_the_recipe_passes_on_the_eraser():
  recipe = build.recipe(tiny.config(motion__erase=0.5))
  assert recipe.motion_jitter["erase_probability"] == 0.5


def test_repetitions_multiply_the_lengths_of_the_sets(data_root):
  names = _names(
      data_root,
      12,
      motion__mixing="repetitions",
      motion__sources=(("frames", 1.0), ("davis", 1.0)),
  )
  assert [name for name, _ in names].count("davis") == 8


def test_sets_that_are_not_whole_are_told(tmp_path):
  layouts.sintel(tmp_path / "MPI-Sintel")
  layouts.hd1k(tmp_path / "HD1K")
  cfg = tiny.config(
      data_root=str(tmp_path),
      motion__sources=(("sintel_clean", 1.0), ("hd1k", 1.0)),
  )
  (line,) = build.miscounts(cfg, build.streams(cfg))
  assert line.startswith("motion/sintel_clean: expected 1041 examples, as http")
  assert line.endswith("came 2")
  cfg.motion.gaps = (1, 2)
  assert not build.miscounts(cfg, build.streams(cfg))


def test_the_shapes_of_a_batch_are_those_that_the_streams_give():
  # Else what is compiled before the first batch would be of no use.
  cfg = tiny.config(
      motion__size=(32, 48), motion__batch_size=2, content__size=64
  )
  (size,) = build.motion_sizes(cfg)
  streams = build.streams(cfg)
  arrays = streams["content"][0].arrays | streams["motion"][0].arrays
  for kind, names in {
      "content": {"views"},
      "motion": {"frames"},
      "both": {"views", "frames"},
  }.items():
    assert build.batch_shapes(cfg, kind, size) == {
        name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
        for name in names
    }
