"""The metrics of flow on a set: classes of pixels, tiles, what is refused."""

import h5py
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.data.sets import flow_pairs
from mcjepa_jax.evals import flow
from tests.helpers import arrays, layouts

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


def test_a_pair_above_the_limit_is_evaluated_by_tiles():
  frames = arrays.noise_frames(80, 120)
  pair = dict(
      flow=arrays.local_flow(frames)[0] + _OFF,
      frame_1=frames[0],
      frame_2=frames[1],
  )
  largest = []

  def predict(part):
    largest.append(part[0, ..., 0].size)
    return arrays.local_flow(part)

  result = _run(_Pairs(pair), predict, max_pixels=4096)
  assert result["epe"] == pytest.approx(5, abs=1e-4)
  assert max(largest) <= 4096


def test_a_pair_without_a_valid_pixel_is_named(capsys):
  lost = dict(flow=_flow(1, 1), valid=np.zeros((2, 8, 1), np.float32))
  _run(_Pairs(dict(flow=_flow(1, 1)), lost))
  assert "flow/set: pair_1 has no valid pixel" in capsys.readouterr().out


def test_every_metric_has_its_key_and_no_other():
  frames = arrays.noise_frames(24, 40)
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


class _OffsetPairs:
  """Two shapes; the last pair of the first shape makes an odd batch."""

  shapes = ((32, 48),) * 3 + ((40, 32),)

  def __len__(self):
    return len(self.shapes)

  def record_id(self, i):
    return f"pair_{i}"

  def __getitem__(self, i):
    h, w = self.shapes[i]
    rng = np.random.default_rng(i)
    valid = np.ones((h, w, 1), np.float32)
    valid[: h // 2] = i != 2
    return {
        "frame_1": rng.integers(0, 256, (h, w, 3), np.uint8),
        "frame_2": rng.integers(0, 256, (h, w, 3), np.uint8),
        "flow": np.full((h, w, 2), (3.0, -4.0), np.float32) * (i + 1),
        "valid": valid,
    }


def _truth_plus(offset):
  """A predictor that is off by `offset`, and counts what it is asked."""
  asked = []

  def predict(frames):
    asked.append(len(frames) // 2)
    count = sum(asked[:-1])
    return np.stack(
        [
            _OffsetPairs()[min(count + i, 3)]["flow"]
            + np.array(offset, np.float32)
            for i in range(len(frames) // 2)
        ]
    )

  return predict, asked


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_pair_counts_once_whatever_the_batch(batch_size):
  predict, asked = _truth_plus((3.0, 4.0))
  result = flow.run(
      "set", _OffsetPairs(), {"": predict}, batch_size=batch_size,
      classical=False, progress=False,
  )  # fmt: skip
  # The last batch comes once more where none could be timed.
  assert sum(asked) == 4 + (batch_size > 1)
  assert result["flow/set/count"] == 4
  np.testing.assert_allclose(result["flow/set/epe"], 5.0, rtol=1e-6)
  np.testing.assert_allclose(result["flow/set/fl_all"], 100.0)
  # |truth| is 5, 10, 15, 20: the mean over images.
  np.testing.assert_allclose(result["flow/set/epe_zero"], 12.5, rtol=1e-6)
  np.testing.assert_allclose(
      result["flow/set/epe_pair_constant"], 0.0, atol=1e-4
  )
  assert 4.9 < result["flow/set/epe_constant"] < 5.1
  np.testing.assert_allclose(result["flow/set/pair_3/epe_zero"], 20.0)


def test_a_batch_has_one_shape_and_a_limit_of_pixels():
  groups = flow.batches(_OffsetPairs(), batch_size=8, max_pixels=2 * 32 * 48)
  assert [len(g) for g in groups] == [2, 1, 1]


def _mixed(*sides):
  """Squares of these sides, named by their number."""
  return [
      {"frame_1": np.zeros((side, side, 3), np.uint8), "number": i}
      for i, side in enumerate(sides)
  ]


class _Named(list):
  """Examples with record ids, and how many were read."""

  read = 0

  def record_id(self, i):
    return str(i)

  def __getitem__(self, i):
    self.read += 1
    return super().__getitem__(i)


def test_shapes_that_alternate_fill_batches_of_their_own():
  mixed = _Named(_mixed(4, 6, 4, 6, 4, 6, 6))
  groups = flow.batches(mixed, batch_size=3, max_pixels=1000)
  numbers = [[x["number"] for x in group] for group in groups]
  assert numbers == [[0, 2, 4], [1, 3, 5], [6]]


def test_batches_that_wait_are_given_up_before_memory_fills():
  # Every side another one: 4 * 100 pixels may wait.
  mixed, behind = _Named(_mixed(*range(9, 60))), []
  for number, _ in enumerate(flow.batches(mixed, batch_size=8, max_pixels=100)):
    behind.append(mixed.read - number)
  assert len(behind) == 51 and max(behind) <= 6


def test_classical_flows_find_a_translation():
  wide = np.random.default_rng(0).random((80, 112, 3))
  wide = (wide + np.roll(wide, 1, 0) + np.roll(wide, 1, 1)) / 3
  wide = np.kron(wide, np.ones((2, 2, 1)))
  wide = (255 * wide).astype(np.uint8)
  frame_1, frame_2 = wide[20:140, 20:180], wide[18:138, 16:176]
  for method in (flow.farneback, flow.dis):
    middle = method(frame_1, frame_2)[40:80, 40:120]
    np.testing.assert_allclose(np.median(middle, axis=(0, 1)), (4, 2), atol=0.3)
