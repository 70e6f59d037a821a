"""ConvNeXt (arXiv 2201.03545) as an encoder: images in, a pyramid out.

Parameters carry timm's names with `_` for the dot before a list index
(stages_0/blocks_1/mlp/fc1), so that an export is a regular expression.
Parameters are float32; `dtype` is what the layers compute in.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from mcjepa_jax.ops import depthwise

# The rows that a part's examples have in the whole batch, and the whole's size.
BatchRows = tuple[Int[Array, " n"], int]

REMAT = ("none", "stage", "block")

VARIANTS = {
    "atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    "femto": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    "pico": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    "nano": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    "tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# torch's trunc_normal_(std=0.02) cuts at +-2 absolute, 100 standard deviations
# out, so what the authors trained from is the plain normal.
#
# In narrow layers that std makes blocks which barely act for hundreds of steps,
# and cost volumes that say little: "fan_in" keeps the signal's size at any
# width. On the quickstart's pairs flow learned from "fan_in" in 150 steps, and
# not at all in 200 from "normal".
_INITS = {
    "normal": nn.initializers.normal(0.02),
    "fan_in": nn.initializers.lecun_normal(),
}

# XLA's compiler for TPUs takes 14 s of CPU for each block at ConvNeXt-T's widths;
# elsewhere compiling is not what costs, and a loop copies the parameters.
_LOOP = {"cpu": False, "gpu": False, "tpu": True}


def _patches(x: Float[Array, "n h w c"], side: int) -> Float[Array, "n _ _ _"]:
  """The map's squares of a side, each flat: what no square fills is left out.

  A convolution whose squares do not overlap is their product with a matrix. XLA's
  compiler for TPUs takes 50 s of CPU for three such convolutions at ConvNeXt-T's
  widths with their gradients.
  """
  n, h, w, c = x.shape
  h, w = h // side, w // side
  x = x[:, : h * side, : w * side].reshape(n, h, side, w, side, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, side * side * c)


class Conv(nn.Module):
  """A dense convolution with a bias."""

  dim: int
  kernel: int
  stride: int
  padding: int = 0
  dtype: Any = jnp.float32
  kernel_init: str = "normal"

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n _ _ d"]:
    shape = (self.kernel, self.kernel, x.shape[-1], self.dim)
    kernel = self.param("kernel", _INITS[self.kernel_init], shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, shape[-1:], jnp.float32)
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    if self.kernel == self.stride and not self.padding:
      return _patches(x, self.stride) @ kernel.reshape(-1, self.dim) + bias
    padding = ((self.padding, self.padding),) * 2
    y = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(self.stride, self.stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias


class DepthwiseConv(nn.Module):
  """A 7x7 depthwise convolution with a bias."""

  dtype: Any = jnp.float32
  kernel_init: str = "normal"

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    c = x.shape[-1]
    kernel = self.param(
        "kernel", _INITS[self.kernel_init], (7, 7, 1, c), jnp.float32
    )
    bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    return depthwise.depthwise_conv(x, kernel) + bias


def _gelu(x):
  # Exact, as nn.gelu's erfc form is, whose gradient is four times slower on
  # CPU (29 ms against 7 for 5.2M values).
  return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


class Mlp(nn.Module):
  """Two dense layers with an exact GELU between, width times 4 inside."""

  dtype: Any = jnp.float32
  kernel_init: str = "normal"

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    dense = functools.partial(
        nn.Dense, kernel_init=_INITS[self.kernel_init], dtype=self.dtype
    )
    c = x.shape[-1]
    # Flat: of four axes, XLA on CPU copies a transpose of the gradient for the
    # kernel's own gradient (28 ms against 8 for 32 -> 128 at 40,960 positions).
    y = _gelu(dense(4 * c, name="fc1")(x.reshape(-1, c)))
    return dense(c, name="fc2")(y).reshape(x.shape)


class Block(nn.Module):
  """A residual block; drop path drops its branch whole, per example."""

  layer_scale: float | None = None
  dtype: Any = jnp.float32
  kernel_init: str = "normal"

  @nn.compact
  def __call__(
      self,
      x: Float[Array, "n h w c"],
      *,
      drop_path: float | Float[Array, ""] = 0.0,
      key: Any = None,
      batch_rows: BatchRows | None = None,
  ) -> Float[Array, "n h w c"]:
    y = DepthwiseConv(self.dtype, self.kernel_init, name="conv_dw")(x)
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(y)
    y = Mlp(self.dtype, self.kernel_init, name="mlp")(y)
    if self.layer_scale is not None:
      init = nn.initializers.constant(self.layer_scale)
      gamma = self.param("gamma", init, (x.shape[-1],), jnp.float32)
      y = y * gamma.astype(self.dtype)
    if key is not None:  # without one nothing is dropped
      keep = jnp.asarray(1 - drop_path, jnp.float32)
      taken, count = batch_rows or (slice(None), x.shape[0])
      kept = jax.random.bernoulli(key, keep, (count, 1, 1, 1))[taken]
      y = jnp.where(kept, y / keep, 0).astype(self.dtype)
    return x + y


def _once(
    module: nn.Module, x: Float[Array, "n h w c"], **kwargs: Any
) -> Float[Array, "n h2 w2 d"]:
  return module(x, **kwargs)


def _again(
    module: nn.Module, x: Float[Array, "n h w c"], **kwargs: Any
) -> Float[Array, "n h2 w2 d"]:
  """The module's result, which backward computes again from its input."""
  return nn.remat(functools.partial(_once, **kwargs))(module, x)


