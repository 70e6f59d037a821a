"""The depthwise convolution, in the form that each platform runs fastest."""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

_DEPTHWISE_FORM = {"cpu": "shifts", "gpu": "grouped", "tpu": "grouped"}
# The largest map, in positions, for which "toeplitz" is the faster form.
_TOEPLITZ_POSITIONS = {"cpu": 64, "gpu": 0, "tpu": 0}


def depthwise_conv(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw 1 c"],
    *,
    form: str | None = None,
) -> Float[Array, "n h w c"]:
  """Each channel correlated with its own odd-sized kernel, zero-padded."""
  if form is None:
    backend = jax.default_backend()
    small = x.shape[1] * x.shape[2] <= _TOEPLITZ_POSITIONS[backend]
    form = "toeplitz" if small else _DEPTHWISE_FORM[backend]
  return _DEPTHWISE[form](x, kernel)


def _grouped(x, kernel):
  return lax.conv_general_dilated(
      x,
      kernel,
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=x.shape[-1],
  )


@jax.custom_vjp
def _depthwise_grouped(x, kernel):
  return _grouped(x, kernel)


def _depthwise_grouped_forward(x, kernel):
  return _grouped(x, kernel), (x, kernel)


def _depthwise_grouped_backward(residuals, dy):
  x, kernel = residuals
  # In a loop over blocks x is a slice of what all of them keep. Fused with the
  # slice, the kernel's gradient takes XLA's compiler for TPUs 80 s.
  x = lax.optimization_barrier(x)
  (dx,) = jax.linear_transpose(lambda x: _grouped(x, kernel), x)(dy)
  (dk,) = jax.linear_transpose(lambda k: _grouped(x, k), kernel)(dy)
  return dx, dk


_depthwise_grouped.defvjp(
    _depthwise_grouped_forward, _depthwise_grouped_backward
)


def _taps(window: int, outputs: int, taps: int) -> np.ndarray:
  """A [window, outputs, taps] of 1 where an output reads a position by a tap.

  The window is as long as the outputs (the rest is zero padding), or longer by
  taps - 1.
  """
  first = (outputs + taps - 1 - window) // 2
  offset = np.arange(window)[:, None] - np.arange(outputs) + first
  return (offset[..., None] == np.arange(taps)).astype(np.float32)


def _toeplitz(kernel, window, outputs):
  """[c, window positions, output positions]: the convolution as a matrix."""
  kh, kw, _, c = kernel.shape
  rows, columns = (
      jnp.asarray(_taps(*sizes), kernel.dtype)
      for sizes in zip(window, outputs, (kh, kw), strict=True)
  )
  matrix = jnp.einsum("xwj,ijc->cixw", columns, kernel[:, :, 0])
  matrix = jnp.einsum("yhi,cixw->cyxhw", rows, matrix)
  return matrix.reshape(c, math.prod(window), math.prod(outputs))


def _depthwise_toeplitz(x, kernel):
  n, h, w, c = x.shape
  matrix = _toeplitz(kernel, (h, w), (h, w))
  y = x.reshape(n, h * w, c).transpose(2, 0, 1) @ matrix
  return y.transpose(1, 2, 0).reshape(x.shape)


@jax.custom_vjp
def _depthwise_shifts(x, kernel):
  kh, kw = kernel.shape[:2]
  h, w = x.shape[1:3]
  padding = ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0))
  padded = jnp.pad(x, padding)
  terms = (
      padded[:, i : i + h, j : j + w] * kernel[i, j, 0]
      for i in range(kh)
      for j in range(kw)
  )
  return functools.reduce(jnp.add, terms)


def _depthwise_shifts_forward(x, kernel):
  return _depthwise_shifts(x, kernel), (x, kernel)


def _depthwise_shifts_backward(residuals, dy):
  x, kernel = residuals
  return (
      _depthwise_shifts(dy, kernel[::-1, ::-1]),
      _depthwise_kernel_gradient(x, dy, kernel),
  )


_depthwise_shifts.defvjp(_depthwise_shifts_forward, _depthwise_shifts_backward)


def _depthwise_kernel_gradient(x, dy, kernel, *, tile=8):
  """The gradient by the Toeplitz matrix of a tile, summed over tiles.

  A matrix product per channel over all tiles does about four times the sums
  that are needed, and is still faster than 49 reductions over the map.
  """
  n, h, w, c = x.shape
  kh, kw = kernel.shape[:2]
  if max(kh, kw) > tile + 1:
    raise ValueError(f"kernels of up to {tile + 1} taps, got {kh}x{kw}")
  a, b = -(-h // tile), -(-w // tile)
  bottom, right = a * tile - h, b * tile - w
  dy = jnp.pad(dy, ((0, 0), (0, bottom), (0, right), (0, 0)))
  dy = dy.reshape(n, a, tile, b, tile, c).transpose(5, 0, 1, 3, 2, 4)
  top, left = kh // 2, kw // 2
  padding = ((top, tile - top + bottom), (left, tile - left + right))
  x = jnp.pad(x, ((0, 0), *padding, (0, 0))).transpose(3, 0, 1, 2)
  # A window is a tile and the first taps - 1 of the next one.
  x = x.reshape(c, n, a + 1, tile, -1)
  x = jnp.concatenate([x[:, :, :-1], x[:, :, 1:, : kh - 1]], axis=3)
  x = x.reshape(c, n, a, -1, b + 1, tile)
  x = jnp.concatenate([x[..., :-1, :], x[..., 1:, : kw - 1]], axis=5)
  x = x.transpose(0, 1, 2, 4, 3, 5)
  gram = jnp.einsum(
      "cmp,cmq->cpq",
      x.reshape(c, n * a * b, -1),
      dy.reshape(c, n * a * b, -1),
  )
  matrix = functools.partial(
      _toeplitz,
      window=(tile + kh - 1, tile + kw - 1),
      outputs=(tile, tile),
  )
  (gradient,) = jax.linear_transpose(matrix, kernel)(gram)
  return gradient


_DEPTHWISE = {
    "grouped": _depthwise_grouped,
    "shifts": _depthwise_shifts,
    "toeplitz": _depthwise_toeplitz,
}
