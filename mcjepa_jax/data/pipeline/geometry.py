"""Geometric augmentation in the data workers: uint8 in, uint8 out.

A crop that needs no resampling is a view of its frame: the batch is the copy.

Everything is resampled at most once: a short filter, then OpenCV's bicubic,
which together stand for Pillow's bicubic that widens with the reduction. A crop
is of whole source pixels, unless a pair is turned.
"""

import functools
import math
from typing import Any, NamedTuple

import cv2
from jaxtyping import Float32, Float64, UInt8
import numpy as np

from mcjepa_jax.errors import UserError

_TRIES = 10
# Correlation of a photograph's neighbouring pixels: at which frequencies the
# filter matters.
_CORRELATION = 0.95
_PHASES = 16  # places of an output pixel between two source pixels, in the fit
_STEPS = 16  # filters for each whole reduction
# What is reduced further aliases: the filter must not grow with a hostile image.
_MAX_REDUCTION = 32.0


def _cubic(x: Float64[np.ndarray, "*n"], a: float) -> Float64[np.ndarray, "*n"]:
  """Returns Keys's cubic kernel (1981): Pillow's a is -0.5, OpenCV's -0.75."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(1024)
def _taps(steps: int) -> Float32[np.ndarray, " t"]:
  """Returns the filter before a reduction by steps / _STEPS, at least 1.

  With OpenCV's kernel after it, it is the nearest to Pillow's kernel of that
  width in the squared difference of resized photographs.
  """
  factor = steps / _STEPS
  # Pillow's kernel reaches 2 * factor pixels, and next to nothing at its ends.
  half = max(3, math.ceil(factor) + 1)
  place = np.arange(-2 * half - 2, 2 * half + 3)
  blur = np.linalg.cholesky(_CORRELATION ** abs(place[:, None] - place)).T
  products, wanted = [], []
  for phase in (np.arange(_PHASES) + 0.5) / _PHASES - 0.5:
    shifted = [
        _cubic(place - phase - tap, -0.75) + _cubic(place - phase + tap, -0.75)
        for tap in range(half)
    ]
    # The central tap is what the others leave of a sum of 1.
    products.append(
        blur @ np.stack([s - shifted[0] for s in shifted[1:]], axis=1)
    )
    target = _cubic((place - phase) / factor, -0.5)
    wanted.append(blur @ (target / target.sum() - shifted[0] / 2))
  side = np.linalg.lstsq(np.concatenate(products), np.concatenate(wanted))[0]
  centre = 1 - 2 * side.sum()
  return np.concatenate([side[::-1], [centre], side]).astype(np.float32)


def _filtered(
    image: UInt8[np.ndarray, "h w 3"], factors: tuple[float, float]
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the image before its reduction by the factors (vertical, level)."""
  vertical, level = (
      _taps(round(_STEPS * min(max(f, 1.0), _MAX_REDUCTION))) for f in factors
  )
  return cv2.sepFilter2D(
      image, -1, level, vertical, borderType=cv2.BORDER_REPLICATE
  )


def resample(
    image: UInt8[np.ndarray, "h w 3"],
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    flip: bool = False,
) -> UInt8[np.ndarray, "r c 3"]:
  """Returns the box (top, left, height, width) at size (height, width)."""
  top, left, height, width = box
  # OpenCV sees no pixel beside a crop.
  image = image[top : top + height, left : left + width]
  if (height, width) != size:
    image = _filtered(image, (height / size[0], width / size[1]))
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)
  # 0.2 ms at 224x224 as a negative stride that is copied, 0.01 ms so.
  return cv2.flip(image, 1) if flip else image


def random_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
  """Returns a box (top, left, height, width) by torchvision's rule.

  Area U(scale) of the image, aspect width / height log-uniform in `ratio`; after
  ten boxes that do not fit, the largest centred one with an allowed aspect.
  """
  for _ in range(_TRIES):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w = round(math.sqrt(area * aspect))
    h = round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(height - h + 1))
      return top, int(rng.integers(width - w + 1)), h, w
  w = min(width, round(height * ratio[1]))
  h = min(height, round(width / ratio[0]))
  return (height - h) // 2, (width - w) // 2, h, w


def two_views(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> list[UInt8[np.ndarray, "s s 3"]]:
  """Returns two independent random boxes of the image, size x size.

  See random_box; with `flip` half of the views are mirrored.
  """
  views = []
  for _ in range(2):
    box = random_box(*image.shape[:2], rng, scale=scale, ratio=ratio)
    mirrored = flip and rng.random() < 0.5
    views.append(resample(image, box, (size, size), flip=mirrored))
  return views


def pair_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    scale: tuple[float, float] = (1.0, 1.0),
) -> tuple[int, int, int, int]:
  """Returns the box (top, left, height, width) that becomes a crop of `size`.

  The frame is resized by a factor, log-uniform in `scale`, before the crop; a
  factor at which the frame would not cover the crop is raised to the least
  that does, so a small frame is enlarged just enough.
  """
  factor = math.exp(rng.uniform(math.log(scale[0]), math.log(scale[1])))
  factor = max(factor, size[0] / height, size[1] / width)
  h = min(height, round(size[0] / factor))
  w = min(width, round(size[1] / factor))
  top = int(rng.integers(height - h + 1))
  return top, int(rng.integers(width - w + 1)), h, w


