"""Flow sets: their masks, splits and scales, and what they say is missing."""

import h5py
import numpy as np
import pytest

from mcjepa_jax.data.readers import flow_files
from mcjepa_jax.data.sets import flow_sets
from mcjepa_jax.errors import UserError
from tests.helpers import layouts
from tests.helpers.layouts import SIZE


def _ids(pairs):
  return [pairs.record_id(i) for i in range(len(pairs))]


def _row(values):
  return values[0, :, 0].tolist()


def _chairs(root, **options):
  return flow_sets.flying_chairs(root, "validation", **options)


@pytest.mark.parametrize("place", ["FlyingChairs_release/data", "data", ""])
def test_chairs_are_found_from_the_data_root_or_their_own(tmp_path, place):
  layouts.flying_chairs(tmp_path / place)
  assert _ids(_chairs(tmp_path)) == ["00001", "00002", "00010"]


@pytest.mark.parametrize("place", ["", "data"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_chairs_are_split_by_their_file(tmp_path, place, end):
  layouts.flying_chairs(tmp_path / "data")
  path = tmp_path / place / "FlyingChairs_train_val.txt"
  path.write_bytes(end.join("121").encode())
  for split, ids in (
      ("training", ["00001", "00010"]),
      ("validation", ["00002"]),
  ):
    assert _ids(flow_sets.flying_chairs(tmp_path, split)) == ids


@pytest.mark.parametrize(
    "lines", ["1 2", "1 2 1 2", "1 2 3", "", "1 2 1 " * 99, "12 1"]
)
def test_a_split_file_that_does_not_fit_the_pairs_is_refused(tmp_path, lines):
  layouts.flying_chairs(tmp_path)
  (tmp_path / "FlyingChairs_train_val.txt").write_text(lines)
  with pytest.raises(UserError, match="train_val.txt: expected .* of 3 pairs"):
    _chairs(tmp_path)


def test_chairs_train_without_flow_files_and_are_not_evaluated(tmp_path):
  layouts.flying_chairs(tmp_path)
  for path in tmp_path.glob("*.flo"):
    path.unlink()
  pairs = flow_sets.flying_chairs(tmp_path, "training", labels=False)
  assert set(pairs[2]) == {"frame_1", "frame_2"}
  with pytest.raises(UserError) as caught:
    _chairs(tmp_path)
  assert len(caught.value.messages) == 3
  assert "00001_flow.flo: not found" in caught.value.messages[0]


def test_occlusion_masks_are_white_where_a_pixel_is_hidden(tmp_path):
  layouts.flying_chairs_2(tmp_path)
  layouts.flying_things_subset(tmp_path)
  (pair,) = flow_sets.flying_chairs_2(tmp_path, "train")
  assert _row(pair["visible"]) == [0, 1, 1, 1, 1, 1]
  pair = flow_sets.flying_things_subset(tmp_path, "val")[1]
  assert _row(pair["visible"]) == [1, 1, 0, 1, 1, 1]
  assert pair["valid"].all()


def test_sintel_masks_are_white_where_a_pixel_does_not_count(tmp_path):
  layouts.sintel(tmp_path)
  for column, kind in enumerate(("occlusions", "invalid")):
    name = f"training/{kind}/alley_1/frame_0002.png"
    layouts.mask(tmp_path / name, column)
  first, second = flow_sets.sintel(tmp_path, "clean")
  assert "visible" not in first and first["valid"].all()
  assert _row(second["visible"]) == [0, 1, 1, 1, 1, 1]
  assert _row(second["valid"]) == [1, 0, 1, 1, 1, 1]


def test_a_sintel_flow_without_a_number_is_named(tmp_path):
  layouts.sintel(tmp_path)
  layouts.flow(tmp_path / "training/flow/alley_1/frame_a.flo")
  with pytest.raises(UserError, match="frame_a.flo: expected a frame's number"):
    flow_sets.sintel(tmp_path, "clean")


def test_middlebury_does_not_count_unknown_flow(tmp_path):
  layouts.middlebury(tmp_path)
  (pair,) = flow_sets.middlebury(tmp_path)
  assert np.argwhere(pair["valid"][..., 0] == 0).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "year, images",
    [("2015", "image_2"), ("2012", "colored_0"), ("2012", "image_0")],
)
def test_kitti_is_visible_where_the_noc_flow_is_valid(tmp_path, year, images):
  layouts.kitti(tmp_path, images)
  pair = flow_sets.kitti(tmp_path, year)[0]
  assert _row(pair["valid"]) == [1, 1, 1, 0, 0, 0]
  assert _row(pair["visible"]) == [1, 1, 0, 0, 0, 0]
  pair = flow_sets.kitti(tmp_path, year, truth="flow_noc")[0]
  assert _row(pair["valid"]) == [1, 1, 0, 0, 0, 0]


def test_kitti_2012_is_read_in_colour_where_colour_is_there(tmp_path):
  layouts.kitti(tmp_path, "image_0")
  layouts.kitti(tmp_path, "colored_0")
  folder, _ = flow_sets.kitti_frames(tmp_path, "2012", "training")
  assert folder.name == "colored_0"


def test_hd1k_pairs_do_not_leave_their_sequence(tmp_path):
  layouts.hd1k(tmp_path)
  assert _ids(flow_sets.hd1k(tmp_path)) == ["000000_0010"]


def test_spring_has_four_vectors_a_pixel_and_does_not_scale(tmp_path):
  layouts.spring(tmp_path)
  values = np.arange(8 * 12 * 2, dtype=np.float32).reshape(8, 12, 2)
  values[2, 4] = values[7, 1] = np.nan
  kind = "train/0001/flow_FW_left/flow_FW_left_0001.flo5"
  with h5py.File(tmp_path / kind, "w") as store:
    store["flow"] = values
  pair = flow_sets.spring(tmp_path)[0]
  np.testing.assert_array_equal(
      pair["flow"], np.nan_to_num(values[[0, 2, 4, 6]][:, [0, 2, 4, 6, 8, 10]])
  )
  np.testing.assert_array_equal(pair["flow_all"][2, 3], values[4:6, 6:8])
  # A pixel is known where its four vectors are.
  assert np.argwhere(pair["valid"][..., 0] == 0).tolist() == [[1, 2], [3, 0]]


def test_spring_is_not_visible_where_the_match_map_has_a_colour(tmp_path):
  layouts.spring(tmp_path)
  pair = flow_sets.spring(tmp_path, direction="past")[0]
  assert _row(pair["visible"]) == [1, 1, 0, 1, 1, 1]


def test_spring_flow_of_the_frames_size_is_refused(tmp_path):
  layouts.spring(tmp_path)
  kind = "train/0001/flow_FW_left/flow_FW_left_0001.flo5"
  layouts.flow(tmp_path / kind, size=SIZE)
  fault = "0001.flo5: expected 12x8, twice the size of .*0001.png, came 6x4"
  with pytest.raises(UserError, match=fault):
    flow_sets.spring(tmp_path)[0]


@pytest.mark.parametrize("place", ["office/Easy", "office/office/Easy"])
def test_tartanair_counts_where_the_mask_is_0(tmp_path, place):
  layouts.tartanair(tmp_path / "made")
  (tmp_path / "TartanAir" / place).parent.mkdir(parents=True)
  (tmp_path / "made/office/Easy").rename(tmp_path / "TartanAir" / place)
  pairs = flow_sets.tartanair(tmp_path)
  assert _row(pairs[1]["valid"]) == [0, 0, 0, 1, 1, 1]
  assert "visible" not in pairs[1]
  folder, trajectories = flow_sets.tartanair_frames(tmp_path)
  assert [p.name for p in trajectories] == ["image_left", "image_right"]


@pytest.mark.parametrize(
    "array", [np.zeros((6, 4), np.uint8), np.zeros(SIZE), np.zeros((*SIZE, 2))]
)
def test_a_tartanair_mask_of_another_kind_is_refused(tmp_path, array):
  layouts.tartanair(tmp_path)
  path = tmp_path / "office/Easy/P000/flow/000000_000001_mask.npy"
  np.save(path, array)
  with pytest.raises(UserError, match="000000_000001_mask.npy: expected"):
    flow_sets.tartanair(tmp_path)[0]


def test_viper_leaves_out_empty_files_and_reads_png_where_it_is(tmp_path):
  layouts.viper(tmp_path)
  assert _ids(flow_sets.viper(tmp_path, "train")) == ["002_00010"]
  for number in (10, 11):
    layouts.image(tmp_path / f"train/img/002/002_{number:05d}.png", number)
  pair = flow_sets.viper(tmp_path, "train").pairs[0]
  assert pair.frame_2.endswith("002_00011.png")


def test_flying_things_leave_out_a_flow_past_the_last_frame(tmp_path):
  layouts.flying_things(tmp_path)
  things = flow_sets.flying_things(tmp_path, "TRAIN")
  assert _ids(things) == ["B_0003_0006", "B_0003_0007"]
  things = flow_sets.flying_things(tmp_path, "TRAIN", direction="past")
  assert _ids(things) == ["B_0003_0007", "B_0003_0008"]


def test_flying_things_are_read_as_webp_too(tmp_path):
  layouts.flying_things(tmp_path, "_webp", "webp")
  things = flow_sets.flying_things(tmp_path, "TEST", camera="right")
  assert _ids(things) == ["B_0003_0006", "B_0003_0007"]
  assert things.pairs[0].frame_2.endswith("_webp/TEST/B/0003/right/0007.webp")
  np.testing.assert_allclose(things[0]["frame_2"][0, 0], [7, 6, 255], atol=9)
  folder, scenes = flow_sets.flying_things_frames(tmp_path, "clean")
  assert folder.parent.name == "frames_cleanpass_webp" and len(scenes) == 2


def test_a_render_of_flying_things_that_is_not_there_is_named(tmp_path):
  layouts.flying_things(tmp_path)
  (tmp_path / "frames_finalpass").rename(tmp_path / "elsewhere")
  with pytest.raises(UserError, match="frames_finalpass: not found; expected"):
    flow_sets.flying_things(tmp_path, "TEST", render="final")


def test_an_empty_set_is_refused(tmp_path):
  (tmp_path / "middlebury" / "other-gt-flow").mkdir(parents=True)
  (tmp_path / "middlebury" / "other-data").mkdir(parents=True)
  with pytest.raises(UserError, match="other-gt-flow: expected flow files"):
    flow_sets.middlebury(tmp_path)
  with pytest.raises(UserError, match="other-data: expected folders"):
    flow_sets.middlebury_frames(tmp_path)


def test_a_set_is_opened_without_a_look_into_its_files(tmp_path):
  layouts.flying_chairs(tmp_path)
  (tmp_path / "00002_img1.ppm").write_bytes(b"")
  chairs = _chairs(tmp_path)
  assert chairs[0]["frame_2"][0, 0].tolist() == [2, 0, 255]
  with pytest.raises(UserError, match="00002_img1.ppm: expected an image"):
    chairs[1]


def test_all_missing_frames_are_named(tmp_path):
  layouts.flying_chairs(tmp_path)
  (tmp_path / "00002_img2.ppm").unlink()
  (tmp_path / "00010_img1.ppm").unlink()
  with pytest.raises(UserError) as caught:
    _chairs(tmp_path)
  assert len(caught.value.messages) == 2
  assert "00002_img2.ppm: not found" in caught.value.messages[0]


@pytest.mark.parametrize("wrong", ["00002_img2.ppm", "00002_flow.flo"])
def test_files_of_another_size_than_frame_1_are_named(tmp_path, wrong):
  layouts.flying_chairs(tmp_path)
  write = layouts.flow if wrong.endswith(".flo") else layouts.image
  write(tmp_path / wrong, size=SIZE[::-1])
  fault = f"{wrong}: expected 6x4, the size of .*00002_img1.ppm, came 4x6"
  with pytest.raises(UserError, match=fault):
    _chairs(tmp_path)[1]


@pytest.mark.parametrize(
    "name, first",
    [
        ("sintel_clean", "alley_1_0001"),
        ("sintel_final", "alley_1_0001"),
        ("flying_chairs", "00001"),
        ("middlebury", "Dimetrodon"),
    ],
)
def test_real_samples_warp_frame_2_onto_frame_1(shared_data, name, first):
  flow_set = {
      "sintel_clean": lambda: flow_sets.sintel(shared_data, "clean"),
      "sintel_final": lambda: flow_sets.sintel(shared_data, "final"),
      "flying_chairs": lambda: _chairs(shared_data),
      "middlebury": lambda: flow_sets.middlebury(shared_data),
  }[name]()
  assert len(flow_set) == 4
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
  assert better == 4


def test_a_kitti_sample_comes_through_the_set(shared_data, tmp_path):
  truth = shared_data / "kitti/devkit2015/flow_gt.png"
  for kind in ("flow_occ", "flow_noc"):
    path = tmp_path / "training" / kind / "000000_10.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(truth.read_bytes())
  for frame in (10, 11):
    name = f"training/image_2/000000_{frame}.png"
    layouts.image(tmp_path / name, size=(375, 1242))
  (pair,) = flow_sets.kitti(tmp_path, "2015")
  flow, valid = flow_files.read_kitti_flow(truth)
  np.testing.assert_array_equal(pair["flow"], flow)
  np.testing.assert_array_equal(pair["visible"], valid)
