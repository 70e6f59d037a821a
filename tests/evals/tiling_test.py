import numpy as np
import pytest

from mcjepa_jax.evals import flow


class _Pairs:
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
            _Pairs()[min(count + i, 3)]["flow"] + np.array(offset, np.float32)
            for i in range(len(frames) // 2)
        ]
    )

  return predict, asked


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_pair_counts_once_whatever_the_batch(batch_size):
  predict, asked = _truth_plus((3.0, 4.0))
  result = flow.run(
      "set", _Pairs(), {"": predict}, batch_size=batch_size,
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
  groups = flow.batches(_Pairs(), batch_size=8, max_pixels=2 * 32 * 48)
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
