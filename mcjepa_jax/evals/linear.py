"""A linear classifier on frozen features, at several learning rates at once.

Features are those of each image's central square, computed once: no crops and
no flips, unlike the protocols that augment, whose numbers are some points
higher. They are standardised by the training part's mean and deviation.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer
import numpy as np
import optax
import tqdm

from mcjepa_jax.evals import frozen_features

_HELD_OUT = 10  # one image in so many of the training part chooses the rate
_SCORED = 4096  # rows whose scores are held at once
_TINY = 1e-6  # deviations below are of features that never change


def _loss(weights, x, labels, weight_decay):
  scores = x @ weights["kernel"] + weights["bias"]
  loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
  decay = 0.5 * weight_decay * jnp.sum(jnp.square(weights["kernel"]))
  return jnp.mean(loss) + decay


@functools.partial(jax.jit, static_argnums=(6, 7))
def _epoch(weights, momenta, x, labels, order, rates, weight_decay, momentum):
  """One pass over the rows in `order`; `rates` are of each step [s, r]."""

  def step(carry, now):
    weights, momenta = carry
    rows, rate = now

    def one(weights, momenta, rate):
      gradient = jax.grad(_loss)(weights, x[rows], labels[rows], weight_decay)
      momenta = jax.tree.map(lambda m, g: momentum * m + g, momenta, gradient)
      return jax.tree.map(lambda w, m: w - rate * m, weights, momenta), momenta

    return jax.vmap(one)(weights, momenta, rate), None

  return jax.lax.scan(step, (weights, momenta), (order, rates))[0]


def fit(
    x: Float[np.ndarray, "n d"],
    labels: Integer[np.ndarray, "n"],
    *,
    num_classes: int,
    learning_rates: Sequence[float],
    epochs: int = 100,
    batch_size: int = 256,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    seed: int = 0,
    name: str = "",
    progress: bool = False,
) -> dict[str, Float[Array, "r ..."]]:
  """Kernels and biases of one classifier for each learning rate.

  SGD with momentum on mean cross-entropy + weight_decay / 2 |kernel|^2 (that of
  scikit-learn's LogisticRegression of C = 1 / (n weight_decay)), from zero, each
  rate falling to 0 by a cosine. All see the same batches.
  """
  count, width = x.shape
  batch_size = min(batch_size, count)
  steps = count // batch_size
  total = epochs * steps
  cosine = 0.5 * (1 + np.cos(np.pi * np.arange(total) / total))
  rates = cosine[:, None] * np.asarray(learning_rates)
  shape = (len(learning_rates), width, num_classes)
  weights = {
      "kernel": jnp.zeros(shape),
      "bias": jnp.zeros((shape[0], num_classes)),
  }
  momenta = jax.tree.map(jnp.zeros_like, weights)
  x, labels = jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.int32)
  rng = np.random.default_rng(seed)
  for epoch in tqdm.trange(
      epochs, desc=name, disable=not progress, leave=False
  ):
    # What does not fill a batch is left out, other rows in each epoch.
    order = rng.permutation(count)[: steps * batch_size]
    now = rates[epoch * steps : (epoch + 1) * steps]
    weights, momenta = _epoch(
        *(weights, momenta, x, labels),
        jnp.asarray(order.reshape(steps, batch_size), jnp.int32),
        jnp.asarray(now, jnp.float32),
        *(weight_decay, momentum),
    )
  return weights


def accuracies(
    weights: dict[str, Float[Array, "r ..."]],
    x: Float[np.ndarray, "m d"],
    labels: Integer[np.ndarray, "m"],
) -> Float[np.ndarray, "r"]:
  """Top-1 in percent of each classifier; what is not finite is never right."""
  correct = np.zeros(len(weights["bias"]))
  for start in range(0, len(x), _SCORED):
    part = slice(start, start + _SCORED)
    # Of a rate that is too large nothing finite is left.
    with np.errstate(all="ignore"):
      scores = np.matmul(x[part], np.asarray(weights["kernel"]))
    scores += np.asarray(weights["bias"])[:, None]
    hit = (scores.argmax(-1) == labels[part]) & np.isfinite(scores).all(-1)
    correct += hit.sum(axis=1)
  return 100 * correct / len(x)


def run(
    name: str,
    train: frozen_features.FeatureSet,
    test: frozen_features.FeatureSet,
    *,
    learning_rates: Sequence[float],
    epochs: int = 100,
    batch_size: int = 256,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
  """Top-1 in percent for each feature, keyed `linear/NAME/METRIC`.

  The rate is the one whose classifier is best on a tenth of the training part
  that no classifier is trained on; the test part chooses nothing.
  """
  order = np.random.default_rng(seed).permutation(len(train.labels))
  held_out = order[: max(1, len(order) // _HELD_OUT)]
  rest = order[len(held_out) :]
  classes = int(max(train.labels.max(), test.labels.max())) + 1
  result = {}
  for suffix in frozen_features.TWINS:
    if suffix not in train.features:
      continue
    x, queries = train.features[suffix], test.features[suffix]
    mean, deviation = x[rest].mean(axis=0), x[rest].std(axis=0)
    deviation = np.where(deviation > _TINY, deviation, 1.0)
    weights = fit(
        (x[rest] - mean) / deviation,
        train.labels[rest],
        num_classes=classes,
        learning_rates=learning_rates,
        epochs=epochs,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
        name=frozen_features.metric(f"linear/{name}", suffix),
        progress=progress,
    )
    chosen = accuracies(
        weights, (x[held_out] - mean) / deviation, train.labels[held_out]
    )
    best = int(chosen.argmax())
    tested = accuracies(
        {key: value[best : best + 1] for key, value in weights.items()},
        (queries - mean) / deviation,
        test.labels,
    )
    result |= {
        f"linear/{name}/{frozen_features.metric(key, suffix)}": float(value)
        for key, value in (
            ("top1", tested[0]),
            ("top1_held_out", chosen[best]),
            ("learning_rate", learning_rates[best]),
        )
    }
  result[f"linear/{name}/chance"] = frozen_features.chance(test)
  result[f"linear/{name}/count"] = len(test.labels)
  return result
