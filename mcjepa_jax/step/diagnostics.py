"""What a run asks of a batch now and then: spread of embeddings, gradients."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mcjepa_jax.distributed import sharding
from mcjepa_jax.models import mcjepa
from mcjepa_jax.ops import representation
from mcjepa_jax.step import augmentation, batch_loss, gradients, train_state

_TINY = 1e-12


def _dot(a: Any, b: Any) -> jax.Array:
  return sum(
      jnp.sum(x * y)
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def _compare(grads: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Norms of the tasks' gradients; their cosine, and the smaller's share."""
  norms = {task: jnp.sqrt(_dot(g, g)) for task, g in grads.items()}
  found = {f"gradient_norm_{task}": norm for task, norm in norms.items()}
  if len(grads) == 2:
    one, other = grads.values()
    a, b = norms.values()
    found["gradient_cosine"] = _dot(one, other) / (a * b + _TINY)
    found["gradient_share"] = jnp.minimum(a, b) / (a + b + _TINY)
  return found


def jit_diagnosis(
    model: mcjepa.MCJEPA, recipe: batch_loss.Recipe, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
  """The program of a diagnosis: of a state without its optimizer, and a batch."""
  return jax.jit(
      functools.partial(_diagnose, model, recipe),
      # What is compiled for shapes alone would have each device take all.
      in_shardings=(None, sharding.batch_sharding(mesh)),
      out_shardings=sharding.replicated(mesh),
  )


class Diagnosis:
  """Quantities by name, `diagnosis/...`, of a state and a batch.

  Compiled when first asked for: a run that asks for none pays nothing.
  """

  def __init__(
      self,
      model: mcjepa.MCJEPA,
      recipe: batch_loss.Recipe,
      mesh: jax.sharding.Mesh,
  ):
    self._function = jit_diagnosis(model, recipe, mesh)

  def __call__(
      self, state: train_state.TrainState, arrays: Mapping[str, jax.Array]
  ) -> dict[str, float]:
    # The optimizer's part is not asked for.
    found, z = jax.device_get(
        self._function(state.replace(opt_state={}), arrays)
    )
    found = {name: float(value) for name, value in found.items()}
    if z is not None:
      found["rank_me"] = representation.rank_me(z)
    return {f"diagnosis/{name}": value for name, value in found.items()}


def _diagnose(model, recipe, state, arrays):
  tasks = {"content": "views", "motion": "frames"}
  grads = {}
  for task, name in tasks.items():
    if name in arrays:
      # As the step takes it, in as many parts.
      gradient = gradients.make_gradient(model, recipe, task)
      grads[task] = gradient(state, {name: arrays[name]})[1]["encoder"]
  found, z = _compare(grads), None
  if "views" in arrays:
    params = state.params
    key = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(key, state.step)
    images = augmentation.content_views(
        arrays["views"], key, **recipe.content_augmentation
    )
    # All at once: without a gradient a layer's activations go with it.
    _, z = model.apply({"params": params}, images, method=model.content)
    found["correlation"] = representation.correlation(z)
  return found, z
