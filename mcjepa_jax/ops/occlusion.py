"""Masks of the pixels that are visible in the other frame, from flow alone.

The conventions are those of flow_ops.
"""

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mcjepa_jax.ops import flow_ops


def visible_forward_backward(
    flow_12: Float[Array, "n h w 2"],
    flow_21: Float[Array, "n h w 2"],
    *,
    alpha: float = 0.01,
    beta: float = 0.5,
) -> Float[Array, "n h w 1"]:
  """1 where flow_21 brings a pixel of frame 1 back: "brox"; no gradient.

  Hidden where |f + b|^2 > alpha (|f|^2 + |b|^2) + beta, b = warp(flow_21, f).
  """
  forward = lax.stop_gradient(flow_12)
  backward = flow_ops.warp(lax.stop_gradient(flow_21), forward)

  def squared(x):
    return jnp.sum(x**2, axis=-1, keepdims=True)

  tolerance = alpha * (squared(forward) + squared(backward)) + beta
  return (squared(forward + backward) <= tolerance).astype(jnp.float32)


def _hats(
    corner: Float[Array, "n p"], offset: Float[Array, "n p"], size: int
) -> Float[Array, "n p size"]:
  """The linear weights of each sample on a line of `size` pixels."""
  distance = jnp.arange(size, dtype=jnp.float32) - corner[..., None]
  offset = offset[..., None]
  return jnp.where(distance == 0, 1 - offset, 0) + jnp.where(
      distance == 1, offset, 0
  )


def visible_range_map(
    flow_21: Float[Array, "n h w 2"], *, threshold: float | None = None
) -> Float[Array, "n h w 1"]:
  """How much of frame 2 arrives at a pixel of frame 1: "wang"; no gradient.

  The bilinear splat count of flow_21 on frame 1, clipped to [0, 1] (arXiv
  1711.05890); 1 where it reaches `threshold`, if that is given.
  """
  n, h, w, _ = flow_21.shape
  grid = flow_ops.pixel_grid(h, w)
  target = grid + lax.stop_gradient(flow_21).astype(jnp.float32)

  # The count is a product of the weights by row and by column: no scatter. A
  # row of frame 2 at a time, as all weights of a large image fill the memory.
  def add_row(count, points):
    corner = jnp.floor(points)
    offset = points - corner
    rows = _hats(corner[..., 1], offset[..., 1], h)
    columns = _hats(corner[..., 0], offset[..., 0], w)
    added = jnp.einsum(
        "npy,npx->nyx", rows, columns, precision=lax.Precision.HIGHEST
    )
    return count + added, None

  start = jnp.zeros((n, h, w), jnp.float32)
  count, _ = lax.scan(add_row, start, jnp.moveaxis(target, 1, 0))
  visible = jnp.clip(count, 0, 1)[..., None]
  if threshold is not None:
    visible = (visible >= threshold).astype(jnp.float32)
  return visible
