"""Random arrays, and trees that are equal."""

import jax
import jax.numpy as jnp
import numpy as np


def uniform_array(shape, seed=0):
  return jnp.array(np.random.default_rng(seed).random(shape), jnp.float32)


def trees_equal(a, b):
  return all(
      np.array_equal(x, y)
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