class Stage(nn.Module):
  """LayerNorm and a 2x2 stride-2 convolution (not in stage 0), then blocks."""

  dim: int
  downsamples: bool
  drop_paths: tuple[float, ...]
  layer_scale: float | None = None
  dtype: Any = jnp.float32
  kernel_init: str = "normal"
  remat: bool = False  # each block
  loop: bool = False

  def setup(self):
    if self.downsamples:
      norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
      self.downsample = [
          norm,
          Conv(self.dim, 2, 2, 0, self.dtype, self.kernel_init),
      ]
    self.blocks = [
        Block(self.layer_scale, self.dtype, self.kernel_init)
        for _ in self.drop_paths
    ]

  def __call__(
      self,
      x: Float[Array, "n h w c"],
      *,
      deterministic: bool = True,
      batch_rows: BatchRows | None = None,
  ) -> Float[Array, "n h2 w2 d"]:
    if self.downsamples:
      for layer in self.downsample:
        x = layer(x)
    keys = None
    if any(self.drop_paths) and not deterministic:
      keys = jax.random.split(self.make_rng("drop_path"), len(self.drop_paths))
    if self.loop and not self.is_initializing():
      return self._loop(x, keys, batch_rows)
    run = _again if self.remat else _once
    for i, (block, rate) in enumerate(
        zip(self.blocks, self.drop_paths, strict=True)
    ):
      key = keys[i] if keys is not None and rate else None
      x = run(block, x, drop_path=rate, key=key, batch_rows=batch_rows)
    return x

  def _loop(self, x, keys, batch_rows):
    """The blocks by one program, run on the parameters of each in turn."""
    block = Block(self.layer_scale, self.dtype, self.kernel_init, parent=None)

    def body(x, one):
      params, rate, key = one
      options = dict(drop_path=rate, key=key, batch_rows=batch_rows)
      return block.apply({"params": params}, x, **options), None

    params = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(block.variables["params"] for block in self.blocks),
    )
    if self.remat:
      body = jax.checkpoint(body, prevent_cse=False)  # a loop prevents it
    return lax.scan(body, x, (params, jnp.array(self.drop_paths), keys))[0]


