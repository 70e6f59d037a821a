"""A dump of a step that was not finite."""

import jax.numpy as jnp

from mcjepa_jax.step import train_state
from mcjepa_jax.training import bad_steps
from tests.helpers import tiny


def state():
  return train_state.TrainState(
      step=jnp.asarray(8),
      params={"encoder": {"kernel": jnp.arange(6.0)}},
      opt_state={"encoder": jnp.ones(3)},
      key=jnp.asarray([7, 2**32 - 1], jnp.uint32),
      skipped=jnp.asarray(True),
  )


def save(workdir, step=7, limit=2):
  """The folder of a dump of a small state; None where there is no room."""
  if not bad_steps.has_room(workdir, step=step, limit=limit):
    return None
  batch = tiny.batch()
  return bad_steps.save(
      workdir,
      state(),
      step=step,
      kind="both",
      arrays={k: jnp.asarray(v) for k, v in batch.items()},
      records={"content": ["a", "b"], "motion": ["c"]},
      logs={"loss": float("nan")},
      config=tiny.config(),
  )
