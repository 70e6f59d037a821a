"""Heads that give each pixel a class, over the stages of an encoder.

A head takes the stages fine to coarse and gives float32 logits on the finest
grid, the main ones first; auxiliary ones, of the training alone, follow.
Statistics of BatchNorm are of the global batch, as torch's SyncBatchNorm has
them: its momentum of 0.1 is Flax's 0.9.
"""

from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from mcjepa_jax.ops import flow_ops

_norm = functools.partial(
    nn.BatchNorm, momentum=0.9, epsilon=1e-5, dtype=jnp.float32
)
# As mmsegmentation's classifiers, and its other convolutions.
_CLASSIFIER_INIT = nn.initializers.normal(0.01)
_CONV_INIT = nn.initializers.he_normal()

Stages = Sequence[Float[Array, "n _ _ _"]]


def _classifier(classes: int, name: str) -> nn.Conv:
  return nn.Conv(classes, (1, 1), kernel_init=_CLASSIFIER_INIT, name=name)


class LinearHead(nn.Module):
  """VICRegL's: stages resized and concatenated, BatchNorm, 1x1 convolution."""

  classes: int

  @nn.compact
  def __call__(
      self, stages: Stages, *, train: bool
  ) -> list[Float[Array, "n h w k"]]:
    size = stages[0].shape[1:3]
    levels = [flow_ops.resize(x.astype(jnp.float32), size) for x in stages]
    x = jnp.concatenate(levels, axis=-1)
    x = _norm(use_running_average=not train, name="norm")(x)
    return [_classifier(self.classes, "classifier")(x)]


class ConvNorm(nn.Module):
  """A convolution without bias, BatchNorm and ReLU."""

  dim: int
  kernel: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, x: Float[Array, "n h w c"], *, train: bool
  ) -> Float[Array, "n h w d"]:
    x = nn.Conv(
        self.dim,
        (self.kernel, self.kernel),
        use_bias=False,
        dtype=self.dtype,
        kernel_init=_CONV_INIT,
        name="conv",
    )(x)
    x = _norm(use_running_average=not train, name="norm")(x)
    return nn.relu(x).astype(self.dtype)


def _bins(side: int, bins: int) -> np.ndarray:
  """[bins, side]: the mean over each bin, as in torch's adaptive pooling.

  Bin i is from floor(i side / bins) to ceil((i + 1) side / bins): neighbours
  overlap where `bins` does not divide `side`.
  """
  edges = np.arange(bins + 1) * side / bins
  place = np.arange(side)
  within = (place >= np.floor(edges[:-1, None])) & (
      place < np.ceil(edges[1:, None])
  )
  return (within / within.sum(axis=1, keepdims=True)).astype(np.float32)


def adaptive_mean(
    x: Float[Array, "n h w c"], bins: int
) -> Float[Array, "n bins bins c"]:
  """The means over bins x bins parts of the map."""
  rows, columns = _bins(x.shape[1], bins), _bins(x.shape[2], bins)
  return jnp.einsum(
      "yh,xw,nhwc->nyxc", rows, columns, x, precision="highest"
  ).astype(x.dtype)


class UperHead(nn.Module):
  """UperNet's pyramid pooling and FPN (arXiv 1807.10221), as ConvNeXt's.

  Each stage passes a LayerNorm first, as in ConvNeXt's own backbone. The
  auxiliary head is a convolution on the last stage but one.
  """

  classes: int
  channels: int = 512
  pool_scales: tuple[int, ...] = (1, 2, 3, 6)
  auxiliary_channels: int = 256
  dropout: float = 0.1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, stages: Stages, *, train: bool
  ) -> list[Float[Array, "n h w k"]]:
    def conv(dim, kernel, name):
      module = ConvNorm(dim, kernel, self.dtype, name=name)
      return functools.partial(module, train=train)

    def classified(x, name):
      # Whole channels, as Dropout2d.
      drop = nn.Dropout(self.dropout, broadcast_dims=(1, 2))
      x = drop(x.astype(jnp.float32), deterministic=not train)
      return _classifier(self.classes, name)(x)

    def resize(x, size):
      return flow_ops.resize(x.astype(jnp.float32), size).astype(self.dtype)

    stages = [
        nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"stage_norm_{i}")(x)
        for i, x in enumerate(stages)
    ]
    *finer, coarsest = stages
    size = coarsest.shape[1:3]
    pooled = [
        resize(conv(self.channels, 1, f"pool_{s}")(adaptive_mean(coarsest, s)),
               size)
        for s in self.pool_scales
    ]  # fmt: skip
    x = jnp.concatenate([coarsest, *pooled], axis=-1)
    levels = [conv(self.channels, 3, "bottleneck")(x)]
    for i, stage in reversed(list(enumerate(finer))):
      lateral = conv(self.channels, 1, f"lateral_{i}")(stage)
      levels.insert(0, lateral + resize(levels[0], stage.shape[1:3]))
    levels[:-1] = [
        conv(self.channels, 3, f"fpn_{i}")(x) for i, x in enumerate(levels[:-1])
    ]
    size = levels[0].shape[1:3]
    x = jnp.concatenate([resize(x, size) for x in levels], axis=-1)
    x = conv(self.channels, 3, "fpn_bottleneck")(x)
    logits = classified(x, "classifier")
    auxiliary = conv(self.auxiliary_channels, 3, "auxiliary")(stages[-2])
    return [logits, classified(auxiliary, "auxiliary_classifier")]
