"""The whole encoder, trained on with a linear head, and its accuracy."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import UInt8
import numpy as np
import optax
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.data.pipeline import geometry
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import frozen_features
from mcjepa_jax.models import mcjepa
from mcjepa_jax.step import optimizer

_WARM = 0.1  # of the steps
_CLIP = 1.0  # of the gradient's norm

Params = Any


def view(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, size: int
) -> UInt8[np.ndarray, "s s 3"]:
  """A random box of the image at `size`, mirrored or not (torchvision's rule)."""
  box = geometry.random_box(*image.shape[:2], rng)
  return geometry.resample(
      image, box, (size, size), flip=bool(rng.random() < 0.5)
  )


def _scores(model, state, images, key=None):
  """The head's scores; with a key for drop path, as in training."""
  pooled = model.apply(
      {"params": state["model"]},
      images.astype(jnp.float32) / 255,
      method=model.pooled,
      deterministic=key is None,
      rngs=None if key is None else {"drop_path": key},
  )
  return pooled @ state["head"]["kernel"] + state["head"]["bias"]


def run(
    name: str,
    model: mcjepa.MCJEPA,
    starts: Mapping[str, Params],
    train: Any,
    test: Any,
    *,
    num_classes: int,
    size: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    mesh: jax.sharding.Mesh,
    progress: bool = True,
) -> dict[str, float]:
  """Top-1 in percent after training on, keyed `finetune/NAME/METRIC`.

  `starts` are parameters by suffix: "" gives `top1`, "random_init" gives
  `top1_random_init`. AdamW, cosine after a tenth of warm-up, drop path as in
  pre-training. Training images are random boxes, mirrored or not, test images
  central squares. The devices used are as many as divide the batch.

  Raises:
    UserError: the training went astray.
  """
  batch_size = min(batch_size, len(train))
  mesh = sharding.dividing(mesh, batch_size)
  steps = len(train) // batch_size
  tx = optimizer.make_optimizer(
      learning_rate=learning_rate,
      num_steps=epochs * steps,
      warmup_steps=int(_WARM * epochs * steps),
      weight_decay=weight_decay,
      clip_norm=_CLIP,
  )
  whole, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)

  def loss_fn(state, images, labels, key):
    scores = _scores(model, state, images, key)
    return optax.softmax_cross_entropy_with_integer_labels(
        scores, labels
    ).mean()

  def step(state, opt_state, images, labels, number):
    key = jax.random.fold_in(jax.random.key(seed), number)
    gradient = jax.grad(loss_fn)(state, images, labels, key)
    updates, opt_state = tx.update(gradient, opt_state, state)
    return optax.apply_updates(state, updates), opt_state

  step = jax.jit(
      step, in_shardings=(whole, whole, batch, batch, None), out_shardings=whole
  )

  def guess(state, images):
    scores = _scores(model, state, images)
    return scores.argmax(-1), jnp.isfinite(scores).all()

  predict = jax.jit(guess, in_shardings=(None, batch))
  result = {}
  for suffix, params in starts.items():
    # The expander and the estimator are no part of what is trained on.
    encoder = {"encoder": params["encoder"]}
    state = {"model": encoder, "head": _head(model, encoder, size, num_classes)}
    state, opt_state = jax.device_put((state, tx.init(state)), whole)
    bar = functools.partial(
        tqdm.tqdm,
        desc=f"finetune/{name} {suffix}".strip(),
        disable=not progress,
        leave=False,
    )
    for number in bar(range(epochs * steps)):
      images, labels = _batch(
          train, size, batch_size, seed, *divmod(number, steps)
      )
      state, opt_state = step(
          state, opt_state, images, labels, np.int32(number)
      )
    correct, seen = 0, np.zeros(num_classes, bool)
    for first in bar(range(0, len(test), batch_size)):
      part = [test[i] for i in range(first, min(first + batch_size, len(test)))]
      images = np.stack(
          [geometry.center_resize(x["image"], size) for x in part]
      )
      labels = np.array([x["label"] for x in part])
      # Padded with repeats to one shape; the rest is dropped.
      rows = np.arange(batch_size) % len(part)
      guesses, finite = predict(state, images[rows])
      if not finite:
        raise errors.UserError(
            f"finetune/{name}: expected finite scores after the training, got NaN or"
            " infinity; a lower finetune.learning_rate may cure it"
        )
      guesses = np.asarray(guesses)[: len(part)]
      correct += int((guesses == labels).sum())
      seen[labels] = True
    key = frozen_features.metric(f"finetune/{name}/top1", suffix)
    result[key] = 100 * correct / len(test)
  return result | {
      f"finetune/{name}/chance": 100 / int(seen.sum()),
      f"finetune/{name}/count": len(test),
  }


def _head(model, params, size, num_classes):
  """A linear head of zeros on the pooled features."""
  width = jax.eval_shape(
      lambda p: model.apply(
          {"params": p}, jnp.zeros((1, size, size, 3)), method=model.pooled
      ),
      params,
  ).shape[-1]
  return {
      "kernel": jnp.zeros((width, num_classes)),
      "bias": jnp.zeros(num_classes),
  }


def _batch(train, size, batch_size, seed, epoch, number):
  """Views and labels of one step; an epoch's last rows fill no batch."""
  order = np.random.default_rng((seed, epoch)).permutation(len(train))
  images, labels = [], []
  for i in order[number * batch_size : (number + 1) * batch_size].tolist():
    example = train[i]
    rng = np.random.default_rng((seed, epoch, i))
    images.append(view(example["image"], rng, size))
    labels.append(example["label"])
  return np.stack(images), np.array(labels, np.int32)