class PairGeometry(NamedTuple):
  """Where the pixels of a cut pair come from.

  maps[i] takes a pixel (x, y, 1) of the cut to the pixel (x, y) of the frame
  that comes out as frame i + 1: with `swap`, maps[0] leads into frame_2.
  """

  size: tuple[int, int]
  maps: Float64[np.ndarray, "2 2 3"]
  box: tuple[int, int, int, int] | None  # None where the cut is turned
  flip: bool
  swap: bool


def _affine(
    linear: Float64[np.ndarray, "2 2"],
    source: Float64[np.ndarray, " 2"],
    target: Float64[np.ndarray, " 2"],
) -> Float64[np.ndarray, "3 3"]:
  """Returns p -> target + linear (p - source), of homogeneous points."""
  matrix = np.eye(3)
  matrix[:2, :2] = linear
  matrix[:2, 2] = target - linear @ source
  return matrix


def _rotation(degrees: float) -> Float64[np.ndarray, "2 2"]:
  """Returns the rotation, clockwise as y points down."""
  angle = math.radians(degrees)
  return np.array(
      [
          [math.cos(angle), -math.sin(angle)],
          [math.sin(angle), math.cos(angle)],
      ]
  )


def _turned(
    height: int,
    width: int,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    rotation: tuple[float, float],
    relative_rotation: float,
    relative_scale: float,
    relative_shift: float,
) -> tuple[Float64[np.ndarray, "3 3"], Float64[np.ndarray, "3 3"]]:
  """Returns the maps of a cut of the box's size, turned, anywhere inside."""
  rows, columns = size
  centre = np.array([(columns - 1) / 2, (rows - 1) / 2])
  linear = _rotation(rng.uniform(*rotation)) @ np.diag(
      [box[3] / columns, box[2] / rows]
  )
  zoom = math.exp(rng.uniform(-1, 1) * math.log(relative_scale))
  turn = _rotation(rng.uniform(-relative_rotation, relative_rotation))
  shift = rng.uniform(-relative_shift, relative_shift, 2)
  # A point of the first cut lies at `moved` of it in the second.
  moved = _affine(zoom * turn, centre, centre + shift)
  back = np.linalg.inv(moved)
  corners = np.array(
      [[x, y, 1] for x in (-0.5, columns - 0.5) for y in (-0.5, rows - 0.5)]
  )
  reached = np.concatenate([corners, corners @ back.T])[:, :2] - centre
  reached = reached @ linear.T
  least, most = reached.min(axis=0), reached.max(axis=0)
  frame = np.array([width, height])
  shrink = min(1.0, *(frame / (most - least)))
  room = np.maximum(frame - shrink * (most - least), 0)
  place = rng.random(2) * room - 0.5 - shrink * least
  first = _affine(shrink * linear, centre, place)
  return first, first @ back


def pair_geometry(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    mode: str = "crop",
    scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = True,
    swap: bool = True,
    rotation: tuple[float, float] = (0.0, 0.0),
    relative_rotation: float = 0.0,
    relative_scale: float = 1.0,
    relative_shift: float = 0.0,
) -> PairGeometry:
  """Returns the geometry of a pair of frames of height x width.

  "crop" takes a random crop of `size` (height, width), see pair_box; "resize"
  takes the whole frame, for sets whose largest motion a crop would cut off.
  `flip` mirrors both frames, `swap` exchanges them, each with probability 1/2.

  `rotation` is the range of degrees by which the cut is turned in the frame.
  What stands still moves, from the first cut to the second, by a rotation in
  +-relative_rotation degrees about the centre, a scale log-uniform between
  1 / relative_scale and relative_scale, and a shift in +-relative_shift pixels
  along each axis. A cut that would leave the frame shrinks until it fits.

  Raises:
    UserError: the mode is neither.
  """
  if mode == "crop":
    box = pair_box(height, width, rng, size=size, scale=scale)
  elif mode == "resize":
    box = (0, 0, height, width)
  else:
    raise UserError(f'mode of a pair must be "crop" or "resize", got "{mode}"')
  mirrored = flip and rng.random() < 0.5
  swapped = swap and rng.random() < 0.5
  relative = (relative_rotation, relative_scale, relative_shift)
  if tuple(rotation) == (0, 0) and relative == (0, 1, 0):
    top, left, h, w = box
    corner = np.array([-0.5, -0.5])
    resized = np.diag([w / size[1], h / size[0]])
    first = second = _affine(resized, corner, corner + (left, top))
  else:
    first, second = _turned(
        height,
        width,
        box,
        size,
        rng,
        rotation=rotation,
        relative_rotation=relative_rotation,
        relative_scale=relative_scale,
        relative_shift=relative_shift,
    )
    box = None
  maps = np.stack([second, first] if swapped else [first, second])
  if mirrored:
    mirror = np.diag([-1.0, 1.0, 1.0])
    mirror[0, 2] = size[1] - 1
    maps = maps @ mirror
  return PairGeometry(size, maps[:, :2], box, mirrored, swapped)


