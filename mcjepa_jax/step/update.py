"""The one jitted step: what preflight compiles and train runs.

A step trains some tasks ("content", "motion") and moves some groups of
parameters ("encoder", "expander", "estimator"). What it does not train it does
not touch: neither parameters nor optimizer state, count included.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mcjepa_jax.distributed import sharding
from mcjepa_jax.models import mcjepa
from mcjepa_jax.step import batch_loss, gradients, task_schedule, train_state


def make_train_step(
    model: mcjepa.MCJEPA,
    optimizers: Mapping[str, optax.GradientTransformation],
    recipe: batch_loss.Recipe,
    kind: str,
) -> Callable[..., tuple[train_state.TrainState, dict[str, jax.Array]]]:
  """The pure step of one kind: (state, batch) -> (state, what is logged).

  An update whose loss or gradient is not finite is skipped, counts included,
  and so logged. The step after it changes nothing at all: the host, which
  notices a step late, finds the parameters as they were, and clears `skipped`.
  """
  trained = task_schedule.KINDS[kind][1]
  gradient = gradients.make_gradient(model, recipe, kind)

  def train_step(state: train_state.TrainState, batch: Mapping[str, jax.Array]):
    logs, grads = gradient(state, batch)
    finite = jnp.isfinite(logs["loss"])
    for group in trained:
      logs[f"gradient_norm/{group}"] = optax.tree.norm(grads[group])
      finite &= jnp.isfinite(logs[f"gradient_norm/{group}"])
    logs["skipped"] = 1.0 - finite

    def kept():
      return dict(state.params), dict(state.opt_state)

    def updated():
      params, opt_state = kept()
      for group in trained:
        updates, opt_state[group] = optimizers[group].update(
            grads[group], state.opt_state[group], state.params[group]
        )
        params[group] = optax.apply_updates(state.params[group], updates)
      return params, opt_state

    go = finite & ~state.skipped
    if jax.default_backend() == "cpu":
      # The selects of all leaves would take 2 s more to compile (quickstart).
      params, opt_state = jax.lax.cond(go, updated, kept)
    else:  # a branch would make the host of a GPU wait
      params, opt_state = jax.tree.map(
          lambda new, old: jnp.where(go, new, old), updated(), kept()
      )
    state = state.replace(
        step=state.step + ~state.skipped,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped | ~finite,
    )
    return state, logs

  return train_step


def jit_train_step(
    train_step: Callable[..., Any],
    abstract: train_state.TrainState,
    mesh: jax.sharding.Mesh,
) -> Callable[..., Any]:
  """The step compiled over a mesh: state donated, its shardings kept."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(
      train_step,
      in_shardings=(shardings, sharding.batch_sharding(mesh)),
      out_shardings=(shardings, replicated),
      donate_argnums=0,
      # The quickstart's step compiles in 33 s, not 41, and runs as fast.
      compiler_options=sharding.cpu_options(2, mesh.devices.flat[0].platform),
  )
