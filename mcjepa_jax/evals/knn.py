"""k nearest neighbours of frozen features: `knn/SET`."""

from jaxtyping import Float, Integer
import numpy as np
import tqdm

from mcjepa_jax.evals import frozen_features

_SIMILARITIES = 2**27  # held at once, 0.5 GB
_MANY = 200  # neighbours of top1_k200


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


def run(
    name: str,
    bank: frozen_features.FeatureSet,
    queries: frozen_features.FeatureSet,
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
        ks=(k, *many) if suffix in frozen_features.TWINS else (k,),
        name=f"knn/{name}",
        progress=progress,
    )
    keys = ("top1", f"top1_k{_MANY}")
    for key, accuracy in zip(keys, accuracies, strict=False):
      result[f"knn/{name}/{frozen_features.metric(key, suffix)}"] = accuracy
  result[f"knn/{name}/chance"] = frozen_features.chance(queries)
  result[f"knn/{name}/count"] = len(queries.labels)
  return result


def _order(suffix):
  return (*frozen_features.TWINS, "color", "position").index(suffix)
