"""Geometric augmentation in the data workers: uint8 in, uint8 out.

Everything is resampled at most once, by Pillow's bicubic filter, which widens
with the reduction (antialiased). Crops are whole source pixels.
"""

import math

from jaxtyping import UInt8
import numpy as np
from PIL import Image

from mcjepa_jax.errors import UserError

_TRIES = 10


def resample(
    image: UInt8[np.ndarray, "h w 3"],
    box: tuple[int, int, int, int],
    size: tuple[int, int],
) -> UInt8[np.ndarray, "r c 3"]:
  """Returns the box (top, left, height, width) at size (height, width)."""
  top, left, height, width = box
  image = image[top : top + height, left : left + width]
  if (height, width) == size:
    return image
  # Cropped first: Pillow's box= would read pixels beside the crop, and convert
  # the whole image.
  picture = Image.fromarray(np.ascontiguousarray(image))
  return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))


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


def random_resized_crop(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "s s 3"]:
  """Returns a random box of the image (see random_box), size x size."""
  box = random_box(*image.shape[:2], rng, scale=scale, ratio=ratio)
  return resample(image, box, (size, size))


def random_flip(
    image: UInt8[np.ndarray, "*n h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "*n h w 3"]:
  """Returns the image, or stack of images, mirrored with probability 1/2."""
  return image[..., ::-1, :] if rng.random() < 0.5 else image


def two_views(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> UInt8[np.ndarray, "2 s s 3"]:
  """Returns two independent random resized crops, mirrored or not."""
  views = []
  for _ in range(2):
    view = random_resized_crop(image, rng, size=size, scale=scale, ratio=ratio)
    views.append(random_flip(view, rng) if flip else view)
  return np.stack(views)


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


def pair_frames(
    frame_1: UInt8[np.ndarray, "h1 w1 3"],
    frame_2: UInt8[np.ndarray, "h2 w2 3"],
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    mode: str = "crop",
    scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = True,
    swap: bool = True,
) -> UInt8[np.ndarray, "2 r c 3"]:
  """Returns both frames under one geometry.

  `flip` mirrors both, `swap` exchanges them, each with probability 1/2.

  "crop" takes a random crop of `size` (height, width), see pair_box; "resize"
  takes the whole frame, for sets whose largest motion a crop would cut off.

  Raises:
    UserError: the frames differ in size, or the mode is neither.
  """
  if frame_1.shape != frame_2.shape:
    raise UserError(
        "the frames of a pair must have one size, got "
        f"{frame_1.shape[0]}x{frame_1.shape[1]} and "
        f"{frame_2.shape[0]}x{frame_2.shape[1]} (height x width)"
    )
  height, width = frame_1.shape[:2]
  if mode == "crop":
    box = pair_box(height, width, rng, size=size, scale=scale)
  elif mode == "resize":
    box = (0, 0, height, width)
  else:
    raise UserError(f'mode of a pair must be "crop" or "resize", got "{mode}"')
  frames = np.stack([resample(f, box, size) for f in (frame_1, frame_2)])
  if flip:
    frames = random_flip(frames, rng)
  if swap and rng.random() < 0.5:
    frames = frames[::-1]
  return np.ascontiguousarray(frames)


def center_resize(
    image: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "s s 3"]:
  """Returns the central square of the image, size x size, for evaluation."""
  height, width = image.shape[:2]
  side = min(height, width)
  box = ((height - side) // 2, (width - side) // 2, side, side)
  return resample(image, box, (size, size))
