"""Geometry against analytic motion, PyTorch and plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mcjepa_jax.ops import cost_volume, flow_ops, occlusion

_COST_VOLUMES = ("shifts", "rows", "banded")

# Compiled whole: op by op, the tests compile for longer.
_warp = jax.jit(flow_ops.warp)
_cost_volume = jax.jit(
    cost_volume.cost_volume, static_argnames=("radius", "form")
)
_inside = jax.jit(flow_ops.inside)
_normalize_pair = jax.jit(flow_ops.normalize_pair)
_resize_flow = jax.jit(flow_ops.resize_flow, static_argnums=1)
_visible_forward_backward = jax.jit(occlusion.visible_forward_backward)
_visible_range_map = jax.jit(
    occlusion.visible_range_map, static_argnames="threshold"
)


@jax.jit
def _warp_vjp(x, flow, cotangent):
  warped, vjp = jax.vjp(flow_ops.warp, x, flow)
  return warped, vjp(cotangent)


def _normal(*shape: int, seed: int = 0) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _scene(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """A smooth picture, defined at any position and alike in no direction."""
  return np.stack(
      [np.sin(0.4 * x) + 0.1 * y, np.cos(0.3 * y + 0.2 * x)], axis=-1
  )


# Frame 1 to frame 2 as q = A (p - centre) + centre + d, with (x, y) vectors.
_MOTIONS = {
    "translation": (np.eye(2), (2.0, -1.0)),
    "rotation": (np.array([[0.98, -0.199], [0.199, 0.98]]), (0.0, 0.0)),
    "zoom": (1.1 * np.eye(2), (0.5, 0.0)),
}


def _moved(name: str, h: int = 20, w: int = 28):
  """Frame 1, frame 2 and flow_12 of one of the motions, without a batch."""
  matrix, shift = _MOTIONS[name]
  grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(float)
  centre = np.array([(w - 1) / 2, (h - 1) / 2])
  flow = (grid - centre) @ matrix.T + centre + shift - grid
  source = (grid - centre - shift) @ np.linalg.inv(matrix).T + centre
  frame_1 = _scene(grid[..., 0], grid[..., 1])
  frame_2 = _scene(source[..., 0], source[..., 1])
  return (jnp.asarray(a[None], jnp.float32) for a in (frame_1, frame_2, flow))


def _occluding_square(h: int = 10, w: int = 14):
  """Flows of a square that moves 3 pixels right, and what it hides."""
  square_1, square_2 = np.zeros((2, 1, h, w, 1), np.float32)
  square_1[:, 2:6, 3:7] = 1
  square_2[:, 2:6, 6:10] = 1
  right = np.array([3.0, 0.0], np.float32)
  visible = 1 - square_2 * (1 - square_1)
  return jnp.asarray(square_1 * right), jnp.asarray(-square_2 * right), visible


def test_pixel_grid_holds_x_then_y():
  grid = flow_ops.pixel_grid(3, 5)
  np.testing.assert_array_equal(grid[2, 4], [4, 2])
  np.testing.assert_array_equal(grid[0, 1], [1, 0])


def test_swap_pairs_exchanges_neighbours():
  x = jnp.arange(6.0)
  np.testing.assert_array_equal(flow_ops.swap_pairs(x), [1, 0, 3, 2, 5, 4])


@pytest.mark.parametrize("motion", _MOTIONS)
def test_warp_of_frame_2_by_flow_12_is_frame_1(motion):
  frame_1, frame_2, flow = _moved(motion)
  warped = _warp(frame_2, flow)
  mask = _inside(flow)
  assert 0.7 < mask.mean() <= 1
  error = jnp.abs((warped - frame_1) * mask).max()
  assert error < 0.03  # bilinear interpolation of the scene
  wrong = jnp.abs((frame_2 - frame_1) * mask).max()
  assert wrong > 10 * error


def test_swapped_components_fail_to_bring_frame_2_back():
  frame_1, frame_2, flow = _moved("translation")
  mask = _inside(flow)
  error = _warp(frame_2, flow[..., ::-1]) - frame_1
  assert jnp.abs(error * mask).max() > 0.5


def test_warp_reads_coordinates_where_the_flow_points():
  grid = flow_ops.pixel_grid(6, 9)[None]
  flow = 3 * _normal(1, 6, 9, 2)
  warped = _warp(grid, flow)
  np.testing.assert_allclose(
      warped, jnp.clip(grid + flow, 0, jnp.array([8, 5])), atol=1e-5
  )


def test_warp_has_gradient_at_zero_flow():
  x = _normal(1, 5, 6, 2)
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
  x, flow = _normal(n, h, w, c), 4 * _normal(n, h, w, 2, seed=1)
  weight = _normal(n, h, w, c, seed=2)
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
  x = _normal(2, *size, 3)
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
  _, _, flow = _moved("zoom")
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
  x = _normal(2, 8, 6, 3)
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
  x_1 = _normal(2, 4, 5, 3) * jnp.array([2.0, 9.0]).reshape(2, 1, 1, 1) + 3
  x_2 = 5 * _normal(2, 4, 5, 3, seed=1)
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
  x_1, x_2 = _normal(*shape), _normal(*shape, seed=1)
  cost = _cost_volume(x_1, x_2, radius=radius, form=form)
  expected = _cost_volume_by_loops(np.asarray(x_1), np.asarray(x_2), radius)
  np.testing.assert_allclose(cost, expected, atol=1e-6)


@pytest.mark.parametrize("form", ["rows", "banded"])
def test_cost_volume_forms_have_equal_gradients(form):
  x_1, x_2 = _normal(2, 5, 7, 3), _normal(2, 5, 7, 3, seed=1)
  weight = _normal(2, 5, 7, 49, seed=2)

  def gradients(form):
    cost = functools.partial(cost_volume.cost_volume, radius=3, form=form)
    return jax.jit(lambda a, b, g: jax.vjp(cost, a, b)[1](g))(x_1, x_2, weight)

  for ours, reference in zip(gradients(form), gradients("shifts"), strict=True):
    np.testing.assert_allclose(ours, reference, atol=1e-6)


@pytest.mark.parametrize("form", _COST_VOLUMES)
def test_cost_volume_peaks_at_the_flow(form):
  x = _normal(1, 12, 14, 16)
  x /= jnp.linalg.norm(x, axis=-1, keepdims=True)
  # What is at p in frame 1 is at p + (dx, dy) = p + (2, -1) in frame 2.
  moved = jnp.roll(x, (-1, 2), axis=(1, 2))
  cost = _cost_volume(x, moved, radius=4, form=form)
  peak = jnp.argmax(cost[0, 4:-4, 4:-4], axis=-1)
  np.testing.assert_array_equal(peak, (-1 + 4) * 9 + (2 + 4))


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
  flow = 2 * _normal(2, 4, 5, 2)

  def total(flow):
    back = flow_ops.swap_pairs(flow)
    return (
        flow_ops.inside(flow).sum()
        + occlusion.visible_forward_backward(flow, back).sum()
        + occlusion.visible_range_map(back).sum()
    )

  assert jnp.abs(jax.jit(jax.grad(total))(flow)).max() == 0
