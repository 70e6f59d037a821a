"""Flow by tiles, as of the whole frame."""

import numpy as np
import pytest

from mcjepa_jax.evals import tiling
from tests.helpers import arrays


@pytest.mark.parametrize(
    "size, max_pixels",
    [((200, 150), 64 * 64), ((7, 900), 500), ((131, 64), 5000), ((9, 9), 40)],
)
def test_tiles_give_what_the_whole_frame_gives_where_flow_is_local(
    size, max_pixels
):
  frames, seen = arrays.noise_frames(*size, count=4), []

  def predict(part):
    seen.append(part.shape[1] * part.shape[2])
    return arrays.local_flow(part)

  tiled = tiling.predict(predict, frames, max_pixels)
  np.testing.assert_allclose(tiled, arrays.local_flow(frames), atol=1e-5)
  assert len(seen) > 1
  assert max(seen) <= max_pixels


def test_a_frame_that_is_small_enough_is_not_cut():
  calls = []
  frames = arrays.noise_frames(64, 64)
  tiling.predict(
      lambda x: calls.append(x.shape) or arrays.local_flow(x), frames, 4096
  )
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
