"""A small train state and its checkpoints."""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjepa_jax.storage import checkpoint


class State(struct.PyTreeNode):
  """The shape of a train state."""

  step: jax.Array
  params: dict
  opt_state: dict
  key: jax.Array


STREAMS = {"motion": {"next_batch": 7, "fingerprint": {"sizes": [8, 16]}}}


def make_state(*, width: int = 4, seed: int = 0, tx=None) -> State:
  rng = np.random.default_rng(seed)
  tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  params = {
      "encoder": {
          "kernel": jnp.asarray(rng.normal(size=(8, width)), jnp.float32),
          "scale": jnp.asarray(rng.normal(size=width), jnp.bfloat16),
      },
      "estimator": {"bias": jnp.full((3,), jnp.nan)},
  }
  opt_state = {group: tx.init(tree) for group, tree in params.items()}
  key = jax.random.key_data(jax.random.key(seed))
  return State(jnp.int32(2**31 - 1), params, opt_state, key)


def shapes(state, shardings=None):
  """What eval_shape gives, with shardings or without."""
  shardings = shardings or jax.tree.map(lambda _: None, state)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      shardings,
  )


def assert_bit_equal(state, other):
  assert jax.tree.structure(state) == jax.tree.structure(other)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(workdir, steps=(3,), *, state=None, metrics=None, **options):
  """Writes steps that differ in nothing and returns their state."""
  state = make_state() if state is None else state
  with checkpoint.Checkpoints(workdir, **options) as checkpoints:
    for step in steps:
      assert checkpoints.save(
          step,
          state,
          STREAMS,
          {"model": {"width": 4}},
          metrics and metrics[step],
      )
  return state
