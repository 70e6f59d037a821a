"""Flow from a pyramid of features, coarse to fine, as PWC-Net (1709.02371).

At each level: upsample the flow, warp the other frame's features by it,
correlate, and predict a residual. One estimator serves all levels (PWC-lite).
LayerNorm follows every convolution but those that put out a flow: without it
the joint training collapses (MC-JEPA, 2307.12698). Frames and flows are
interleaved, so one call estimates both directions. Convolutions compute in
`dtype`; features after their norm, cost volumes and flows are float32.
"""

import math
from typing import Any

import flax.linen as nn
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mcjepa_jax.errors import UserError
from mcjepa_jax.ops import cost_volume, flow_ops

_DILATIONS = (1, 2, 4, 8, 16, 1)


def _conv(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw c d"],
    *,
    dilation: int = 1,
    precision: lax.Precision | None = None,
) -> Float[Array, "n h w d"]:
  """The zero-padded cross-correlation that keeps the map's size."""
  return lax.conv_general_dilated(
      x,
      kernel,
      window_strides=(1, 1),
      padding="SAME",
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=precision,
  )


class _Conv(nn.Module):
  """A 3x3 convolution with nn.Conv's parameters."""

  channels: int
  dilation: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
    shape = (3, 3, x.shape[-1], self.channels)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, (self.channels,))
    # HIGHEST is for float32 alone: bfloat16 products are exact as they are.
    precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
    kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
    x = x.astype(self.dtype)
    return _conv(x, kernel, dilation=self.dilation, precision=precision) + bias


class _Layer(nn.Module):
  """Convolution, LayerNorm over channels, LeakyReLU."""

  channels: int
  dilation: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
    x = _Conv(self.channels, self.dilation, dtype=self.dtype, name="conv")(x)
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
    return nn.leaky_relu(x, 0.1)


class _Head(nn.Module):
  """A 3x3 convolution to a flow, over the square root of its fan-in.

  With the factor in the forward pass, an Adam step moves a flow by about
  learning_rate * sqrt(fan_in) pixels, not learning_rate * fan_in: without it
  the first steps throw the flow out of small images. A new head gives about
  1 / sqrt(fan_in), 0.01 pixel; not zero, because the layers below get their
  gradient through it.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w 2"]:
    return _Conv(2, name="conv")(x) / math.sqrt(9 * x.shape[-1])


class LevelEstimator(nn.Module):
  """A residual flow, and all maps that led to it, from one level's input."""

  channels: tuple[int, ...]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, x: Float[Array, "n h w c"]
  ) -> tuple[Float[Array, "n h w 2"], Float[Array, "n h w d"]]:
    x = x.astype(self.dtype)
    for i, channels in enumerate(self.channels):
      y = _Layer(channels, 1, self.dtype, name=f"layers_{i}")(x)
      x = jnp.concatenate([x, y], axis=-1)
    return _Head(name="head")(x), x


class ContextNetwork(nn.Module):
  """A residual flow that sees far: dilated convolutions over dense maps."""

  channels: tuple[int, ...]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w 2"]:
    for i, (channels, dilation) in enumerate(
        zip(self.channels, _DILATIONS, strict=True)
    ):
      x = _Layer(channels, dilation, self.dtype, name=f"layers_{i}")(x)
    return _Head(name="head")(x)


class FlowDecoder(nn.Module):
  """Directed flows at each stride from the coarsest to `finest_stride`."""

  strides: tuple[int, ...]  # of the incoming pyramid, fine to coarse
  finest_stride: int = 4  # finer levels are normalised, not estimated
  factor: float = 2.0  # the paper's C: widths of estimator and context
  channels: tuple[int, ...] = (128, 128, 96, 64, 32)
  context_channels: tuple[int, ...] = (128, 128, 128, 96, 64, 32)
  context: bool = True  # refines the finest flow
  radius: int = 4  # of the cost volume, in the level's own pixels
  projection: int = 32  # channels of the features that the estimator sees
  max_flow: float = 128.0  # pixels of full resolution
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, pyramid: list[Float[Array, "n _ _ _"]]
  ) -> tuple[list[Float[Array, "n _ _ _"]], dict[int, Float[Array, "n _ _ 2"]]]:
    """The normalised pyramid, and {stride: flows in the level's own pixels}."""
    if self.finest_stride not in self.strides:
      raise UserError(
          f"finest_stride: expected one of {self.strides}, the strides of the"
          f" encoder, got {self.finest_stride}"
      )
    features = [
        nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=f"norm_{stride}")(x)
        for stride, x in zip(self.strides, pyramid, strict=True)
    ]
    estimator = LevelEstimator(
        self._widths(self.channels), self.dtype, name="estimator"
    )
    flows = {}
    flow = jnp.zeros((*features[-1].shape[:3], 2), jnp.float32)
    for stride, x in reversed(list(zip(self.strides, features, strict=True))):
      if stride < self.finest_stride:
        break
      flow = flow_ops.resize_flow(flow, x.shape[1:3])
      warped = flow_ops.warp(flow_ops.swap_pairs(x), flow)
      cost = cost_volume.cost_volume(
          *flow_ops.normalize_pair(x, warped), radius=self.radius
      )
      project = nn.Dense(
          self.projection, dtype=self.dtype, name=f"project_{stride}"
      )
      level = [nn.leaky_relu(cost, 0.1), project(x), flow]
      residual, dense = estimator(jnp.concatenate(level, axis=-1))
      limit = self.max_flow / stride
      flow = jnp.clip(flow + residual, -limit, limit)
      if self.context and stride == self.finest_stride:
        refine = ContextNetwork(
            self._widths(self.context_channels), self.dtype, name="context"
        )
        flow = jnp.clip(flow + refine(dense), -limit, limit)
      flows[stride] = flow
    return features, flows

  def _widths(self, channels: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(self.factor * c) for c in channels)
