"""Occlusion masks of a square that moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax.ops import flow_ops, occlusion
from tests.helpers import moving_maps

_visible_forward_backward = jax.jit(occlusion.visible_forward_backward)
_visible_range_map = jax.jit(
    occlusion.visible_range_map, static_argnames="threshold"
)


def _occluding_square(h: int = 10, w: int = 14):
  """Flows of a square that moves 3 pixels right, and what it hides."""
  square_1, square_2 = np.zeros((2, 1, h, w, 1), np.float32)
  square_1[:, 2:6, 3:7] = 1
  square_2[:, 2:6, 6:10] = 1
  right = np.array([3.0, 0.0], np.float32)
  visible = 1 - square_2 * (1 - square_1)
  return jnp.asarray(square_1 * right), jnp.asarray(-square_2 * right), visible


@pytest.mark.parametrize(
    "visible_of",
    [
        _visible_forward_backward,
        lambda flow_12, flow_21: _visible_range_map(flow_21),
    ],
    ids=["forward_backward", "range_map"],
)
def test_masks_hide_what_the_square_covers(visible_of):
  flow_12, flow_21, visible = _occluding_square()
  np.testing.assert_allclose(visible_of(flow_12, flow_21), visible, atol=1e-6)


def test_forward_backward_tolerance_grows_with_the_motion():
  flow_12 = jnp.zeros((1, 4, 40, 2)).at[..., 0].set(20.0)
  # By hand: 2.7^2 <= 0.01 (20^2 + 17.3^2) + 0.5 < 2.8^2.
  near = _visible_forward_backward(flow_12, -flow_12.at[..., 0].add(-2.7))
  far = _visible_forward_backward(flow_12, -flow_12.at[..., 0].add(-2.8))
  assert near.min() == 1 and far.max() == 0


def test_range_map_counts_fractions_and_forgets_what_leaves():
  flow = (
      jnp.zeros((1, 1, 4, 2))
      .at[0, 0, :, 0]
      .set(jnp.array([0.25, 0.0, 0.0, 5.0]))
  )
  count = _visible_range_map(flow)[0, 0, :, 0]
  np.testing.assert_allclose(count, [0.75, 1, 1, 0])  # clipped at 1
  visible = _visible_range_map(flow, threshold=0.8)[0, 0, :, 0]
  np.testing.assert_array_equal(visible, [0, 1, 1, 0])


def test_masks_have_no_gradient():
  flow = 2 * moving_maps.normal(2, 4, 5, 2)

  def total(flow):
    back = flow_ops.swap_pairs(flow)
    return (
        flow_ops.inside(flow).sum()
        + occlusion.visible_forward_backward(flow, back).sum()
        + occlusion.visible_range_map(back).sum()
    )

  assert jnp.abs(jax.jit(jax.grad(total))(flow)).max() == 0
