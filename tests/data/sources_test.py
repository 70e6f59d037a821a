"""Every name of a motion source or flow set, on its official layout."""

import pathlib
import re

import numpy as np
import pytest

from mcjepa_jax.data import sources
from mcjepa_jax.data.catalog import datasets
from mcjepa_jax.errors import UserError
from tests.helpers import layouts


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
  """A data root with every set."""
  path = tmp_path_factory.mktemp("data")
  layouts.write(path)
  return path


def _motion(name, root, **options):
  return sources.motion(name, str(root), seed=0, size=(32, 32), **options)


def _flow_pairs(name, root):
  return sources.flow_pairs(name, str(root), seed=0, size=(32, 32), count=1)


def _names(make) -> set[str]:
  """The names that an unknown one is answered with."""
  with pytest.raises(UserError, match="expected one of") as caught:
    make("?", "/nowhere")
  listed = str(caught.value).split("expected one of ")[1].split(", got")[0]
  return set(listed.split(", "))


def _frames(example):
  """(numbers, greens) of the two frames, JPEG's losses taken off."""
  colours = np.stack([example[k][0, 0, :2] for k in ("frame_1", "frame_2")])
  return tuple(colours[:, 0].tolist()), set(colours[:, 1].tolist())


def test_every_name_is_in_these_tables_and_in_the_catalog():
  uses = [use for d in datasets.DATASETS for use in d.reads]
  for kind, make, table in (
      ("motion", _motion, layouts.TRAINED_ON),
      ("flow", _flow_pairs, layouts.EVALUATED),
  ):
    names = _names(make) - {"synthetic", "cutouts", "video", "frames", "pairs"}
    assert names == set(table)
    assert names == {u.split("/")[1] for u in uses if u.startswith(kind)}


@pytest.mark.parametrize("name", layouts.TRAINED_ON)
def test_training_reads_the_frames_of_its_part_of_the_set(root, name):
  count, first, numbers, greens = layouts.TRAINED_ON[name]
  pairs = _motion(name, root)
  assert len(pairs) == count
  assert pairs.record_id(0) == first
  came, green = zip(*(_frames(example) for example in pairs), strict=True)
  if name not in ("viper", "viper_test", "davis"):
    assert came[0] == numbers
    assert set.union(*green) == greens
  np.testing.assert_allclose(came[0], numbers, atol=3)
  assert set(pairs[0]) == {"frame_1", "frame_2"}


@pytest.mark.parametrize("name", layouts.EVALUATED)
def test_evaluation_reads_flow_between_the_right_frames(root, name):
  count, first, numbers, u, green = layouts.EVALUATED[name]
  pairs = _flow_pairs(name, root)
  assert len(pairs) == count
  assert pairs.record_id(0) == pairs[0]["name"] == first
  came, greens = _frames(pairs[0])
  np.testing.assert_allclose(came, numbers, atol=3)
  np.testing.assert_allclose([*greens], [green] * len(greens), atol=3)
  known = pairs[0]["valid"][..., 0] > 0
  assert (pairs[0]["flow"][known] == (u, -2)).all()
  for key, axes in (("flow", 2), ("valid", 1)):
    assert pairs[0][key].shape == (*layouts.SIZE, axes)
    assert pairs[0][key].dtype == np.float32


_LABEL = re.compile(
    r".*\.(flo|flo5|pfm|npy|npz)"
    r"|.*/(flow_\w+|hd1k_flow_gt|maps|Annotations)/.*"
    r"|.*-(occ|mb|oids)_..\.png"
)


@pytest.fixture(scope="module")
def unlabelled(root, tmp_path_factory) -> pathlib.Path:
  """The same data root, every label an empty file."""
  copies = tmp_path_factory.mktemp("unlabelled")
  emptied = 0
  for path in root.rglob("*.*"):
    copy = copies / path.relative_to(root)
    copy.parent.mkdir(parents=True, exist_ok=True)
    is_label = _LABEL.fullmatch(path.relative_to(root).as_posix())
    copy.write_bytes(b"" if is_label else path.read_bytes())
    emptied += bool(is_label)
  assert emptied > 80
  return copies


@pytest.mark.parametrize("name", layouts.TRAINED_ON)
def test_training_opens_no_label(unlabelled, name):
  pairs = _motion(name, unlabelled)
  assert len(list(pairs)) == layouts.TRAINED_ON[name][0]


@pytest.mark.parametrize("name", layouts.TRAINED_ON)
def test_a_training_set_that_is_not_there_is_named(tmp_path, name):
  with pytest.raises(UserError, match=f"{tmp_path.name}.*expected"):
    _motion(name, tmp_path)


@pytest.mark.parametrize("name", layouts.EVALUATED)
def test_the_first_missing_folder_is_named(tmp_path, name):
  with pytest.raises(UserError, match=f"{tmp_path.name}.*not found; expected"):
    _flow_pairs(name, tmp_path)
  with pytest.raises(UserError, match=f"{tmp_path / 'nowhere'}: not found"):
    _flow_pairs(name, tmp_path / "nowhere" / "deep")


def test_gaps_reach_further_in_sequences_and_not_over_what_is_left_out(root):
  assert len(_motion("sintel_clean", root, gaps=(1, 2))) == 3
  multiview = _motion("kitti_2015_multiview", root, gaps=(1, 9))
  ids = [multiview.record_id(i) for i in range(len(multiview))]
  assert ids == ["000000_07+1", "000000_13+1"]


def test_kitti_pairs_are_pairs_also_where_the_extension_is_unpacked(tmp_path):
  layouts.kitti(tmp_path)
  layouts.kitti_multiview(tmp_path)
  pairs = _motion("kitti_2015", tmp_path, gaps=(1, 3))
  ids = [pairs.record_id(i) for i in range(len(pairs))]
  assert ids == ["000000_10+1", "000007_10+1"]
  assert len(_motion("kitti_2015_multiview", tmp_path)) == 2


def test_sets_of_real_samples_open_by_their_names(shared_data):
  for name, count in (
      *(("davis", 88), ("flying_chairs", 4), ("middlebury", 4)),
      *(("sintel_clean", 6), ("sintel_final", 6)),
  ):
    assert len(_motion(name, shared_data)) == count


@pytest.mark.parametrize("suffix", [".flo", ".png", ".pfm", ".npy"])
def test_own_pairs_are_read_from_folders_below_one(tmp_path, suffix):
  for number, place in enumerate(("pairs/a", "pairs/deep/b")):
    layouts.image(tmp_path / f"{place}_img1.jpg", number)
    layouts.image(tmp_path / f"{place}_img2.png", number + 1)
    layouts.flow(tmp_path / f"{place}_flow{suffix}", number + 1)
  layouts.mask(tmp_path / "pairs/a_occ.png", 2)
  pairs = _flow_pairs("pairs", tmp_path)
  assert [pairs.record_id(i) for i in range(2)] == ["a", "deep_b"]
  assert (pairs[1]["flow"] == (2, -2)).all()
  assert pairs[0]["visible"][0, :, 0].tolist() == [1, 1, 0, 1, 1, 1]
  assert "visible" not in pairs[1]
  (tmp_path / "pairs/a_img1.jpg").unlink()
  with pytest.raises(UserError, match="a_img1.png: not found; expected"):
    _flow_pairs("pairs", tmp_path)
  with pytest.raises(UserError, match="nowhere.*not found; expected .*_flow"):
    _flow_pairs("pairs", tmp_path / "nowhere")
