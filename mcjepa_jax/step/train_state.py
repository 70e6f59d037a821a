"""The train state: all that a step changes."""

from collections.abc import Mapping
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from mcjepa_jax.distributed import sharding
from mcjepa_jax.models import mcjepa


class TrainState(struct.PyTreeNode):
  """All that a step changes, and the root key. Leaves may be shapes."""

  step: Any
  params: Any  # group -> parameters
  opt_state: Any  # group -> state, each with its own count
  key: Any  # uint32 data of the root key; step keys are folded from it
  skipped: Any  # whether the update before was: then the next one waits


def init_state(
    model: mcjepa.MCJEPA,
    optimizers: Mapping[str, optax.GradientTransformation],
    seed: int,
) -> TrainState:
  """A new state, of the seed alone."""
  root = jax.random.key(seed)
  params = mcjepa.init_params(model, seed)
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state={g: optimizers[g].init(params[g]) for g in mcjepa.GROUPS},
      key=jax.random.key_data(jax.random.fold_in(root, 1)),
      skipped=jnp.zeros((), bool),
  )


def abstract_state(
    model: mcjepa.MCJEPA,
    optimizers: Mapping[str, optax.GradientTransformation],
    mesh: jax.sharding.Mesh,
    *,
    min_bytes: int,
    seed: int = 0,
) -> TrainState:
  """The state as shapes with shardings: to lower, restore or initialise into."""
  shapes = jax.eval_shape(
      functools.partial(init_state, model, optimizers, seed)
  )
  shardings = sharding.state_shardings(shapes, mesh, min_bytes=min_bytes)
  return jax.tree.map(
      lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
      shapes,
      shardings,
  )
