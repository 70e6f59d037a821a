"""kNN on frozen features, beside random-init features and raw pixels."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Integer, UInt8
import numpy as np
import tqdm

from mcjepa_jax.data import transforms

# images u8 [n, h, w, 3] -> features [n, d]
Embedder = Callable[[np.ndarray], np.ndarray]


def knn_accuracy(
    bank: Float[np.ndarray, "n d"],
    bank_labels: Integer[np.ndarray, "n"],
    queries: Float[np.ndarray, "m d"],
    query_labels: Integer[np.ndarray, "m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
  """Top-1 of the weighted vote of the k nearest, in percent.

  Neighbours by cosine, each with the weight exp(cosine / temperature), as in
  DINO's evaluation (arXiv 2104.14294).
  """
  k = min(k, len(bank))
  classes = int(max(bank_labels.max(), query_labels.max())) + 1
  bank, queries = _unit(bank), _unit(queries)
  correct = 0
  for start in range(0, len(queries), chunk):
    similarity = queries[start : start + chunk] @ bank.T
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weight = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
    votes = np.zeros((len(similarity), classes))
    rows = np.arange(len(similarity))[:, None]
    np.add.at(votes, (rows, bank_labels[nearest]), weight)
    correct += int(
        (votes.argmax(1) == query_labels[start : start + chunk]).sum()
    )
  return 100 * correct / len(queries)


def _unit(x):
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def load(
    dataset: Any, indices: np.ndarray, *, size: int, name: str, progress: bool
) -> tuple[UInt8[np.ndarray, "n s s 3"], dict[str, np.ndarray]]:
  """The images at `indices`, resized to `size`, and all that describes them."""
  images, extras = [], {}
  indices = tqdm.tqdm(indices, desc=name, disable=not progress, leave=False)
  for i in indices:
    example = dataset[int(i)]
    image = example.pop("image")
    if image.shape[:2] != (size, size):
      image = transforms.center_resize(image, size)
    images.append(image)
    for key, value in example.items():
      extras.setdefault(key, []).append(value)
  return np.stack(images), {k: np.array(v) for k, v in extras.items()}


def pixels(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
  """Raw pixels as features, in [0, 1]; their mean is the caller's to remove."""
  return images.reshape(len(images), -1).astype(np.float32) / 255


def run(
    name: str,
    bank: tuple[UInt8[np.ndarray, "n h w 3"], dict[str, np.ndarray]],
    queries: tuple[UInt8[np.ndarray, "m h w 3"], dict[str, np.ndarray]],
    embedders: dict[str, Embedder],
    *,
    k: int = 20,
) -> dict[str, float]:
  """Top-1 in percent for each feature, keyed `knn/NAME/METRIC`.

  Args:
    name: of the set.
    bank: images and, as `label` and perhaps `center` and `extent`, what
      describes them.
    queries: likewise.
    embedders: suffix -> embedder: "" gives `top1`, "random_init" gives
      `top1_random_init`.
    k: neighbours.
  """
  (bank_images, bank_extras), (query_images, query_extras) = bank, queries
  labels = bank_extras["label"], query_extras["label"]

  features = {
      f"top1_{suffix}" if suffix else "top1": (embed(bank_images),
                                               embed(query_images))
      for suffix, embed in embedders.items()
  }  # fmt: skip
  features["top1_pixels"] = _centred(pixels(bank_images), pixels(query_images))
  if "center" in bank_extras:
    features["top1_color"] = _centred(
        *(x.mean(axis=(1, 2)) / 255 for x in (bank_images, query_images))
    )
    features["top1_position"] = _centred(
        *(
            np.concatenate([x["center"], x["extent"][:, None]], axis=1)
            for x in (bank_extras, query_extras)
        )
    )
  result = {
      f"knn/{name}/{metric}": knn_accuracy(a, labels[0], b, labels[1], k=k)
      for metric, (a, b) in features.items()
  }
  counts = np.bincount(labels[1])
  result[f"knn/{name}/chance"] = 100 / int(np.count_nonzero(counts))
  result[f"knn/{name}/count"] = len(query_images)
  return result


def _centred(bank, queries):
  mean = bank.mean(axis=0)
  return bank - mean, queries - mean
