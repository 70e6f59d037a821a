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


def local_flow(frames):
  """Flow that a pixel's own colours decide."""
  first, second = frames[0::2].astype(np.float32), frames[1::2]
  return (first - second)[..., :2] / 16


def noise_frames(height, width, count=2):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, height, width, 3), np.uint8)
