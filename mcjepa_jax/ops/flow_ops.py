"""Geometry of optical flow: grids, warps, resizes, cost volumes and masks.

Conventions:
  flow[..., 0] is u (x, to the right), flow[..., 1] is v (y, down), in pixels of
    the grid that the flow lives on.
  flow_12 lives on frame 1's grid and points into frame 2, so that
    frame_1(p) ~ frame_2(p + flow_12(p)) = warp(frame_2, flow_12)(p).
  Sampling: pixel centres have integer coordinates, (0, 0) is the top left one.
  Resizing: pixels are squares (half-pixel centres), and a flow's vectors are
    scaled with its grid.
  Pairs are interleaved: entries 2i and 2i + 1 of the batch are the two frames,
    or the two directions, of pair i.
  Masks are float, 1 where a pixel counts.
All is float32, products at precision HIGHEST: the default is bfloat16 on TPU
and TF32 on GPU, which moves a sample by whole pixels on a large image.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

_HIGHEST = lax.Precision.HIGHEST


def pixel_grid(h: int, w: int) -> Float[Array, "h w 2"]:
  """The coordinates (x, y) of each pixel centre."""
  x, y = jnp.meshgrid(jnp.arange(w), jnp.arange(h))
  return jnp.stack([x, y], axis=-1).astype(jnp.float32)


def swap_pairs(x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
  """The batch with the two entries of each pair exchanged."""
  return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _corners(
    flow: Float[Array, "n h w 2"],
) -> tuple[Float[Array, "n h w 2"], Float[Array, "n h w 2"]]:
  """The corner left above each clamped sample, and the offset from it."""
  h, w = flow.shape[1:3]
  last = jnp.array([w - 1, h - 1], jnp.float32)
  sample = jnp.clip(pixel_grid(h, w) + flow, 0, last)
  # floor and floor + 1 differ at integers too, so a zero flow has a gradient;
  # the last pixel is the far corner of its cell for the same reason.
  corner = lax.stop_gradient(jnp.minimum(jnp.floor(sample), last - 1))
  corner = jnp.maximum(corner, 0)
  return corner, sample - corner


def warp(
    x: Float[Array, "n h w c"], flow: Float[Array, "n h w 2"]
) -> Float[Array, "n h w c"]:
  """The map sampled at p + flow(p): backward bilinear warp.

  Coordinates are clamped, so that a sample outside takes the border's value;
  `inside` says where. The gradient of a flow that points out of the image is
  zero.

  Four gathers, batched, so that a sharded n stays where it is. One form for all
  backends: on two CPU cores a product with the matrix of weights, which spares
  the gradient's scatter, takes 4.4 times as long at 32x16x16x32 and 1.5 times
  at 32x8x8x64, and more on larger maps.
  """
  n, h, w, c = x.shape
  near, offset = _corners(flow.astype(jnp.float32))
  flat = x.astype(jnp.float32).reshape(n, h * w, c)

  def corner(dx, dy):
    column = jnp.minimum(near[..., 0].astype(jnp.int32) + dx, w - 1)
    row = jnp.minimum(near[..., 1].astype(jnp.int32) + dy, h - 1)
    index = (row * w + column).reshape(n, h * w, 1)
    value = jnp.take_along_axis(flat, index, axis=1, mode="clip")
    weight_x = offset[..., 0] if dx else 1 - offset[..., 0]
    weight_y = offset[..., 1] if dy else 1 - offset[..., 1]
    return value.reshape(x.shape) * (weight_x * weight_y)[..., None]

  return corner(0, 0) + corner(1, 0) + corner(0, 1) + corner(1, 1)


def inside(flow: Float[Array, "n h w 2"]) -> Float[Array, "n h w 1"]:
  """1 where p + flow(p) lies in [0, w - 1] x [0, h - 1]; no gradient."""
  h, w = flow.shape[1:3]
  sample = pixel_grid(h, w) + lax.stop_gradient(flow)
  last = jnp.array([w - 1, h - 1], jnp.float32)
  within = jnp.all((sample >= 0) & (sample <= last), axis=-1, keepdims=True)
  return within.astype(jnp.float32)


def resize(
    x: Float[Array, "n h w c"], size: tuple[int, int]
) -> Float[Array, "n hs ws c"]:
  """The map at `size` (h, w): bilinear, half-pixel centres.

  A smaller size is smoothed against aliasing.
  """
  return jax.image.resize(
      x, (x.shape[0], *size, x.shape[3]), "bilinear", precision=_HIGHEST
  )


def resize_flow(
    flow: Float[Array, "n h w 2"], size: tuple[int, int]
) -> Float[Array, "n hs ws 2"]:
  """The flow at `size` (h, w), its vectors in pixels of the new grid."""
  h, w = flow.shape[1:3]
  scale = jnp.array([size[1] / w, size[0] / h], flow.dtype)
  return resize(flow, size) * scale


def area_mean(
    x: Float[Array, "n h w c"], factor: int
) -> Float[Array, "n hs ws c"]:
  """The mean over each factor x factor block, as for a mask's coarser level."""
  n, h, w, c = x.shape
  blocks = x.reshape(n, h // factor, factor, w // factor, factor, c)
  return blocks.mean(axis=(2, 4))


def normalize_pair(
    x_1: Float[Array, "n h w c"], x_2: Float[Array, "n h w c"]
) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"]]:
  """Both maps with the pair's mean taken off and over the pair's deviation.

  Mean and variance are over h, w and c of each map, averaged over the two;
  never over the batch, which would couple its examples. As UFlow.
  """
  axes = (1, 2, 3)
  mean = (x_1.mean(axes, keepdims=True) + x_2.mean(axes, keepdims=True)) / 2
  variance = (x_1.var(axes, keepdims=True) + x_2.var(axes, keepdims=True)) / 2
  scale = lax.rsqrt(variance + 1e-6)
  return (x_1 - mean) * scale, (x_2 - mean) * scale


def _shifted(
    x_1: Float[Array, "n h w c"], x_2: Float[Array, "n h w c"], radius: int
) -> Float[Array, "n h w k"]:
  """The cost volume as one product and sum for each offset."""
  h, w = x_1.shape[1:3]
  pad = (radius, radius)
  padded = jnp.pad(x_2, ((0, 0), pad, pad, (0, 0)))
  size = 2 * radius + 1
  costs = [
      jnp.mean(x_1 * padded[:, dy : dy + h, dx : dx + w], axis=-1)
      for dy in range(size)
      for dx in range(size)
  ]
  return jnp.stack(costs, axis=-1)


def _rows(
    x_1: Float[Array, "n h w c"], x_2: Float[Array, "n h w c"], radius: int
) -> Float[Array, "n h w k"]:
  """The cost volume by the offsets of one row after the other: `_shifted` looped.

  A ninth of the program, to compile; each row reads both maps again.
  """
  n, h, w, _ = x_1.shape
  pad = (radius, radius)
  padded = jnp.pad(x_2, ((0, 0), pad, pad, (0, 0)))
  size = 2 * radius + 1

  @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps no row's slice
  def costs_of_row(_, dy):
    rows = lax.dynamic_slice_in_dim(padded, dy, h, axis=1)
    costs = [
        jnp.mean(x_1 * rows[:, :, dx : dx + w], axis=-1) for dx in range(size)
    ]
    return None, jnp.stack(costs, axis=-1)

  _, costs = lax.scan(costs_of_row, None, jnp.arange(size))
  return jnp.moveaxis(costs, 0, 3).reshape(n, h, w, size * size)


def _diagonals(
    x: Float[Array, "n p q m"], radius: int
) -> Float[Array, "n p k m"]:
  """The 2 radius + 1 diagonals, [p, p + radius] the last; zero outside.

  A row longer by one than the matrix turns its diagonals into columns: padding
  and reshapes alone, in the gradient too.
  """
  n, p, q, m = x.shape
  x = jnp.pad(x, ((0, 0), (0, 0), (radius, radius), (0, 0)))
  x = x.reshape(n, p * (q + 2 * radius), m)
  x = jnp.pad(x, ((0, 0), (0, p), (0, 0)))
  return x.reshape(n, p, q + 2 * radius + 1, m)[:, :, : 2 * radius + 1]


def _banded(
    x_1: Float[Array, "n h w c"], x_2: Float[Array, "n h w c"], radius: int
) -> Float[Array, "n h w k"]:
  """The cost volume as the product of all rows, then its diagonals."""
  n, h, w, c = x_1.shape
  size = 2 * radius + 1
  # n, row 1, row 2, column 1, column 2: each pair of axes gives its diagonals.
  product = jnp.einsum("nyxc,nvuc->nyvxu", x_1, x_2, precision=_HIGHEST) / c
  product = _diagonals(product.reshape(n, h, h, w * w), radius)
  product = product.reshape(n * h * size, w, w, 1)
  product = _diagonals(product, radius).reshape(n, h, size, w, size)
  return product.transpose(0, 1, 3, 2, 4).reshape(n, h, w, size * size)


_COST_VOLUMES: dict[str, Callable[..., Array]] = {
    "banded": _banded,
    "rows": _rows,
    "shifts": _shifted,
}
_COST_VOLUME_FORM = {"cpu": "shifts", "gpu": "shifts", "tpu": "rows"}
# The largest map, in pixels, for the product of all rows, whose cost grows with
# the square of it. On two CPU cores with the gradient, 8 maps: 16x24x64 takes 8
# ms, 32 by shifts; 32x48x32 takes 184 ms, 65 by shifts.
_COST_VOLUME_BY_PRODUCT = {"cpu": 768, "gpu": 0, "tpu": 0}


def cost_volume(
    x_1: Float[Array, "n h w c"],
    x_2: Float[Array, "n h w c"],
    *,
    radius: int = 4,
    form: str | None = None,
) -> Float[Array, "n h w k"]:
  """The correlation mean_c x_1(p) x_2(p + d) for |dx|, |dy| <= radius.

  Channel (dy + radius) (2 radius + 1) + (dx + radius) holds d = (dx, dy); x_2 is
  zero outside of its grid.
  """
  if form is None:
    backend = jax.default_backend()
    small = x_1.shape[1] * x_1.shape[2] <= _COST_VOLUME_BY_PRODUCT[backend]
    form = "banded" if small else _COST_VOLUME_FORM[backend]
  return _COST_VOLUMES[form](
      x_1.astype(jnp.float32), x_2.astype(jnp.float32), radius
  )


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
  backward = warp(lax.stop_gradient(flow_21), forward)

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
  target = pixel_grid(h, w) + lax.stop_gradient(flow_21).astype(jnp.float32)

  # The count is a product of the weights by row and by column: no scatter. A
  # row of frame 2 at a time, as all weights of a large image fill the memory.
  def add_row(count, points):
    corner = jnp.floor(points)
    offset = points - corner
    rows = _hats(corner[..., 1], offset[..., 1], h)
    columns = _hats(corner[..., 0], offset[..., 0], w)
    added = jnp.einsum("npy,npx->nyx", rows, columns, precision=_HIGHEST)
    return count + added, None

  start = jnp.zeros((n, h, w), jnp.float32)
  count, _ = lax.scan(add_row, start, jnp.moveaxis(target, 1, 0))
  visible = jnp.clip(count, 0, 1)[..., None]
  if threshold is not None:
    visible = (visible >= threshold).astype(jnp.float32)
  return visible