def cut_pair(
    geometry: PairGeometry,
    frame_1: UInt8[np.ndarray, "h w 3"],
    frame_2: UInt8[np.ndarray, "h w 3"],
) -> list[UInt8[np.ndarray, "r c 3"]]:
  """Returns both frames under the geometry, the swapped one first."""
  frames = (frame_2, frame_1) if geometry.swap else (frame_1, frame_2)
  if geometry.box is not None:
    return [
        resample(f, geometry.box, geometry.size, flip=geometry.flip)
        for f in frames
    ]
  return [
      cv2.warpAffine(
          _filtered(frame, tuple(np.hypot(*matrix[::-1, :2].T))),
          matrix,
          geometry.size[::-1],
          flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
          borderMode=cv2.BORDER_REPLICATE,
      )
      for frame, matrix in zip(frames, geometry.maps, strict=True)
  ]


def _bilinear(
    values: Float32[np.ndarray, "h w k"], points: Float64[np.ndarray, "r c 2"]
) -> Float64[np.ndarray, "r c k"]:
  """Returns the values at points (x, y); outside, those of the border.

  OpenCV's remap rounds the points to 1/32 pixel.
  """
  height, width = values.shape[:2]
  x = np.clip(points[..., :1], 0, width - 1)
  y = np.clip(points[..., 1:], 0, height - 1)
  left, top = np.floor(x).astype(int), np.floor(y).astype(int)
  x, y = x - left, y - top
  left, top = left[..., 0], top[..., 0]
  right = np.minimum(left + 1, width - 1)
  low = np.minimum(top + 1, height - 1)
  above = values[top, left] * (1 - x) + values[top, right] * x
  below = values[low, left] * (1 - x) + values[low, right] * x
  return above * (1 - y) + below * y


def cut_flow(
    geometry: PairGeometry,
    flow: Float32[np.ndarray, "h w 2"],
    valid: Float32[np.ndarray, "h w 1"],
) -> tuple[Float32[np.ndarray, "r c 2"], Float32[np.ndarray, "r c 1"]]:
  """Returns (flow, valid) of the cut pair, from those of the frames.

  Exact where the flow is linear between pixels: p -> A_2^-1(q + flow(q)) - p
  with q = A_1 p and A the maps. Valid where every pixel that q lies between is.
  With `geometry.swap` the flow of the frames is that from frame_2 to frame_1.
  """
  rows, columns = geometry.size
  first, second = geometry.maps
  x, y = np.meshgrid(np.arange(columns), np.arange(rows))
  pixels = np.stack([x, y], axis=-1).astype(np.float64)
  points = pixels @ first[:, :2].T + first[:, 2]
  there = points + _bilinear(flow, points)
  back = np.linalg.inv(second[:, :2])
  cut = (there - second[:, 2]) @ back.T - pixels
  # Not 1: a point that is a pixel's centre may be 1e-13 beside it.
  known = _bilinear(valid, points) > 1 - 1e-6
  return np.where(known, cut, 0).astype(np.float32), known.astype(np.float32)


def pair_frames(
    frame_1: UInt8[np.ndarray, "h1 w1 3"],
    frame_2: UInt8[np.ndarray, "h2 w2 3"],
    rng: np.random.Generator,
    **options: Any,
) -> list[UInt8[np.ndarray, "r c 3"]]:
  """Returns both frames under one random geometry; options of pair_geometry.

  Raises:
    UserError: the frames differ in size, or the mode is none.
  """
  if frame_1.shape != frame_2.shape:
    raise UserError(
        "the frames of a pair must have one size, got "
        f"{frame_1.shape[0]}x{frame_1.shape[1]} and "
        f"{frame_2.shape[0]}x{frame_2.shape[1]} (height x width)"
    )
  geometry = pair_geometry(*frame_1.shape[:2], rng, **options)
  return cut_pair(geometry, frame_1, frame_2)


def center_resize(
    image: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "s s 3"]:
  """Returns the central square of the image, size x size, for evaluation."""
  height, width = image.shape[:2]
  side = min(height, width)
  box = ((height - side) // 2, (width - side) // 2, side, side)
  return resample(image, box, (size, size))
