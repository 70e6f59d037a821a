"""AdamW for one group of parameters: schedule, decay mask, clipping."""

import math
from typing import Any

import jax
import optax

from mcjepa_jax import errors


def schedule(
    *,
    learning_rate: float,
    warmup_steps: int,
    num_steps: int,
    final_fraction: float = 0.0,
) -> optax.Schedule:
  """The learning rate of each update: linear warm-up, then a cosine.

  Update k of the warm-up has (k + 1) / warmup_steps of the peak, so that the
  first one moves; the last of `num_steps` has `final_fraction` of it.
  """

  def rate(count):
    warm = (count + 1) / max(warmup_steps, 1)
    span = max(num_steps - 1 - warmup_steps, 1)
    part = jax.numpy.clip((count - warmup_steps) / span, 0.0, 1.0)
    cosine = 0.5 * (1 + jax.numpy.cos(math.pi * part))
    cosine = final_fraction + (1 - final_fraction) * cosine
    return learning_rate * jax.numpy.minimum(warm, cosine)

  return rate


def decay_mask(params: Any) -> Any:
  """True for what weight decay applies to: parameters of two axes or more."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    final_fraction: float = 0.0,
    clip_norm: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
  """AdamW behind a clip of the group's global norm (0: no clip).

  Raises:
    UserError: a value no schedule or optimizer can have.
  """
  faults = [
      f"optimizer {name}: expected {expected}, got {value}"
      for name, value, expected, holds in (
          ("learning_rate", learning_rate, "more than 0", learning_rate > 0),
          ("num_steps", num_steps, "at least 1", num_steps >= 1),
          (
              "warmup_steps",
              warmup_steps,
              f"0 to num_steps, {num_steps}",
              0 <= warmup_steps <= num_steps,
          ),
          ("weight_decay", weight_decay, "0 or more", weight_decay >= 0),
          ("clip_norm", clip_norm, "0 or more", clip_norm >= 0),
          (
              "final_fraction",
              final_fraction,
              "0 to 1",
              0 <= final_fraction <= 1,
          ),
      )
      if not holds
  ]
  if faults:
    raise errors.UserError(*faults)
  rate = schedule(
      learning_rate=learning_rate,
      warmup_steps=warmup_steps,
      num_steps=num_steps,
      final_fraction=final_fraction,
  )
  adam = optax.adamw(
      rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
  )
  if not clip_norm:
    return adam
  return optax.chain(optax.clip_by_global_norm(clip_norm), adam)
