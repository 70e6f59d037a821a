"""The gradient of a step, over micro-batches where the config asks for them."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mcjepa_jax.losses import motion_objective
from mcjepa_jax.models import mcjepa
from mcjepa_jax.step import accumulation, batch_loss, task_schedule, train_state


def _value_and_grad(function, params, batch, key, count):
  """Loss, logs and gradient, averaged over `count` micro-batches."""
  differentiate = jax.value_and_grad(function, has_aux=True)
  if count == 1:
    (_, logs), grads = differentiate(params, batch, key)
    return logs, grads
  micro = {k: accumulation.micro_batches(v, count) for k, v in batch.items()}

  def body(i):
    one = {k: v[i] for k, v in micro.items()}
    (_, logs), grads = differentiate(params, one, jax.random.fold_in(key, i))
    return logs, grads

  def add(i, total):
    return jax.tree.map(jnp.add, total, body(i))

  shapes = jax.eval_shape(body, jnp.zeros((), jnp.int32))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total = jax.lax.fori_loop(
      0, count, add, zeros, unroll=accumulation.unroll(count)
  )
  return jax.tree.map(lambda x: x / count, total)


def exact_value_and_grad(
    params: Any,
    fixed: Any,
    model: mcjepa.MCJEPA,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    step: jax.Array,
    recipe: batch_loss.Recipe,
) -> tuple[dict[str, jax.Array], Any]:
  """What `loss_fn` of the whole batch logs, and its gradient, by micro-batches.

  VICReg is of the pooled features of all, L_vc of the moments of all; the rest
  of motion is a mean over the micro-batches, each over the pixels of all.
  """
  sizes = {k: len(v) for k, v in batch.items()}
  content_key, motion_key = jax.random.split(key)
  weights = {
      k: recipe.motion_term_weights[k] for k in ("variance", "covariance")
  }
  strides = {
      motion_objective.stride_of(name)
      for levels in weights.values()
      for name, weight in levels.items()
      if weight
  }
  local = dataclasses.replace(
      recipe,
      motion_term_weights=recipe.motion_term_weights | {k: {} for k in weights},
  )

  def forward(params, micro, indices, mean):
    rows, means, within, terms, monitors = {}, {}, {}, {}, {}
    if "views" in micro:
      rows["pooled"] = batch_loss.pooled_forward(
          model,
          params | fixed,
          micro["views"],
          content_key,
          recipe,
          (indices["views"], sizes["views"]),
      )
    if "frames" in micro:
      terms, monitors, features = batch_loss.motion_forward(
          model,
          params | fixed,
          micro["frames"],
          motion_key,
          step,
          local,
          indices=indices["frames"],
          mean=mean,
      )
      for s in strides:
        means[s], within[s] = accumulation.moments(features[s])
    return (
        batch_loss.weighted_loss(terms, monitors, step, local),
        (rows, means),
        within,
    )

  def finish(params, stacked, within):
    (rows, means), terms, monitors = stacked, {}, {}
    if "pooled" in rows:
      terms, monitors = batch_loss.content_forward(
          model, params | fixed, accumulation.whole(rows["pooled"]), recipe
      )
    for s in within:
      frames, height, width, _ = batch["frames"].shape
      samples = frames * (height // s) * (width // s)
      covariance = accumulation.covariance(means[s], within[s], samples)
      terms |= motion_objective.covariance_terms(covariance, s, weights=weights)
    return batch_loss.weighted_loss(terms, monitors, step, recipe)

  return accumulation.value_and_grad(
      forward, finish, params, batch, recipe.accumulate
  )


def make_gradient(
    model: mcjepa.MCJEPA, recipe: batch_loss.Recipe, kind: str
) -> Callable[..., tuple[dict[str, jax.Array], Any]]:
  """The gradient of one kind of step: (state, batch) -> (logs, gradient).

  The batch holds `frames` u8[2b, h, w, 3], `views` u8[2n, k, k, 3], or both,
  as the kind trains, and nothing else.
  """
  trained = task_schedule.KINDS[kind][1]
  arrays = {"content": "views", "motion": "frames"}
  expected = {arrays[task] for task in task_schedule.tasks(kind)}

  def gradient(state: train_state.TrainState, batch: Mapping[str, jax.Array]):
    if set(batch) != expected:
      raise ValueError(
          f"a {kind} step reads {sorted(expected)}, got {sorted(batch)}"
      )
    root = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(root, state.step)
    fixed = {g: p for g, p in state.params.items() if g not in trained}

    def function(params, batch, key):
      return batch_loss.loss_fn(
          params | fixed, model, batch, key, state.step, recipe
      )

    moving = {g: state.params[g] for g in trained}
    if recipe.accumulation == "exact" and recipe.accumulate > 1:
      return exact_value_and_grad(
          moving, fixed, model, batch, key, state.step, recipe
      )
    return _value_and_grad(function, moving, batch, key, recipe.accumulate)

  return gradient
