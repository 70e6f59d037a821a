"""Smooth maps that move by a known flow."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape: int, seed: int = 0) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def scene(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """A smooth picture, defined at any position and alike in no direction."""
  return np.stack(
      [np.sin(0.4 * x) + 0.1 * y, np.cos(0.3 * y + 0.2 * x)], axis=-1
  )


# Frame 1 to frame 2 as q = A (p - centre) + centre + d, with (x, y) vectors.
MOTIONS = {
    "translation": (np.eye(2), (2.0, -1.0)),
    "rotation": (np.array([[0.98, -0.199], [0.199, 0.98]]), (0.0, 0.0)),
    "zoom": (1.1 * np.eye(2), (0.5, 0.0)),
}


def moved(name: str, h: int = 20, w: int = 28):
  """Frame 1, frame 2 and flow_12 of one of the motions, without a batch."""
  matrix, shift = MOTIONS[name]
  grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(float)
  centre = np.array([(w - 1) / 2, (h - 1) / 2])
  flow = (grid - centre) @ matrix.T + centre + shift - grid
  source = (grid - centre - shift) @ np.linalg.inv(matrix).T + centre
  frame_1 = scene(grid[..., 0], grid[..., 1])
  frame_2 = scene(source[..., 0], source[..., 1])
  return (jnp.asarray(a[None], jnp.float32) for a in (frame_1, frame_2, flow))
