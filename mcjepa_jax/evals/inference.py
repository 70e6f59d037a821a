"""Compiled forward passes over uint8 arrays, on any number of devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import davis, frozen_features, tiling
from mcjepa_jax.models import mcjepa
from mcjepa_jax.ops import flow_ops

_EMBEDDED = 128  # images of a forward pass

Params = Any


@functools.cache
def _flow_forward(model: mcjepa.MCJEPA, mesh: jax.sharding.Mesh):
  """The jitted flow of frames of any size; one for all parameters."""
  coarsest = model.encoder.strides[-1]
  batch = sharding.batch_sharding(mesh)

  @functools.partial(jax.jit, in_shardings=(None, batch), static_argnums=2)
  def forward(params, frames, size):
    frames = frames.astype(jnp.float32) / 255
    grid = tuple(-(-side // coarsest) * coarsest for side in size)
    if grid != size:
      frames = flow_ops.resize(frames, grid)
    _, flows = model.apply({"params": params}, frames, method=model.motion)
    return flow_ops.resize_flow(flows[min(flows)], size)

  return forward


def flow_predictor(
    model: mcjepa.MCJEPA, params: Params, mesh: jax.sharding.Mesh
) -> tiling.Predictor:
  """A function from interleaved u8 frames of any size to flow_12.

  Frames are resized to the next multiple of the coarsest stride, the flow back
  to the frames' size with its vectors scaled. Compiles for each size once, and
  again for more pairs than all before.
  """
  forward, count = _flow_forward(model, mesh), mesh.devices.size
  most: dict[tuple[int, int], int] = {}  # pairs of a size

  def predict(frames):
    pairs, size = frames.shape[0] // 2, frames.shape[1:3]
    # Padded with repeats up to what is compiled, which the devices divide; the
    # rest is dropped.
    most[size] = max(most.get(size, 0), -(-pairs // count) * count)
    rows = np.arange(2 * most[size]) % frames.shape[0]
    flows = forward(params, frames[rows], size)
    return np.asarray(flows)[0 : 2 * pairs : 2]

  return predict


@functools.cache
def _pooled_forward(model: mcjepa.MCJEPA, mesh: jax.sharding.Mesh):
  """The jitted pooled features; one for all parameters."""
  batch = sharding.batch_sharding(mesh)

  @functools.partial(jax.jit, in_shardings=(None, batch))
  def forward(params, images):
    images = images.astype(jnp.float32) / 255
    return model.apply({"params": params}, images, method=model.pooled)

  return forward


def _finite(features, module=jnp):
  """The features; raises UserError for those that no metric is of."""
  if not module.isfinite(features).all():
    raise errors.UserError(
        "features: expected finite ones of the encoder, got NaN or infinity"
    )
  return features


def embedder(
    model: mcjepa.MCJEPA, params: Params, mesh: jax.sharding.Mesh
) -> frozen_features.Embedder:
  """A function from u8 images to pooled encoder features."""
  forward, count = _pooled_forward(model, mesh), mesh.devices.size
  size = -(-_EMBEDDED // count) * count

  def embed(images):
    parts = []
    for start in range(0, len(images), size):
      part = images[start : start + size]
      rows = np.arange(size) % len(part)
      parts.append(np.asarray(forward(params, part[rows]))[: len(part)])
    return _finite(np.concatenate(parts), np)

  return embed


@functools.cache
def _dense_forward(model: mcjepa.MCJEPA, mesh: jax.sharding.Mesh):
  """The jitted unit features of each cell; one for all parameters."""
  level_of = {stride: i for i, stride in enumerate(model.encoder.strides)}
  batch = sharding.batch_sharding(mesh)

  @functools.partial(jax.jit, in_shardings=(None, batch), static_argnums=(2, 3))
  def forward(params, frames, grid, stride):
    frames = flow_ops.resize(frames.astype(jnp.float32) / 255, grid)
    pyramid = model.apply(
        {"params": params}, frames, method=lambda m, x: m.encoder(x)
    )
    x = pyramid[level_of[stride]].astype(jnp.float32)
    # Each level passes a LayerNorm before any use: its mean goes here, its
    # scale with the length.
    return davis.unit(x - jnp.mean(x, axis=-1, keepdims=True))

  return forward


def check_stride(stride: int, strides: tuple[int, ...]) -> None:
  """Raises UserError for a stride at which the encoder has no level."""
  if stride not in strides:
    raise errors.UserError(
        f"davis.stride: expected one of {strides}, the encoder's, got {stride}"
    )


def dense_extractor(
    model: mcjepa.MCJEPA,
    params: Params,
    mesh: jax.sharding.Mesh,
    *,
    size: int,
    stride: int,
) -> davis.Extractor:
  """A function from u8 frames, which the devices divide, to a level's features.

  The short side of a frame becomes `size`, both a multiple of the coarsest
  stride. The features lie on the first device. Compiles once per shape.

  Raises:
    UserError: the encoder has no such stride.
  """
  strides = model.encoder.strides
  check_stride(stride, strides)
  forward = _dense_forward(model, mesh)

  def extract(frames):
    grid = davis.feature_grid(
        frames.shape[1:3], size=size, multiple=strides[-1]
    )
    features = _finite(forward(params, frames, grid, stride))
    return jax.device_put(features, mesh.devices.flat[0])

  return extract
