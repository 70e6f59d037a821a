"""Measures of masks, as github.com/davisvideochallenge/davis2017-evaluation.

J and F are between 0 and 1; two empty masks agree.
"""

import math
from typing import NamedTuple

import cv2
from jaxtyping import Bool, Float
import numpy as np


def region_similarity(
    mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]
) -> float:
  """J: the intersection over the union."""
  union = np.count_nonzero(mask | truth)
  return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
  """True where the pixel to the right, below or right below differs."""
  padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
  right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
  return (mask != right) | (mask != below) | (mask != both)


def boundary_accuracy(
    mask: Bool[np.ndarray, "h w"],
    truth: Bool[np.ndarray, "h w"],
    *,
    tolerance: float = 0.008,
) -> float:
  """F: the harmonic mean of the boundary's precision and recall.

  A pixel of a boundary is right within `tolerance` of the image's diagonal,
  rounded up to pixels, of the other boundary.
  """
  radius = math.ceil(tolerance * math.hypot(*mask.shape))
  ours, theirs = boundary(mask), boundary(truth)
  counts = np.count_nonzero(ours), np.count_nonzero(theirs)
  if not all(counts):
    return float(counts[0] == counts[1])
  precision = np.count_nonzero(ours & _dilated(theirs, radius)) / counts[0]
  recall = np.count_nonzero(theirs & _dilated(ours, radius)) / counts[1]
  total = precision + recall
  return 2 * precision * recall / total if total else 0.0


def _dilated(x: Bool[np.ndarray, "h w"], radius: int) -> np.ndarray:
  """True within a disk of the radius around what is True."""
  side = np.arange(-radius, radius + 1) ** 2
  disk = side[:, None] + side <= radius**2
  return cv2.dilate(x.astype(np.uint8), disk.astype(np.uint8)) > 0


class Statistics(NamedTuple):
  """What an object's values over the frames come to."""

  mean: float
  recall: float  # share of frames above 0.5
  decay: float  # mean of the first quarter of the frames less the last's


def statistics(values: Float[np.ndarray, " t"]) -> Statistics:
  """The statistics of one object; quarters share the frames between them."""
  ends = np.linspace(1, len(values), 5)
  # A half is rounded up.
  ends = np.round(ends + 1e-10).astype(int) - 1
  first, last = values[: ends[1] + 1], values[ends[3] :]
  return Statistics(
      float(np.mean(values)),
      float(np.mean(values > 0.5)),
      float(np.mean(first) - np.mean(last)),
  )
