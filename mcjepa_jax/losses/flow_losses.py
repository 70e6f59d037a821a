"""Losses of self-supervised flow: photometric, smoothness, feature terms.

Directions are interleaved as in flow_ops: entry 2i of the batch is frame 1 of
pair i with flow_12, entry 2i + 1 is frame 2 with flow_21. Images are RGB in
[0, 1]. Masks are 1 where a pixel counts and get no gradient: it would reward
hiding what is hard to explain.
"""

from collections.abc import Callable
import functools
from typing import Literal

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.losses import vicreg
from mcjepa_jax.ops import flow_ops

_SSIM_RADIUS = 1
_CENSUS_RADIUS = 3

# Of maps over the pixels that count; `masked_mean` is one.
Mean = Callable[
    [Float[Array, "n h w c"], Float[Array, "n h w 1"] | None],
    Float[Array, ""],
]


def masked_mean(
    values: Float[Array, "n h w c"], mask: Float[Array, "n h w 1"] | None
) -> Float[Array, ""]:
  """Masked mean of the channel mean per direction, averaged over the two.

  Per direction sum(m x) / max(sum(m), 1); without a mask every pixel counts.
  """
  n = values.shape[0]
  if n % 2:
    raise errors.UserError(
        f"flow losses need both directions of each pair, got {n} maps"
    )
  if mask is None:
    return jnp.mean(values)
  sums, counts = masked_sums(values, mask)
  return jnp.mean(sums / jnp.maximum(counts, 1))


def masked_sums(
    values: Float[Array, "n h w c"], mask: Float[Array, "n h w 1"]
) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
  """Per direction sum(m x) and sum(m), x the channel mean."""
  n = values.shape[0]
  mask = lax.stop_gradient(mask)
  # Weights, where slices [0::2] would move a batch-sharded array.
  is_direction = (jnp.arange(n)[:, None] % 2 == jnp.arange(2)).astype(
      mask.dtype
  )
  sums, counts = (
      jnp.sum(jnp.sum(x, axis=(1, 2, 3))[:, None] * is_direction, axis=0)
      for x in (mask * jnp.mean(values, axis=-1, keepdims=True), mask)
  )
  return sums, counts


def erode(
    mask: Float[Array, "n h w 1"], radius: int
) -> Float[Array, "n h w 1"]:
  """The least value in each window of `radius`; outside the image it is 0."""
  # Padded here: reduce_window's own padding is +inf, which would keep borders.
  padding = ((0, 0), (radius, radius), (radius, radius), (0, 0))
  return _windows(
      jnp.pad(lax.stop_gradient(mask), padding), radius, jnp.inf, lax.min
  )


def l1_distance(
    x: Float[Array, "n h w c"], y: Float[Array, "n h w c"]
) -> Float[Array, "n h w 1"]:
  """Channel mean of |x - y|."""
  return jnp.mean(jnp.abs(x - y), axis=-1, keepdims=True)


def l2_distance(
    x: Float[Array, "n h w c"], y: Float[Array, "n h w c"]
) -> Float[Array, "n h w 1"]:
  """Channel mean of (x - y)^2."""
  return jnp.mean(jnp.square(x - y), axis=-1, keepdims=True)


def ssim_distance(
    x: Float[Array, "n h w c"], y: Float[Array, "n h w c"]
) -> Float[Array, "n h w 1"]:
  """Channel mean of (1 - SSIM) / 2 in 3x3 windows, 0 in the 1-pixel border.

  Uniform windows, biased variances, C1 = 0.01^2, C2 = 0.03^2. The border's
  windows leave the image; `erode` by 1 takes it out of the mean as well.
  """
  _check_window(x, _SSIM_RADIUS)
  # The four means that SSIM needs; var_x + var_y comes from one of them.
  mean_x, mean_y, mean_squares, mean_product = (
      _windows(values, _SSIM_RADIUS, 0.0, lax.add) / (2 * _SSIM_RADIUS + 1) ** 2
      for values in (x, y, jnp.square(x) + jnp.square(y), x * y)
  )
  c1, c2 = 0.01**2, 0.03**2
  product = mean_x * mean_y
  squares = jnp.square(mean_x) + jnp.square(mean_y)
  ssim = (2 * product + c1) * (2 * (mean_product - product) + c2)
  ssim /= (squares + c1) * (mean_squares - squares + c2)
  distance = jnp.clip((1 - ssim) / 2, 0, 1)
  return _pad(jnp.mean(distance, axis=-1, keepdims=True), _SSIM_RADIUS)


