"""Flow of frames too large for one forward pass: overlapping tiles, blended."""

from collections.abc import Callable
import math

from jaxtyping import Float, UInt8
import numpy as np

# (frames u8 [2b, h, w, 3], interleaved) -> flow_12 [b, h, w, 2]
Predictor = Callable[[np.ndarray], np.ndarray]

_STEP = 64  # tiles' sides are multiples of it: no encoder here has more stride
_OVERLAP = 4  # neighbours share at least a quarter of a tile


def tile_size(height: int, width: int, max_pixels: int) -> tuple[int, int]:
  """(h, w) of a tile: the frame's shape, at most `max_pixels` pixels of it."""
  if height * width <= max_pixels:
    return height, width
  scale = math.sqrt(max_pixels / (height * width))
  rows = min(height, _whole(max(int(height * scale), min(height, _STEP))))
  # What a low or narrow frame leaves, its longer side may have.
  columns = min(width, _whole(max_pixels // rows))
  return min(height, _whole(max_pixels // columns)), columns


def _whole(side: int) -> int:
  return max(side // _STEP * _STEP, min(side, _STEP), 1)


def windows(length: int, tile: int) -> list[tuple[int, Float[np.ndarray, "t"]]]:
  """(start, weight of each of its pixels) of the tiles that cover a side.

  Weights rise and fall over the overlaps; those of a pixel add up to 1.
  """
  if tile >= length:
    return [(0, np.ones(length))]
  overlap = tile // _OVERLAP
  count = math.ceil((length - overlap) / (tile - overlap))
  starts = np.round(np.linspace(0, length - tile, count)).astype(int).tolist()
  ramp = np.minimum(np.arange(1, tile + 1), np.arange(tile, 0, -1))
  ramp = np.minimum(ramp / (overlap + 1), 1.0)
  total = np.zeros(length)
  for start in starts:
    total[start : start + tile] += ramp
  return [(start, ramp / total[start : start + tile]) for start in starts]


def predict(
    predictor: Predictor, frames: UInt8[np.ndarray, "n h w 3"], max_pixels: int
) -> Float[np.ndarray, "b _ _ 2"]:
  """The flow of interleaved frames, tile by tile where they are larger.

  Of both frames the same tile is seen: motion by more than a quarter of it can
  leave every tile that a pixel lies in. Memory beyond the flow is a tile's.
  """
  count, height, width, _ = frames.shape
  rows, columns = tile_size(height, width, max_pixels)
  if (rows, columns) == (height, width):
    return predictor(frames)
  flow = np.zeros((count // 2, height, width, 2), np.float32)
  for top, vertical in windows(height, rows):
    for left, horizontal in windows(width, columns):
      here = (slice(None), slice(top, top + rows), slice(left, left + columns))
      weight = (vertical[:, None] * horizontal).astype(np.float32)
      flow[here] += weight[..., None] * predictor(frames[here])
  return flow
