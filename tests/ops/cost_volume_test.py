"""Cost volumes against a plain loop, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax.ops import cost_volume
from tests.helpers import moving_maps

_COST_VOLUMES = ("shifts", "rows", "banded")
_cost_volume = jax.jit(
    cost_volume.cost_volume, static_argnames=("radius", "form")
)


def _cost_volume_by_loops(x_1, x_2, radius):
  n, h, w, _ = x_1.shape
  size = 2 * radius + 1
  cost = np.zeros((n, h, w, size**2), np.float32)
  for dy in range(-radius, radius + 1):
    for dx in range(-radius, radius + 1):
      k = (dy + radius) * size + dx + radius
      for y in range(max(0, -dy), min(h, h - dy)):
        for x in range(max(0, -dx), min(w, w - dx)):
          product = x_1[:, y, x] * x_2[:, y + dy, x + dx]
          cost[:, y, x, k] = product.mean(-1)
  return cost


@pytest.mark.parametrize("form", _COST_VOLUMES)
@pytest.mark.parametrize(
    "shape, radius", [((2, 5, 7, 3), 2), ((1, 2, 3, 4), 4), ((1, 11, 9, 2), 4)]
)
def test_cost_volume_equals_a_plain_loop(shape, radius, form):
  x_1, x_2 = moving_maps.normal(*shape), moving_maps.normal(*shape, seed=1)
  cost = _cost_volume(x_1, x_2, radius=radius, form=form)
  expected = _cost_volume_by_loops(np.asarray(x_1), np.asarray(x_2), radius)
  np.testing.assert_allclose(cost, expected, atol=1e-6)


@pytest.mark.parametrize("form", ["rows", "banded"])
def test_cost_volume_forms_have_equal_gradients(form):
  x_1, x_2 = moving_maps.normal(2, 5, 7, 3), moving_maps.normal(
      2, 5, 7, 3, seed=1
  )
  weight = moving_maps.normal(2, 5, 7, 49, seed=2)

  def gradients(form):
    cost = functools.partial(cost_volume.cost_volume, radius=3, form=form)
    return jax.jit(lambda a, b, g: jax.vjp(cost, a, b)[1](g))(x_1, x_2, weight)

  for ours, reference in zip(gradients(form), gradients("shifts"), strict=True):
    np.testing.assert_allclose(ours, reference, atol=1e-6)


@pytest.mark.parametrize("form", _COST_VOLUMES)
def test_cost_volume_peaks_at_the_flow(form):
  x = moving_maps.normal(1, 12, 14, 16)
  x /= jnp.linalg.norm(x, axis=-1, keepdims=True)
  # What is at p in frame 1 is at p + (dx, dy) = p + (2, -1) in frame 2.
  moved = jnp.roll(x, (-1, 2), axis=(1, 2))
  cost = _cost_volume(x, moved, radius=4, form=form)
  peak = jnp.argmax(cost[0, 4:-4, 4:-4], axis=-1)
  np.testing.assert_array_equal(peak, (-1 + 4) * 9 + (2 + 4))
