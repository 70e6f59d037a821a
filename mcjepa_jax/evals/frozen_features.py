"""kNN and effective rank of frozen features, beside random-init and pixels.

A `Part` of a set holds what describes each image, by suffix: "" the encoder's
features, "random_init" those of the same encoder untrained, "pixels", and where
the set knows them the mean "color" and the "position".
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import cv2
from jaxtyping import Float, Integer
import numpy as np
import tqdm

from mcjepa_jax.data.pipeline import geometry
from mcjepa_jax.evals import metrics

# images u8 [n, h, w, 3] -> features [n, d]
Embedder = Callable[[np.ndarray], np.ndarray]

# Every content number is told of these.
TWINS = ("", "random_init", "pixels")
_CHUNK = 1024  # images held at once
_PIXEL_VALUES = 2**30  # of a part, 4 GB: larger sets have smaller pictures
_SIMILARITIES = 2**27  # held at once, 0.5 GB
_MANY = 200  # neighbours of top1_k200
_RANKED = 25_600  # images, as in arXiv 2210.02885
_RANKED_SIDE = 16  # of the pixels' twin: a rank of up to 768


@dataclasses.dataclass(frozen=True)
class Part:
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
) -> Part:
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
  return Part(found, labels)


def _sized(image, size):
  if image.shape[:2] == (size, size):
    return image
  return geometry.center_resize(image, size)


def _put(found, key, count, rows, values):
  if key not in found:
    found[key] = np.empty((count, values.shape[-1]), values.dtype)
  found[key][rows] = values


def knn_accuracy(
    bank: Float[np.ndarray, "n d"],
    bank_labels: Integer[np.ndarray, "n"],
    queries: Float[np.ndarray, "m d"],
    query_labels: Integer[np.ndarray, "m"],
    *,
    ks: tuple[int, ...] = (20,),
    temperature: float = 0.07,
    chunk: int = 1024,
    name: str = "",
    progress: bool = False,
) -> list[float]:
  """Top-1 of the weighted vote of the k nearest, in percent, for each k.

  Neighbours by cosine, each with the weight exp(cosine / temperature), as in
  DINO's evaluation (arXiv 2104.14294).
  """
  classes = int(max(bank_labels.max(), query_labels.max())) + 1
  bank, queries = _unit(bank), _unit(queries)
  chunk = max(1, min(chunk, _SIMILARITIES // len(bank)))
  correct = np.zeros(len(ks), int)
  starts = tqdm.tqdm(
      range(0, len(queries), chunk), name, disable=not progress, leave=False
  )
  for start in starts:
    similarity = queries[start : start + chunk] @ bank.T
    labels = query_labels[start : start + chunk]
    rows = np.arange(len(similarity))[:, None]
    for i, k in enumerate(ks):
      k = min(k, len(bank))
      nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
      weight = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
      votes = np.zeros((len(similarity), classes))
      np.add.at(votes, (rows, bank_labels[nearest]), weight)
      correct[i] += (votes.argmax(1) == labels).sum()
  return (100 * correct / len(queries)).tolist()


def _unit(x):
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def chance(test: Part) -> float:
  """The accuracy of a guess among the classes that come, in percent."""
  return 100 / int(np.count_nonzero(np.bincount(test.labels)))


def run(
    name: str,
    bank: Part,
    queries: Part,
    *,
    k: int = 20,
    progress: bool = True,
) -> dict[str, float]:
  """Top-1 in percent for each feature, keyed `knn/NAME/METRIC`.

  `top1` is of `k` neighbours, `top1_k200` of 200, where the bank has more.
  """
  result = {}
  many = (_MANY,) if len(bank.labels) > _MANY else ()
  for suffix in sorted(queries.features, key=_order):
    pair = bank.features[suffix], queries.features[suffix]
    if suffix not in ("", "random_init"):
      mean = pair[0].mean(axis=0)
      pair = pair[0] - mean, pair[1] - mean
    accuracies = knn_accuracy(
        *(pair[0], bank.labels, pair[1], queries.labels),
        ks=(k, *many) if suffix in TWINS else (k,),
        name=f"knn/{name}",
        progress=progress,
    )
    keys = ("top1", f"top1_k{_MANY}")
    for key, accuracy in zip(keys, accuracies, strict=False):
      result[f"knn/{name}/{metric(key, suffix)}"] = accuracy
  result[f"knn/{name}/chance"] = chance(queries)
  result[f"knn/{name}/count"] = len(queries.labels)
  return result


def _order(suffix):
  return (*TWINS, "color", "position").index(suffix)


def rank(name: str, part: Part) -> dict[str, float]:
  """RankMe of each feature, keyed `rankme/NAME/METRIC` (metrics.rank_me).

  Of up to 25,600 images, spread over the part; the pixels' is of pictures of
  16 x 16. A rank compares runs of one method, with as many features.
  """
  count = len(part.labels)
  rows = np.linspace(0, count - 1, min(count, _RANKED)).round().astype(int)
  result = {}
  for suffix in TWINS:
    if suffix in part.features:
      z = part.features[suffix][rows]
      z = _small(z) if suffix == "pixels" else z
      result[f"rankme/{name}/{metric('rank', suffix)}"] = metrics.rank_me(z)
  result[f"rankme/{name}/count"] = len(rows)
  return result


def _small(pixels: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n _"]:
  side = round((pixels.shape[1] / 3) ** 0.5)
  if side <= _RANKED_SIDE:
    return pixels
  images = pixels.reshape(-1, side, side, 3)
  size = (_RANKED_SIDE, _RANKED_SIDE)
  small = [cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in images]
  return np.stack(small).reshape(len(pixels), -1)
