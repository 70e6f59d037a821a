"""Crops of images together with their label maps: uint8 in, uint8 out.

The published recipes (github.com/open-mmlab/mmsegmentation,
configs/_base_/datasets) resize an image into a box, `short_side` x 4 short
sides, times a random factor in training, cut a square, and flip it; padding is
void. What is left out is their photometric distortion.
"""

import math

import cv2
from jaxtyping import UInt8
import numpy as np

# In place of a class number: no class is given, or none counts.
VOID = 255

# ImageNet's mean: nothing, once the encoder has normalised it.
_PADDING = (124, 116, 104)
_LONGEST = 4  # short sides
_TRIES = 10


def fitted(
    image: UInt8[np.ndarray, "h w 3"], short_side: int
) -> UInt8[np.ndarray, "r c 3"]:
  """Returns the image at its size for tests, `fitted_size`."""
  size = fitted_size(image.shape[:2], short_side)
  if size == image.shape[:2]:
    return image
  return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def fitted_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
  """Returns (h, w) as tests have it; a short side of 0 leaves it as it is."""
  return _fitted_size(size, short_side) if short_side else size


def most_pixels(short_side: int) -> int | float:
  """Returns how many pixels an image of any size has at its size for tests."""
  return _LONGEST * short_side**2 if short_side else math.inf


def _fitted_size(
    size: tuple[int, int], short_side: int, factor: float = 1.0
) -> tuple[int, int]:
  factor *= min(short_side / min(size), _LONGEST * short_side / max(size))
  return tuple(max(1, round(side * factor)) for side in size)


def padded(
    image: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "r c 3"]:
  """Returns the image, grown at the bottom and the right to size x size."""
  return _grown(image, size, _PADDING)


def _grown(array, size, value):
  bottom, right = (max(size - side, 0) for side in array.shape[:2])
  if not (bottom or right):
    return array
  return cv2.copyMakeBorder(
      array, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=value
  )


def random_crop(
    image: UInt8[np.ndarray, "h w 3"],
    labels: UInt8[np.ndarray, "h w"],
    rng: np.random.Generator,
    *,
    size: int,
    short_side: int,
    scale: tuple[float, float],
    max_share: float,
) -> list[UInt8[np.ndarray, "size size 4"]]:
  """Returns one crop: its channels are RGB and, last, the labels.

  Of ten places the first is taken in which no class has more than `max_share`
  of the labelled pixels; the last, if none is so.
  """
  factor = rng.uniform(*scale)
  # Images as they are (0) are scaled by the factor alone.
  short_side = short_side or min(image.shape[:2])
  new = _fitted_size(image.shape[:2], short_side, factor)[::-1]
  image = cv2.resize(image, new, interpolation=cv2.INTER_LINEAR)
  # INTER_NEAREST would shift the labels by half a pixel.
  labels = cv2.resize(labels, new, interpolation=cv2.INTER_NEAREST_EXACT)
  image, labels = padded(image, size), _grown(labels, size, VOID)
  for _ in range(_TRIES):
    top, left = (int(rng.integers(s - size + 1)) for s in labels.shape)
    cut = np.s_[top : top + size, left : left + size]
    counts = np.bincount(labels[cut].ravel(), minlength=256)[:VOID]
    if counts.max() <= max_share * counts.sum() and counts.sum():
      break
  crop = np.dstack([image[cut], labels[cut]])
  return [cv2.flip(crop, 1) if rng.random() < 0.5 else crop]
