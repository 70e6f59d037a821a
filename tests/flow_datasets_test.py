"""Flow sets: their official layouts, masks, and what they say is missing."""

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax.data import flow_datasets, flow_io
from mcjepa_jax.errors import UserError

SIZE = (4, 6)
LABELS = {"flow", "valid", "visible"}


def _image(path, value=0, size=SIZE, mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size[::-1], (value, 0, 255)).convert(mode).save(path)


def _flow(path, u=1.0, size=SIZE, valid=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  write = {
      ".flo": flow_io.write_flo,
      ".pfm": flow_io.write_pfm,
      ".png": flow_io.write_kitti_flow,
  }[path.suffix]
  write(path, np.full((*size, 2), (u, -2), np.float32), valid)


def _chairs(root):
  for name in ("00002", "00010"):
    for frame in (1, 2):
      _image(root / f"{name}_img{frame}.ppm", value=frame)
    _flow(root / f"{name}_flow.flo")


def _sintel(root, render="clean"):
  for number in (1, 2, 3):
    _image(root / render / "alley_1" / f"frame_{number:04d}.png", value=number)
  for number in (1, 2):
    _flow(root / "flow" / "alley_1" / f"frame_{number:04d}.flo", u=number)


def _kitti(root, images="image_2"):
  known = np.zeros((*SIZE, 1), np.float32)
  known[:, :3] = 1
  seen = known.copy()
  seen[:, 2] = 0
  for name in ("000000", "000007"):
    for frame in (10, 11):
      _image(root / images / f"{name}_{frame}.png", value=frame)
    _flow(root / "flow_occ" / f"{name}_10.png", valid=known)
    _flow(root / "flow_noc" / f"{name}_10.png", valid=seen)


def _ids(flow_set):
  return [flow_set.record_id(i) for i in range(len(flow_set))]


def _is_pair(example, first, second):
  """Frame values say which file became which frame."""
  assert example["frame_1"][0, 0].tolist() == [first, 0, 255]
  assert example["frame_2"][0, 0].tolist() == [second, 0, 255]
  assert example["frame_1"].dtype == np.uint8
  assert example["flow"].dtype == example["valid"].dtype == np.float32
  assert example["valid"].shape == (*SIZE, 1)
  return True


@pytest.mark.parametrize("place", ["FlyingChairs_release/data", "data", ""])
def test_chairs_are_found_from_the_data_root_or_their_own(tmp_path, place):
  _chairs(tmp_path / place)
  chairs = flow_datasets.open_flow_set("flying_chairs", tmp_path)
  assert _ids(chairs) == ["00002", "00010"]
  assert _is_pair(chairs[1], 1, 2)
  assert chairs[1]["name"] == "00010"
  np.testing.assert_array_equal(chairs[1]["flow"][3, 5], [1, -2])


@pytest.mark.parametrize("render", ["clean", "final"])
def test_sintel_pairs_a_frame_with_the_next_of_its_scene(tmp_path, render):
  _sintel(tmp_path / "MPI-Sintel" / "training", render)
  sintel = flow_datasets.open_flow_set(f"sintel_{render}", tmp_path)
  assert _ids(sintel) == ["alley_1_0001", "alley_1_0002"]
  assert _is_pair(sintel[1], 2, 3)
  assert sintel[1]["flow"][0, 0, 0] == 2
  assert not LABELS & {"visible"} & set(sintel[1])


def test_sintel_masks_are_white_where_a_pixel_does_not_count(tmp_path):
  root = tmp_path / "MPI-Sintel" / "training"
  _sintel(root)
  for column, kind in enumerate(("occlusions", "invalid")):
    mask = np.zeros(SIZE, np.uint8)
    mask[:, column] = 255
    (root / kind / "alley_1").mkdir(parents=True)
    Image.fromarray(mask).save(root / kind / "alley_1" / "frame_0002.png")
  first, second = flow_datasets.sintel_clean(tmp_path)
  assert "visible" not in first and first["valid"].all()
  assert second["visible"][0, :, 0].tolist() == [0, 1, 1, 1, 1, 1]
  assert second["valid"][0, :, 0].tolist() == [1, 0, 1, 1, 1, 1]


def test_middlebury_leaves_out_scenes_without_ground_truth(tmp_path):
  root = tmp_path / "middlebury"
  for scene in ("Beanbags", "RubberWhale"):
    for frame in (10, 11):
      _image(root / "other-data" / scene / f"frame{frame}.png", value=frame)
  valid = np.ones((*SIZE, 1), np.float32)
  valid[1, 2] = 0
  _flow(root / "other-gt-flow" / "RubberWhale" / "flow10.flo", valid=valid)
  middlebury = flow_datasets.open_flow_set("middlebury", tmp_path)
  assert _ids(middlebury) == ["RubberWhale"]
  assert _is_pair(middlebury[0], 10, 11)
  np.testing.assert_array_equal(middlebury[0]["valid"], valid)


@pytest.mark.parametrize(
    "name, place, images",
    [
        ("kitti_2015", "kitti/data_scene_flow/training", "image_2"),
        ("kitti_2012", "kitti/data_stereo_flow/training", "colored_0"),
        ("kitti_2012", "kitti/data_stereo_flow/training", "image_0"),
    ],
)
def test_kitti_is_visible_where_the_noc_flow_is_valid(
    tmp_path, name, place, images
):
  _kitti(tmp_path / place, images)
  kitti = flow_datasets.open_flow_set(name, tmp_path)
  assert _ids(kitti) == ["000000", "000007"]
  assert _is_pair(kitti[0], 10, 11)
  assert kitti[0]["valid"][0, :, 0].tolist() == [1, 1, 1, 0, 0, 0]
  assert kitti[0]["visible"][0, :, 0].tolist() == [1, 1, 0, 0, 0, 0]


def test_hd1k_pairs_do_not_leave_their_sequence(tmp_path):
  for name in ("000000_0010", "000000_0020", "000001_0010"):
    _image(tmp_path / "HD1K/hd1k_input/image_2" / f"{name}.png", int(name[-2:]))
    _flow(tmp_path / "HD1K/hd1k_flow_gt/flow_occ" / f"{name}.png")
  hd1k = flow_datasets.open_flow_set("hd1k", tmp_path)
  assert _ids(hd1k) == ["000000_0010"]
  assert _is_pair(hd1k[0], 10, 20)


def test_flying_things_leave_out_a_flow_past_the_last_frame(tmp_path):
  root = tmp_path / "FlyingThings3D"
  flows = root / "optical_flow/TRAIN/B/0003/into_future/left"
  for number in (6, 7):
    _image(
        root / f"frames_cleanpass/TRAIN/B/0003/left/{number:04d}.png", number
    )
    _flow(flows / f"OpticalFlowIntoFuture_{number:04d}_L.pfm")
  things = flow_datasets.open_flow_set("flying_things", tmp_path)
  assert _ids(things) == ["B_0003_0006"]
  assert _is_pair(things[0], 6, 7)


@pytest.mark.parametrize("name", flow_datasets.FLOW_SETS)
def test_the_first_missing_folder_is_named(tmp_path, name):
  with pytest.raises(UserError, match=f"{tmp_path.name}.*not found; expected"):
    flow_datasets.open_flow_set(name, tmp_path)
  with pytest.raises(UserError, match=f"{tmp_path / 'nowhere'}: not found"):
    flow_datasets.open_flow_set(name, tmp_path / "nowhere" / "deep")


def test_an_empty_set_and_an_unknown_name_are_refused(tmp_path):
  (tmp_path / "middlebury" / "other-gt-flow").mkdir(parents=True)
  with pytest.raises(UserError, match="other-gt-flow: expected flow files"):
    flow_datasets.open_flow_set("middlebury", tmp_path)
  with pytest.raises(UserError, match="middlebury.*came 'sintel'"):
    flow_datasets.open_flow_set("sintel", tmp_path)


def test_a_set_is_opened_without_a_look_into_its_files(tmp_path):
  _chairs(tmp_path)
  (tmp_path / "00002_img1.ppm").write_bytes(b"")
  chairs = flow_datasets.flying_chairs(tmp_path)
  assert _is_pair(chairs[1], 1, 2)
  with pytest.raises(UserError, match="00002_img1.ppm: expected an image"):
    chairs[0]


def test_all_missing_frames_are_named(tmp_path):
  _chairs(tmp_path)
  (tmp_path / "00002_img2.ppm").unlink()
  (tmp_path / "00010_img1.ppm").unlink()
  with pytest.raises(UserError) as caught:
    flow_datasets.flying_chairs(tmp_path)
  assert len(caught.value.messages) == 2
  assert "00002_img2.ppm: not found" in caught.value.messages[0]


@pytest.mark.parametrize("wrong", ["00002_img2.ppm", "00002_flow.flo"])
def test_files_of_another_size_than_frame_1_are_named(tmp_path, wrong):
  _chairs(tmp_path)
  write = _flow if wrong.endswith(".flo") else _image
  write(tmp_path / wrong, 1, SIZE[::-1])
  chairs = flow_datasets.flying_chairs(tmp_path)
  fault = f"{wrong}: expected 6x4, the size of .*00002_img1.ppm, came 4x6"
  with pytest.raises(UserError, match=fault):
    chairs[0]


@pytest.mark.parametrize(
    "name, pairs, first",
    [
        ("sintel_clean", 4, "alley_1_0001"),
        ("sintel_final", 4, "alley_1_0001"),
        ("flying_chairs", 4, "00001"),
        ("middlebury", 4, "Dimetrodon"),
    ],
)
def test_real_samples_warp_frame_2_onto_frame_1(
    shared_data, name, pairs, first
):
  flow_set = flow_datasets.open_flow_set(name, shared_data)
  assert len(flow_set) == pairs
  assert flow_set.record_id(0) == first
  better = 0
  for example in flow_set:
    height, width = example["flow"].shape[:2]
    y, x = np.mgrid[:height, :width]
    to = np.rint(np.stack([x, y], -1) + example["flow"]).astype(int)
    inside = ((to >= 0) & (to < (width, height))).all(-1)
    inside &= example["valid"][..., 0] > 0
    x, y = np.clip(to, 0, (width - 1, height - 1)).transpose(2, 0, 1)
    frame_1, frame_2 = (
        example[k].astype(np.float32) for k in ("frame_1", "frame_2")
    )
    moved = np.abs(frame_2[y, x] - frame_1)[inside].mean()
    better += moved < 0.8 * np.abs(frame_2 - frame_1)[inside].mean()
  assert better == pairs
