"""The linear probe against scikit-learn's; fine-tuning; what chooses the rate."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import finetune, frozen_features, linear
from mcjepa_jax.models import mcjepa
from mcjepa_jax.training import build
from tests.helpers import tiny

_CLASSES = 4


def _blobs(count, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, _CLASSES, count).astype(np.int32)
  centres = np.random.default_rng(9).normal(size=(_CLASSES, 12))
  x = centres[labels] + 1.5 * rng.normal(size=(count, 12))
  return x.astype(np.float32), labels


def _part(count, seed):
  """Classes that the difference of two features tells, and hardly their means."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, _CLASSES, count).astype(np.int32)
  signs = 2.0 * np.stack([labels % 2, labels // 2], axis=1) - 1
  common = 5 * rng.normal(size=signs.shape)
  told = common + signs + 0.4 * rng.normal(size=signs.shape)
  x = np.concatenate([told, common], axis=1).astype(np.float32)
  noise = rng.normal(size=x.shape).astype(np.float32)
  return frozen_features.FeatureSet(
      {"": x, "random_init": noise, "pixels": noise + x}, labels
  )


@pytest.mark.parametrize("weight_decay", [1e-3, 0.1])
def test_a_converged_probe_equals_logistic_regression(weight_decay):
  x, labels = _blobs(500, 0)
  queries, truth = _blobs(4000, 1)
  weights = linear.fit(
      x, labels, num_classes=_CLASSES, learning_rates=(0.3,), epochs=600,
      batch_size=500, weight_decay=weight_decay,
  )  # fmt: skip
  (ours,) = linear.accuracies(weights, queries, truth)
  peer = LogisticRegression(C=1 / (500 * weight_decay), max_iter=5000)
  peer.fit(x, labels)
  assert abs(ours - 100 * peer.score(queries, truth)) < 0.5
  assert 60 < ours < 99
  kernel = weights["kernel"][0].T
  # Of all classes alike any bias may be added: kernels are alike.
  np.testing.assert_allclose(kernel, peer.coef_, atol=0.02)


def test_rates_side_by_side_train_as_each_would_alone():
  x, labels = _blobs(300, 0)
  options = dict(num_classes=_CLASSES, epochs=5, batch_size=64)
  both = linear.fit(x, labels, learning_rates=(0.01, 0.2), **options)
  for i, rate in enumerate((0.01, 0.2)):
    alone = linear.fit(x, labels, learning_rates=(rate,), **options)
    np.testing.assert_allclose(both["kernel"][i], alone["kernel"][0], atol=1e-5)


def test_the_rate_is_chosen_by_held_out_training_images_alone():
  train, test = _part(400, 0), _part(200, 1)
  options = dict(
      # The second is right, the first finds but the means, the last diverges.
      learning_rates=(1e-7, 0.05, 1e6), weight_decay=1e-3, epochs=40,
      batch_size=32, progress=False,
  )  # fmt: skip
  result = linear.run("set", train, test, **options)
  assert result["linear/set/learning_rate"] == 0.05
  assert result["linear/set/top1"] > 2 * result["linear/set/chance"]
  # Test labels that are all wrong change the score and nothing else.
  wrong = frozen_features.FeatureSet(
      test.features, (test.labels + 1) % _CLASSES
  )
  other = linear.run("set", train, wrong, **options)
  for key in ("learning_rate", "top1_held_out"):
    assert other[f"linear/set/{key}"] == result[f"linear/set/{key}"]
  assert other["linear/set/top1"] < result["linear/set/top1"] / 2


def test_each_number_of_the_probe_has_its_twins():
  result = linear.run(
      "set", _part(400, 0), _part(100, 1), learning_rates=(0.05,), epochs=40,
      batch_size=32, progress=False,
  )  # fmt: skip
  for twin in ("", "_random_init", "_pixels"):
    assert 0 <= result[f"linear/set/top1{twin}"] <= 100
  assert result["linear/set/top1_random_init"] < result["linear/set/top1"]
  assert result["linear/set/count"] == 100


def test_features_that_never_change_do_no_harm():
  train, test = _part(400, 0), _part(100, 1)
  for part in (train, test):
    part.features[""] = np.pad(part.features[""], ((0, 0), (0, 3)))
  result = linear.run(
      "set", train, test, learning_rates=(0.05,), epochs=40, batch_size=32,
      progress=False,
  )  # fmt: skip
  assert result["linear/set/top1"] > 50


class _Stripes:
  """Noise with stripes across or along: what the encoder must learn to tell."""

  classes = ("across", "along")

  def __init__(self, count, seed):
    self._count, self._seed = count, seed

  def __len__(self):
    return self._count

  def __getitem__(self, i):
    rng = np.random.default_rng((self._seed, i))
    label = i % 2
    wave = 90 * np.sin(np.arange(40) * 1.5 + rng.uniform(0, 6))
    image = 128 + (wave[:, None] if label else wave[None])[..., None]
    image = image + rng.normal(scale=20, size=(40, 40, 3))
    return {
        "image": np.clip(image, 0, 255).astype(np.uint8),
        "label": np.int32(label),
    }


def _fine_tuned(model, params, *, devices=1):
  return finetune.run(
      "set", model, {"": params, "random_init": params}, _Stripes(64, 0),
      _Stripes(19, 1), num_classes=2, size=32, epochs=8, batch_size=16,
      learning_rate=3e-3, weight_decay=0.05, seed=0,
      mesh=sharding.make_mesh(devices), progress=False,
  )  # fmt: skip


@pytest.mark.slow
def test_fine_tuning_learns_and_leaves_what_it_was_given():
  model = build.model(tiny.config())
  params = sharding.call_once(lambda: mcjepa.init_params(model, 0))
  before = jax.tree.map(np.array, params)
  result = _fine_tuned(model, params)
  assert result["finetune/set/top1"] > 85
  # The same start under another name.
  assert result["finetune/set/top1_random_init"] == result["finetune/set/top1"]
  assert result["finetune/set/chance"] == 50
  assert result["finetune/set/count"] == 19
  # The parameters that were given stay as they are, for the evals after it.
  jax.tree.map(np.testing.assert_array_equal, before, params)


@pytest.mark.proof
@pytest.mark.slow
def test_fine_tuning_is_the_same_on_4_devices_and_trains_the_encoder(
    monkeypatch,
):
  model = build.model(tiny.config())
  params = sharding.call_once(lambda: mcjepa.init_params(model, 0))
  result = _fine_tuned(model, params, devices=4)
  assert result == _fine_tuned(model, params)
  # Where no gradient reaches the encoder, the head alone does not get there.
  apply = mcjepa.MCJEPA.apply
  monkeypatch.setattr(
      mcjepa.MCJEPA,
      "apply",
      lambda *args, **options: jax.lax.stop_gradient(apply(*args, **options)),
  )
  frozen = _fine_tuned(model, params)
  assert frozen["finetune/set/top1"] < 75 < result["finetune/set/top1"]


def test_a_view_is_a_random_box_of_the_size_asked_for():
  image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  views = [
      finetune.view(image, np.random.default_rng(seed), 16)
      for seed in (0, 0, 1)
  ]
  assert views[0].shape == (16, 16, 3)
  np.testing.assert_array_equal(views[0], views[1])
  assert (views[0] != views[2]).any()