def census_distance(
    x: Float[Array, "n h w 3"], y: Float[Array, "n h w 3"]
) -> Float[Array, "n h w 1"]:
  """Robust soft Hamming distance of 7x7 census signs, 0 in the 3-pixel border.

  On gray * 255: t = d / sqrt(0.81 + d^2) of the differences d to a pixel's 48
  neighbours, s = sum (t_x - t_y)^2 / (0.1 + (t_x - t_y)^2), (s + 0.01)^0.4.
  """
  _check_window(x, _CENSUS_RADIUS)
  x, y = _gray(x), _gray(y)
  radius = _CENSUS_RADIUS
  centre_x, centre_y = (
      image[:, radius:-radius, radius:-radius] for image in (x, y)
  )

  # A rematerialised scan keeps one map where a stack keeps 96. On two CPU
  # cores at 32x64x64 with the gradient: 25 ms, 5 MiB and 0.5 s to compile;
  # stacked 98 ms and 123 MiB, unrolled 69 ms and 5 s to compile.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def add_neighbour(total, offset):
    sign_x, sign_y = (
        _soft_sign(lax.dynamic_slice(image, (0, *offset), total.shape) - centre)
        for image, centre in ((x, centre_x), (y, centre_y))
    )
    squared = jnp.square(sign_x - sign_y)
    return total + squared / (0.1 + squared), None

  offsets = np.argwhere(np.ones((2 * radius + 1, 2 * radius + 1)))
  offsets = offsets[np.any(offsets != radius, axis=1)]
  total, _ = lax.scan(add_neighbour, jnp.zeros_like(centre_x), offsets)
  return _pad((total + 0.01)[..., None] ** 0.4, radius)


def photometric_loss(
    x: Float[Array, "n h w 3"],
    y: Float[Array, "n h w 3"],
    mask: Float[Array, "n h w 1"] | None,
    *,
    l1: float = 0.15,
    l2: float = 0.0,
    ssim: float = 0.85,
    census: float = 0.0,
    mean: Mean = masked_mean,
) -> Float[Array, ""]:
  """Weighted sum of the distances' masked means; a weight of 0 costs nothing.

  For SSIM and census only pixels whose whole window counts do.
  """
  if mask is None:
    mask = jnp.ones((*x.shape[:3], 1))
  loss = jnp.zeros(())
  for weight, distance, radius in (
      (l1, l1_distance, 0),
      (l2, l2_distance, 0),
      (ssim, ssim_distance, _SSIM_RADIUS),
      (census, census_distance, _CENSUS_RADIUS),
  ):
    if weight:
      kept = erode(mask, radius) if radius else mask
      loss += weight * mean(distance(x, y), kept)
  return loss


def smoothness_loss(
    flow: Float[Array, "n h w 2"],
    image: Float[Array, "n h w c"],
    *,
    form: Literal["arflow", "uflow"] = "arflow",
    order: Literal[1, 2] = 1,
    edge_weight: float = 10.0,
) -> Float[Array, ""]:
  """Edge-aware smoothness of order k, (S_x + S_y) / 2.

  S_x is the mean over pixels and components of |d^k flow / dx^k| exp(
  -edge_weight mean_c |d image / dx|).
  "arflow" (arXiv 2003.13045): of flow / min(h, w), so on a stride-s grid its
    weight is to be divided by s^k; edge_weight 10; the image's difference is
    the last of the k neighbouring ones.
  "uflow" (arXiv 2006.04902): of flow in pixels, |x| = sqrt(x^2 + 1e-6);
    edge_weight 150; the image's difference spans the k pixels.
  """
  if form == "arflow":
    flow = flow / min(flow.shape[1:3])
  step = order if form == "uflow" else 1
  means = []
  for axis in (2, 1):
    change = flow
    for _ in range(order):
      change = _difference(change, axis)
    if form == "uflow":
      change = jnp.sqrt(jnp.square(change) + 1e-6)
    else:
      change = jnp.abs(change)
    edge = jnp.abs(_difference(image, axis, step))
    edge = lax.slice_in_dim(edge, order - step, None, axis=axis)
    edge = jnp.mean(edge, axis=-1, keepdims=True)
    means.append(jnp.mean(change * jnp.exp(-edge_weight * edge)))
  return (means[0] + means[1]) / 2


