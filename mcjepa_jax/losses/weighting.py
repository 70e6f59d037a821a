"""From the terms of both tasks to the loss: weights and motion's ramp."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# L_vc opens the motion task: it does not wait for the ramp (method.md 4).
_UNRAMPED = ("variance", "covariance")


def ramp(step: Int[Array, ""], start: int, num_steps: int) -> Float[Array, ""]:
  """(step - start + 1) / num_steps, held in [0, 1]; 1 where there is no ramp."""
  if num_steps <= 0:
    return jnp.ones(())
  return jnp.clip((step - start + 1) / num_steps, 0.0, 1.0)


def weighted_sums(
    terms: Mapping[str, Float[Array, ""]],
    *,
    motion_weight: float,
    motion_ramp: Float[Array, ""],
    motion: Mapping[str, Mapping[str, float]],
    content: Mapping[str, float],
) -> dict[str, Float[Array, ""]]:
  """Each task's loss; motion's holds alpha_flow. Their sum is the step's loss."""
  losses = {}
  for name, term in terms.items():
    task, kind, *level = name.split("/")
    if task == "content":
      weight = content[kind]
    else:
      weight = motion_weight * motion[kind][level[0]]
      if kind not in _UNRAMPED:
        weight = weight * motion_ramp
    losses[task] = losses.get(task, 0.0) + weight * term
  return losses
