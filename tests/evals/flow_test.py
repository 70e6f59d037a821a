"""The metrics of flow on a set: classes of pixels, tiles, what is refused."""

import h5py
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.data.sets import flow_pairs
from mcjepa_jax.evals import flow, tiling
from tests.helpers import layouts

_OFF = np.array((3.0, 4.0), np.float32)


class _Pairs:
  """Pairs of a true flow and what else describes them."""

  def __init__(self, *examples):
    self._examples = examples

  def __len__(self):
    return len(self._examples)

  def record_id(self, i):
    return f"pair_{i}"

  def __getitem__(self, i):
    example = dict(self._examples[i])
    height, width = example["flow"].shape[:2]
    for key in ("frame_1", "frame_2"):
      example.setdefault(key, np.zeros((height, width, 3), np.uint8))
    example.setdefault("valid", np.ones((height, width, 1), np.float32))
    return example


def _flow(*speeds, width=8):
  """A row of so many pixels for each speed, moving left and right in turn."""
  result = np.zeros((len(speeds), width, 2), np.float32)
  result[..., 0] = np.array(speeds)[:, None]
  return result


def _run(pairs, predict=None, **options):
  def truth_and(frames):
    index = range(len(frames) // 2)
    return np.stack([np.nan_to_num(pairs[i]["flow"]) + _OFF for i in index])

  options = dict(batch_size=8, classical=False, progress=False) | options
  result = flow.run("set", pairs, {"": predict or truth_and}, **options)
  return {k.removeprefix("flow/set/"): v for k, v in result.items()}


def test_speed_classes_are_means_over_the_pixels_of_the_set():
  # Errors are 1, 2 and 6 px; 10 and 40 px belong to the middle.
  pairs = _Pairs(dict(flow=_flow(9, 10)), dict(flow=_flow(40, 41)))
  guess = np.stack([_flow(10, 12), _flow(46, 43)])
  result = _run(pairs, lambda frames: guess[: len(frames) // 2])
  assert result["epe_s0_10"] == pytest.approx(1)
  assert result["epe_s10_40"] == pytest.approx((2 + 6) / 2)
  assert result["epe_s40"] == pytest.approx(2)
  assert result["epe"] == pytest.approx((1.5 + 4) / 2)
  # An error of one pixel is not above one.
  assert result["px1"] == pytest.approx(75)


def test_classes_without_a_pixel_have_no_key_and_nothing_is_nan():
  result = _run(_Pairs(dict(flow=_flow(1, 1))))
  for absent in ("epe_s10_40", "epe_s40", "epe_occ", "epe_noc"):
    assert absent not in result
  assert np.isfinite(list(result.values())).all()


def test_what_is_hidden_or_leaves_the_frame_is_occluded():
  visible = np.ones((3, 8, 1), np.float32)
  visible[0] = 0
  # Row 1 stays, of row 2 the last two of eight pixels leave.
  truth = _flow(0, 0, 2)
  guess = truth.copy()
  guess[0, :, 0] += 4
  guess[2, 6:, 0] += 8
  guess[1:, :6, 1] += 1
  guess[1, 6:, 1] += 1
  result = _run(
      _Pairs(dict(flow=truth, visible=visible)), lambda frames: guess[None]
  )
  assert result["epe_noc"] == pytest.approx(1)
  assert result["epe_occ"] == pytest.approx((8 * 4 + 2 * 8) / 10)


@pytest.fixture
def spring(tmp_path):
  """A pair of 2x2 pixels, each with its own four true vectors."""
  pixels = (
      [(0, 0), (100, 0), (0, 30), (30, 40)],
      [(1, 0), (2, 0), (3, 0), (4, 0)],
      [(5, 0), (5, 0), (5, 0), (np.nan, 0)],
      [(50, 0), (0, 0), (0, 10), (6, 8)],
  )
  with h5py.File(tmp_path / "flow.flo5", "w") as store:
    blocks = np.reshape(pixels, (2, 2, 2, 2, 2)).swapaxes(1, 2)
    store["flow"] = blocks.reshape(4, 4, 2).astype(np.float32)
  layouts.image(tmp_path / "frame.png", size=(2, 2))
  # The right column has no match. Left below (5, 0) leaves the frame.
  layouts.mask(tmp_path / "match.png", 1, size=(2, 2), colour=(0, 255, 0))
  pair = flow_pairs.FlowPair(
      name="pair",
      frame_1=tmp_path / "frame.png",
      frame_2=tmp_path / "frame.png",
      flow=tmp_path / "flow.flo5",
      occlusions=tmp_path / "match.png",
      flow_scale=2,
  )
  return flow_pairs.FlowSet([pair])


def test_spring_is_held_against_all_four_truths_of_a_pixel(spring, monkeypatch):
  guess = np.array([[(0, 34.5), (3, 0.5)], [(99, 99), (0, 6)]], np.float32)
  monkeypatch.setattr(flow, "_CLASSICAL_SIDE", 2)
  monkeypatch.setattr(flow, "dis", lambda frame_1, frame_2: guess)
  result = _run(spring, lambda frames: guess[None], classical=True)
  # By hand: off by 4.5 of (0, 30), by 0.5 of (3, 0), by 4 of (0, 10).
  wanted = {
      "epe": (4.5 + 0.5 + 4) / 3,
      "px1": 200 / 3,
      # 4.5 is less than 5 % of 100, 4 is more than 5 % of 50.
      "fl_all": 100 / 3,
      # Mean lengths are 45, 2.5 and 17.5.
      "epe_s40": 4.5,
      "epe_s0_10": 0.5,
      "epe_s10_40": 4,
      "epe_noc": 4.5,
      "epe_occ": (0.5 + 4) / 2,
      "epe_zero": (0 + 1 + 0) / 3,
      # The median of the upper left ones is (1, 0).
      "epe_constant": (1 + 0 + 1) / 3,
      "epe_pair_constant": (1 + 0 + 1) / 3,
      "epe_dis": 3,
  }
  assert {k: result[k] for k in wanted} == pytest.approx(wanted, abs=1e-4)


def test_what_leaves_the_frame_is_in_the_match_map_of_spring(spring):
  example = spring[0]
  assert example["flow"][1, 0].tolist() == [5, 0]
  assert flow.seen_in_both(example).tolist() == [[True, False]] * 2


def test_a_pair_without_a_valid_pixel_is_told_and_counts_nowhere():
  lost = dict(flow=np.full((2, 8, 2), np.nan, np.float32))
  lost["valid"] = np.zeros((2, 8, 1), np.float32)
  result = _run(_Pairs(lost, dict(flow=_flow(1, 1))))
  assert result["count"] == 2 and result["count_all_invalid"] == 1
  assert result["epe"] == pytest.approx(5)
  assert not [key for key in result if key.startswith("pair_0/")]
  assert np.isfinite(list(result.values())).all()
  with pytest.raises(errors.UserError, match="flow/set: expected a valid"):
    _run(_Pairs(lost))


def test_flow_of_another_size_or_not_finite_is_refused_by_its_record():
  pairs = _Pairs(dict(flow=_flow(1, 1)), dict(flow=_flow(1, 1)))
  with pytest.raises(errors.UserError, match=r"pair_0: .*\(2, 2, 8, 2\), came"):
    _run(pairs, lambda frames: np.zeros((2, 2, 7, 2)))
  broken = np.zeros((2, 2, 8, 2), np.float32)
  broken[1, 0, 0] = np.nan
  with pytest.raises(errors.UserError, match="pair_1: expected finite"):
    _run(pairs, lambda frames: broken)


def test_truth_of_another_size_than_its_frames_is_refused():
  frame = np.zeros((4, 8, 3), np.uint8)
  pairs = _Pairs(dict(flow=_flow(1, 1), frame_1=frame, frame_2=frame))
  with pytest.raises(errors.UserError, match="pair_0: .*8x4.*came 8x2"):
    _run(pairs, lambda frames: np.zeros((1, 4, 8, 2), np.float32))


@pytest.mark.parametrize("pairs, expected", [(6, 1.0), (2, 1.0)])
def test_seconds_are_of_calls_that_do_not_compile(monkeypatch, pairs, expected):
  clock, shapes = [0.0], set()
  monkeypatch.setattr(flow.time, "perf_counter", lambda: clock[0])

  def predict(frames):
    clock[0] += len(frames) / 2 if frames.shape in shapes else 1000
    shapes.add(frames.shape)
    return np.zeros((len(frames) // 2, 2, 8, 2), np.float32)

  result = _run(
      _Pairs(*[dict(flow=_flow(1, 1))] * pairs), predict, batch_size=2
  )
  assert result["seconds_per_pair"] == pytest.approx(expected)


def _local(frames):
  """Flow that a pixel's own colours decide."""
  first, second = frames[0::2].astype(np.float32), frames[1::2]
  return (first - second)[..., :2] / 16


def _noise(height, width, count=2):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize(
    "size, max_pixels",
    [((200, 150), 64 * 64), ((7, 900), 500), ((131, 64), 5000), ((9, 9), 40)],
)
def test_tiles_give_what_the_whole_frame_gives_where_flow_is_local(
    size, max_pixels
):
  frames, seen = _noise(*size, count=4), []

  def predict(part):
    seen.append(part.shape[1] * part.shape[2])
    return _local(part)

  tiled = tiling.predict(predict, frames, max_pixels)
  np.testing.assert_allclose(tiled, _local(frames), atol=1e-5)
  assert len(seen) > 1
  assert max(seen) <= max_pixels


def test_a_frame_that_is_small_enough_is_not_cut():
  calls = []
  frames = _noise(64, 64)
  tiling.predict(lambda x: calls.append(x.shape) or _local(x), frames, 4096)
  assert calls == [frames.shape]


@pytest.mark.parametrize("length, tile", [(100, 64), (65, 64), (1000, 128), (9, 1)])  # fmt: skip
def test_weights_of_each_pixel_add_up_to_1_and_overlaps_are_smooth(
    length, tile
):
  total = np.zeros(length)
  ends = []
  for start, weight in tiling.windows(length, tile):
    assert (weight > 0).all()
    total[start : start + tile] += weight
    ends.append((start, start + tile))
  np.testing.assert_allclose(total, 1, rtol=1e-12)
  overlaps = [a[1] - b[0] for a, b in zip(ends[:-1], ends[1:], strict=True)]
  assert all(overlap >= tile // 4 for overlap in overlaps)


def test_a_pair_above_the_limit_is_evaluated_by_tiles():
  frames = _noise(80, 120)
  pair = dict(
      flow=_local(frames)[0] + _OFF, frame_1=frames[0], frame_2=frames[1]
  )
  largest = []

  def predict(part):
    largest.append(part[0, ..., 0].size)
    return _local(part)

  result = _run(_Pairs(pair), predict, max_pixels=4096)
  assert result["epe"] == pytest.approx(5, abs=1e-4)
  assert max(largest) <= 4096


def test_a_pair_without_a_valid_pixel_is_named(capsys):
  lost = dict(flow=_flow(1, 1), valid=np.zeros((2, 8, 1), np.float32))
  _run(_Pairs(dict(flow=_flow(1, 1)), lost))
  assert "flow/set: pair_1 has no valid pixel" in capsys.readouterr().out


def test_every_metric_has_its_key_and_no_other():
  frames = _noise(24, 40)
  truth = _flow(*[5] * 8, *[20] * 8, *[50] * 8, width=40)
  visible = np.ones((24, 40, 1), np.float32)
  visible[:12] = 0
  pair = dict(flow=truth, visible=visible, frame_1=frames[0], frame_2=frames[1])
  pairs = _Pairs(pair, pair)

  def predict(frames):
    return np.stack([truth] * (len(frames) // 2))

  result = flow.run(
      "set", pairs, {"": predict, "random_init": predict}, progress=False
  )
  metrics = {
      *("epe", "epe_random_init", "epe_zero", "epe_constant"),
      *("epe_pair_constant", "epe_farneback", "epe_dis"),
      *("epe_occ", "epe_noc", "epe_s0_10", "epe_s10_40", "epe_s40"),
      *("fl_all", "px1", "seconds_per_pair", "count"),
  }
  rows = {key for key in result if key.startswith("flow/set/pair_")}
  assert set(result) - rows == {f"flow/set/{metric}" for metric in metrics}
  assert rows == {
      f"flow/set/pair_{i}/{metric}"
      for i in (0, 1)
      for metric in metrics
      if metric in ("epe", "epe_random_init", "epe_farneback", "epe_dis")
      or metric in ("epe_zero", "epe_constant", "epe_pair_constant")
  }


def test_frames_too_low_for_the_classical_methods_are_left_to_ours():
  result = _run(_Pairs(dict(flow=_flow(1, 1))), classical=True)
  assert "epe_dis" not in result and result["epe"] == pytest.approx(5)