def feature_regression_loss(
    x_1: Float[Array, "n h w c"],
    warped_2: Float[Array, "n h w c"],
    mask: Float[Array, "n h w 1"] | None,
    *,
    mean: Mean = masked_mean,
) -> Float[Array, ""]:
  """Masked mean of (x_1 - warp(x_2, flow_12))^2, of which the warp is given.

  Both features and the flow get gradients. Constant features minimise it: see
  `feature_variance_loss`.
  """
  return mean(l2_distance(x_1, warped_2), mask)


def cycle_loss(
    x_1: Float[Array, "n h w c"],
    there: Float[Array, "n h w c"],
    flow_12: Float[Array, "n h w 2"],
    mask: Float[Array, "n h w 1"] | None,
    *,
    mean: Mean = masked_mean,
) -> Float[Array, ""]:
  """Masked mean of (x_1 - warp(there, flow_12))^2, there = warp(x_1, flow_21).

  Features and both flows get gradients. Sampling twice blurs, so a perfect
  half-pixel flow does not reach 0.
  """
  return mean(l2_distance(x_1, flow_ops.warp(there, flow_12)), mask)


def feature_variance_loss(
    x: Float[Array, "n h w d"], *, gamma: float = 1.0, eps: float = 1e-4
) -> Float[Array, ""]:
  """VICReg's variance hinge with every position of the batch as a sample."""
  return vicreg.variance_loss(x.reshape(-1, x.shape[-1]), gamma=gamma, eps=eps)


def feature_covariance_loss(x: Float[Array, "n h w d"]) -> Float[Array, ""]:
  """VICReg's covariance with every position of the batch as a sample."""
  return vicreg.covariance_loss(x.reshape(-1, x.shape[-1]))


def _windows(
    x: Float[Array, "n h w c"],
    radius: int,
    initial: float,
    combine: Callable[[Array, Array], Array],
) -> Float[Array, "n _ _ c"]:
  """`combine` over each whole window, rows first: smaller by 2 radius."""
  # reduce_window: SSIM with its gradient at 32x64x64 takes 10 ms on two CPU
  # cores, 20 as shifted sums.
  for axis in (1, 2):
    window = [2 * radius + 1 if i == axis else 1 for i in range(4)]
    x = lax.reduce_window(x, initial, combine, window, (1, 1, 1, 1), "VALID")
  return x


def _pad(x: Float[Array, "n _ _ c"], radius: int) -> Float[Array, "n h w c"]:
  return jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)))


def _gray(image: Float[Array, "n h w 3"]) -> Float[Array, "n h w"]:
  # Products and a sum: a dot would be bfloat16 on TPU, times 255.
  return 255 * jnp.sum(image * jnp.array([0.2989, 0.587, 0.114]), axis=-1)


def _soft_sign(x: Float[Array, "n h w"]) -> Float[Array, "n h w"]:
  return x * lax.rsqrt(0.81 + jnp.square(x))


def _difference(
    x: Float[Array, "n _ _ c"], axis: int, step: int = 1
) -> Float[Array, "n _ _ c"]:
  return lax.slice_in_dim(x, step, None, axis=axis) - lax.slice_in_dim(
      x, 0, -step, axis=axis
  )


def _check_window(x: Float[Array, "n h w c"], radius: int) -> None:
  if min(x.shape[1:3]) <= 2 * radius:
    raise errors.UserError(
        f"a photometric window of {2 * radius + 1} pixels needs an image that"
        f" large, got {x.shape[1]}x{x.shape[2]}"
    )
