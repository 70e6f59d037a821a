"""Features of labelled sets, beside those of random-init and pixels.

A `FeatureSet` holds what describes each image, by suffix: "" the encoder's
features, "random_init" those of the same encoder untrained, "pixels", and where
the set knows them the mean "color" and the "position".
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from jaxtyping import Float, Integer
import numpy as np
import tqdm

from mcjepa_jax.data.pipeline import geometry

# images u8 [n, h, w, 3] -> features [n, d]
Embedder = Callable[[np.ndarray], np.ndarray]

# Every content number is told of these.
TWINS = ("", "random_init", "pixels")
_CHUNK = 1024  # images held at once
_PIXEL_VALUES = 2**30  # of a part, 4 GB: larger sets have smaller pictures


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """The training or the test part of a set, as features."""

  features: dict[str, Float[np.ndarray, "n _"]]
  labels: Integer[np.ndarray, "n"]


def metric(name: str, suffix: str) -> str:
  """The key of a metric for the features of a suffix."""
  return f"{name}_{suffix}" if suffix else name


def extract(
    dataset: Any,
    embedders: dict[str, Embedder],
    *,
    size: int,
    name: str,
    progress: bool = True,
) -> FeatureSet:
  """The features of all images, at `size`; a few images are held at a time.

  Raw pixels are in [0, 1]; their mean is the caller's to remove. Sets of so
  many images that their pixels take more than 4 GB are described by smaller
  pictures.
  """
  count, side = len(dataset), size
  while count * side * side * 3 > _PIXEL_VALUES and side > 1:
    side //= 2
  found = {"pixels": np.empty((count, side * side * 3), np.float32)}
  labels = np.empty(count, np.int32)
  bar = tqdm.tqdm(total=count, desc=name, disable=not progress, leave=False)
  for start in range(0, count, _CHUNK):
    images = []
    rows = slice(start, min(start + _CHUNK, count))
    for i in range(rows.start, rows.stop):
      example = dataset[i]
      image = _sized(example["image"], size)
      labels[i] = example["label"]
      found["pixels"][i] = _sized(image, side).ravel() / np.float32(255)
      if "center" in example:
        place = np.append(example["center"], example["extent"])
        color = image.mean(axis=(0, 1)) / 255
        for key, value in (("color", color), ("position", place)):
          _put(found, key, count, i, value)
      images.append(image)
      bar.update()
    for suffix, embed in embedders.items():
      _put(found, suffix, count, rows, embed(np.stack(images)))
  bar.close()
  return FeatureSet(found, labels)


def _sized(image, size):
  if image.shape[:2] == (size, size):
    return image
  return geometry.center_resize(image, size)


def _put(found, key, count, rows, values):
  if key not in found:
    found[key] = np.empty((count, values.shape[-1]), values.dtype)
  found[key][rows] = values


def chance(test: FeatureSet) -> float:
  """The accuracy of a guess among the classes that come, in percent."""
  return 100 / int(np.count_nonzero(np.bincount(test.labels)))
