"""kNN against scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mcjepa_jax.data.sets import synthetic
from mcjepa_jax.evals import frozen_features, knn


def test_knn_equals_scikit_learn():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 5, 300)
  x = rng.normal(size=(300, 8)) + 0.8 * np.eye(5, 8)[labels] * 3
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  bank, queries = x[:200], x[200:]
  ours, nearest = knn.knn_accuracy(
      bank, labels[:200], 7.0 * queries, labels[200:], ks=(20, 1), chunk=33
  )
  # Cosine distance is 1 - cosine: weights exp((1 - d) / t).
  peer = KNeighborsClassifier(
      20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
  )
  peer.fit(bank, labels[:200])
  # The very labels that it predicts, and so its score.
  guesses = peer.predict(queries)
  assert knn.knn_accuracy(bank, labels[:200], queries, guesses, ks=(20,)) == [
      100.0
  ]
  expected = 100 * np.mean(guesses == labels[200:])
  assert ours == pytest.approx(expected)
  assert 40 < ours < 100
  peer = KNeighborsClassifier(1, metric="cosine").fit(bank, labels[:200])
  assert nearest == pytest.approx(100 * peer.score(queries, labels[200:]))


def test_knn_of_a_set_reports_its_twins_and_references(parts):
  result = knn.run("set", *parts, k=1, progress=False)
  assert result["knn/set/top1"] == 100.0
  assert result["knn/set/top1_pixels"] < 60
  assert result["knn/set/chance"] == pytest.approx(100 / synthetic.NUM_CLASSES)
  assert result["knn/set/count"] == 20
  for metric in ("top1", "top1_k200"):
    for twin in ("", "_random_init", "_pixels"):
      assert 0 <= result[f"knn/set/{metric}{twin}"] <= 100
  assert {"knn/set/top1_color", "knn/set/top1_position"} <= set(result)


def test_a_bank_of_fewer_images_has_no_vote_of_200(parts):
  small = frozen_features.FeatureSet(
      {k: v[:200] for k, v in parts[0].features.items()}, parts[0].labels[:200]
  )
  result = knn.run("set", small, parts[1], progress=False)
  assert not [key for key in result if "k200" in key]