class ConvNeXt(nn.Module):
  """ConvNeXt without its head; `pool` gives what a head would read."""

  depths: tuple[int, ...] = (3, 3, 9, 3)
  dims: tuple[int, ...] = (96, 192, 384, 768)
  # "split": 4x4/s2, LayerNorm, GELU, 3x3/s2, LayerNorm, where the pyramid's
  # stride 2 is what the first LayerNorm gives; "patch": timm's own 4x4/s4.
  stem: str = "split"
  # Rate of the last block; the rates grow linearly over the blocks from 0.
  drop_path: float = 0.1
  # Initial value of each block's gamma; None for no gamma.
  layer_scale: float | None = None
  dtype: Any = jnp.float32
  # "normal", as timm, or "fan_in", for narrow models; see _INITS.
  kernel_init: str = "normal"
  # What backward computes again rather than keeps: "none", all but the inputs of
  # each "stage" or of each "block".
  remat: str = "none"
  # A stage's blocks as one compiled loop: less to compile. None is as _LOOP.
  loop: bool | None = None

  @property
  def strides(self) -> tuple[int, ...]:
    """The stride of each level of the pyramid, fine to coarse."""
    stages = tuple(4 * 2**i for i in range(len(self.depths)))
    return (2, *stages) if self.stem == "split" else stages

  def setup(self):
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
    conv = functools.partial(
        Conv, self.dims[0], dtype=self.dtype, kernel_init=self.kernel_init
    )
    if self.stem == "split":
      # Numbered as in a torch Sequential, where the GELU would be stem_2.
      self.stem_0, self.stem_1 = conv(kernel=4, stride=2, padding=1), norm()
      self.stem_3, self.stem_4 = conv(kernel=3, stride=2, padding=1), norm()
    elif self.stem == "patch":
      self.stem_0, self.stem_1 = conv(kernel=4, stride=4), norm()
    else:
      raise ValueError(f"stem is 'split' or 'patch', got {self.stem!r}")
    if self.remat not in REMAT:
      raise ValueError(f"remat is one of {REMAT}, got {self.remat!r}")
    ends = np.cumsum(self.depths)
    rates = np.split(np.linspace(0, self.drop_path, ends[-1]), ends[:-1])
    loop = self.loop
    if loop is None:
      loop = _LOOP[jax.default_backend()]
    self.stages = [
        Stage(
            dim,
            i > 0,
            tuple(rate.tolist()),
            self.layer_scale,
            self.dtype,
            self.kernel_init,
            self.remat == "block",
            loop and len(rate) > 1,
        )
        for i, (dim, rate) in enumerate(zip(self.dims, rates, strict=True))
    ]
    self.norm = nn.LayerNorm(epsilon=1e-6)

  def __call__(
      self,
      images: Float[Array, "n h w 3"],
      *,
      deterministic: bool = True,
      batch_rows: BatchRows | None = None,
  ) -> list[Float[Array, "n _ _ _"]]:
    """The pyramid of images in [0, 1], fine to coarse, as `strides` says.

    With `deterministic=False` drop path needs an rng named "drop_path"; the
    examples at some rows of a batch lose the paths that they lose in it.
    """
    x = (images - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)
    coarsest = self.strides[-1]
    if images.shape[1] % coarsest or images.shape[2] % coarsest:
      raise ValueError(
          f"height and width are multiples of {coarsest}, the coarsest stride;"
          f" got images of {images.shape[1]}x{images.shape[2]}"
      )
    pyramid = []
    x = self.stem_1(self.stem_0(x.astype(self.dtype)))
    if self.stem == "split":
      pyramid.append(x)
      x = self.stem_4(self.stem_3(_gelu(x)))
    run = _again if self.remat == "stage" else _once
    for stage in self.stages:
      x = run(stage, x, deterministic=deterministic, batch_rows=batch_rows)
      pyramid.append(x)
    if self.is_initializing():
      self.pool(pyramid)
    return pyramid

  def pool(self, pyramid: list[Float[Array, "n _ _ _"]]) -> Float[Array, "n c"]:
    """The mean over positions of the coarsest level after its LayerNorm.

    VICRegL's order, float32. timm's head pools first and normalises after.
    """
    return jnp.mean(self.norm(pyramid[-1].astype(jnp.float32)), axis=(1, 2))
