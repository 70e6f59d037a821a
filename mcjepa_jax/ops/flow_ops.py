"""Geometry of optical flow: grids, warps and resizes.

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
