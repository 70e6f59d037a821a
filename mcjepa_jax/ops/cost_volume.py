"""The cost volume of two feature maps."""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
  product = (
      jnp.einsum("nyxc,nvuc->nyvxu", x_1, x_2, precision=lax.Precision.HIGHEST)
      / c
  )
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
