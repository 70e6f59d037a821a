"""Geometry against analytic motion, PyTorch and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mcjepa_jax.ops import flow_ops
from tests.helpers import moving_maps

# Compiled whole: op by op, the tests compile for longer.
_warp = jax.jit(flow_ops.warp)
_inside = jax.jit(flow_ops.inside)
_normalize_pair = jax.jit(flow_ops.normalize_pair)
_resize_flow = jax.jit(flow_ops.resize_flow, static_argnums=1)


@jax.jit
def _warp_vjp(x, flow, cotangent):
  warped, vjp = jax.vjp(flow_ops.warp, x, flow)
  return warped, vjp(cotangent)


def test_pixel_grid_holds_x_then_y():
  grid = flow_ops.pixel_grid(3, 5)
  np.testing.assert_array_equal(grid[2, 4], [4, 2])
  np.testing.assert_array_equal(grid[0, 1], [1, 0])


def test_swap_pairs_exchanges_neighbours():
  x = jnp.arange(6.0)
  np.testing.assert_array_equal(flow_ops.swap_pairs(x), [1, 0, 3, 2, 5, 4])


@pytest.mark.parametrize("motion", moving_maps.MOTIONS)
def test_warp_of_frame_2_by_flow_12_is_frame_1(motion):
  frame_1, frame_2, flow = moving_maps.moved(motion)
  warped = _warp(frame_2, flow)
  mask = _inside(flow)
  assert 0.7 < mask.mean() <= 1
  error = jnp.abs((warped - frame_1) * mask).max()
  assert error < 0.03  # bilinear interpolation of the scene
  wrong = jnp.abs((frame_2 - frame_1) * mask).max()
  assert wrong > 10 * error


def test_swapped_components_fail_to_bring_frame_2_back():
  frame_1, frame_2, flow = moving_maps.moved("translation")
  mask = _inside(flow)
  error = _warp(frame_2, flow[..., ::-1]) - frame_1
  assert jnp.abs(error * mask).max() > 0.5


def test_warp_reads_coordinates_where_the_flow_points():
  grid = flow_ops.pixel_grid(6, 9)[None]
  flow = 3 * moving_maps.normal(1, 6, 9, 2)
  warped = _warp(grid, flow)
  np.testing.assert_allclose(
      warped, jnp.clip(grid + flow, 0, jnp.array([8, 5])), atol=1e-5
  )


def test_warp_has_gradient_at_zero_flow():
  x = moving_maps.normal(1, 5, 6, 2)
  flow = jnp.zeros((1, 5, 6, 2))
  _, (_, gradient) = _warp_vjp(x, flow, jnp.ones_like(x))
  # By hand: the difference to the next pixel, to the right and below.
  total = x.sum(-1)
  np.testing.assert_allclose(
      gradient[:, 1:-1, 1:-1, 0],
      (total[:, :, 1:] - total[:, :, :-1])[:, 1:-1, 1:],
      atol=1e-5,
  )
  np.testing.assert_allclose(
      gradient[:, 1:-1, 1:-1, 1],
      (total[:, 1:] - total[:, :-1])[:, 1:, 1:-1],
      atol=1e-5,
  )


def test_warp_equals_grid_sample_in_value_and_gradient():
  n, h, w, c = 2, 6, 9, 3
  x, flow = moving_maps.normal(n, h, w, c), 4 * moving_maps.normal(
      n, h, w, 2, seed=1
  )
  weight = moving_maps.normal(n, h, w, c, seed=2)
  warped, ours = _warp_vjp(x, flow, weight)
  x_t = torch.tensor(np.asarray(x), requires_grad=True)
  flow_t = torch.tensor(np.asarray(flow), requires_grad=True)
  grid = torch.tensor(np.asarray(flow_ops.pixel_grid(h, w))) + flow_t
  expected = torch.nn.functional.grid_sample(
      x_t.permute(0, 3, 1, 2),
      2 * grid / torch.tensor([w - 1, h - 1]) - 1,
      align_corners=True,
      padding_mode="border",
  ).permute(0, 2, 3, 1)
  gradients = torch.autograd.grad(
      expected, (x_t, flow_t), torch.tensor(np.asarray(weight))
  )
  np.testing.assert_allclose(warped, expected.detach().numpy(), atol=1e-5)
  for gradient, theirs in zip(ours, gradients, strict=True):
    np.testing.assert_allclose(gradient, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1)])
def test_warp_takes_maps_of_one_pixel_across(size):
  x = moving_maps.normal(2, *size, 3)
  flow = jnp.full((2, *size, 2), 0.25)
  _, (gradient, _) = _warp_vjp(x, flow, jnp.ones_like(x))
  np.testing.assert_allclose(gradient.sum(), x.size, rtol=1e-5)


def test_inside_counts_the_border_and_nothing_beyond():
  flow = jnp.zeros((1, 4, 6, 2)).at[0, 0, 0].set(jnp.array([5.0, 3.0]))
  flow = flow.at[0, 1, 5, 0].set(0.1).at[0, 0, 2, 1].set(-0.1)
  expected = np.ones((1, 4, 6, 1))
  expected[0, 1, 5] = expected[0, 0, 2] = 0
  np.testing.assert_array_equal(_inside(flow), expected)


def test_resized_flow_still_warps_the_resized_frame():
  _, _, flow = moving_maps.moved("zoom")
  # A zoom is linear in position, so the larger grid knows it in closed form.
  fine = _resize_flow(flow, (40, 84))
  x = (np.arange(84) + 0.5) / 3 - 0.5
  expected = (0.1 * (x - 13.5) + 0.5) * 3
  np.testing.assert_allclose(fine[0, 20, 3:-3, 0], expected[3:-3], atol=1e-4)
  y = (np.arange(40) + 0.5) / 2 - 0.5
  expected = 0.1 * (y - 9.5) * 2
  np.testing.assert_allclose(fine[0, 2:-2, 7, 1], expected[2:-2], atol=1e-4)


@pytest.mark.parametrize("size", [(4, 6), (16, 12)])
def test_resize_equals_torch(size):
  x = moving_maps.normal(2, 8, 6, 3)
  expected = torch.nn.functional.interpolate(
      torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
      size,
      mode="bilinear",
      antialias=True,
  ).permute(0, 2, 3, 1)
  np.testing.assert_allclose(
      flow_ops.resize(x, size), expected.numpy(), atol=1e-5
  )


def test_area_mean_is_the_mean_of_each_block():
  x = jnp.arange(24.0).reshape(1, 4, 6, 1)
  np.testing.assert_allclose(
      flow_ops.area_mean(x, 2)[0, :, :, 0],
      [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]],
  )


def test_normalized_pair_has_mean_0_and_variance_1_for_each_pair():
  x_1 = (
      moving_maps.normal(2, 4, 5, 3) * jnp.array([2.0, 9.0]).reshape(2, 1, 1, 1)
      + 3
  )
  x_2 = 5 * moving_maps.normal(2, 4, 5, 3, seed=1)
  y_1, y_2 = _normalize_pair(x_1, x_2)
  for i in range(2):
    np.testing.assert_allclose((y_1[i] + y_2[i]).mean(), 0, atol=1e-5)
    np.testing.assert_allclose((y_1[i].var() + y_2[i].var()) / 2, 1, rtol=1e-4)
  # The second pair does not know of the first.
  alone, _ = _normalize_pair(x_1[1:], x_2[1:])
  np.testing.assert_allclose(y_1[1:], alone, atol=1e-6)


def test_normalized_pair_of_flat_maps_has_a_finite_gradient():
  flat = jnp.ones((1, 3, 3, 2))
  gradient = jax.jit(
      jax.grad(lambda x: flow_ops.normalize_pair(x, x)[0].sum())
  )(flat)
  assert jnp.isfinite(gradient).all()
