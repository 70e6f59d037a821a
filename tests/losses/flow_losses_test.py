"""Flow losses against values by hand, numpy and their own invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.losses import flow_losses, vicreg
from mcjepa_jax.ops import flow_ops

_photometric_loss = jax.jit(
    flow_losses.photometric_loss,
    static_argnames=("l1", "l2", "ssim", "census"),
)
_smoothness_loss = jax.jit(
    flow_losses.smoothness_loss,
    static_argnames=("form", "order", "edge_weight"),
)


@jax.jit
def _regression_loss(x_1, x_2, flow_12, mask):
  warped = flow_ops.warp(x_2, flow_12)
  return flow_losses.feature_regression_loss(x_1, warped, mask)


@jax.jit
def _cycle_loss(x_1, flow_12, flow_21, mask):
  there = flow_ops.warp(x_1, flow_21)
  return flow_losses.cycle_loss(x_1, there, flow_12, mask)


def _images(n: int = 2, h: int = 9, w: int = 11):
  rng = np.random.default_rng(0)
  x = rng.random((n, h, w, 3))
  y = np.clip(x + 0.3 * rng.normal(size=x.shape), 0, 1)
  return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def _flow(u, v, n: int = 2, h: int = 8, w: int = 10) -> jax.Array:
  """A flow of components that may vary along y [h 1] or x [w]."""
  components = [np.broadcast_to(c, (n, h, w)) for c in (u, v)]
  return jnp.asarray(np.stack(components, axis=-1), jnp.float32)


def _ramp(n: int = 2, h: int = 8, w: int = 10) -> jax.Array:
  """Features x and 3 y."""
  y, x = np.indices((n, h, w))[1:]
  return jnp.asarray(np.stack([x, 3 * y], axis=-1), jnp.float32)


def _holes(*pixels, n: int = 2, h: int = 9, w: int = 11) -> jax.Array:
  mask = np.ones((n, h, w, 1), np.float32)
  for y, x in pixels:
    mask[:, y, x] = 0
  return jnp.asarray(mask)


def test_masked_mean_averages_the_two_directions():
  values = jnp.array([[1.0, 5.0], [2.0, 7.0], [9.0, 3.0], [8.0, 8.0]])
  mask = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
  # By hand: (1 + 3) / 2 = 2 for 12, (2 + 7 + 8) / 3 for 21.
  np.testing.assert_allclose(
      flow_losses.masked_mean(
          values.reshape(4, 1, 2, 1), mask.reshape(4, 1, 2, 1)
      ),
      (2 + 17 / 3) / 2,
      rtol=1e-6,
  )


def test_masked_mean_takes_the_channel_mean():
  values = jnp.arange(24.0).reshape(2, 2, 2, 3)
  for mask in (None, jnp.ones((2, 2, 2, 1))):
    np.testing.assert_allclose(flow_losses.masked_mean(values, mask), 11.5)


def test_masked_mean_of_no_or_few_pixels_is_not_blown_up():
  values = jnp.full((2, 2, 2, 1), 8.0)
  assert flow_losses.masked_mean(values, jnp.zeros((2, 2, 2, 1))) == 0
  # By hand: 4 x 0.125 = 0.5 pixels weigh 4, over max(0.5, 1).
  few = jnp.full((2, 2, 2, 1), 0.125)
  np.testing.assert_allclose(flow_losses.masked_mean(values, few), 4)


def test_masked_mean_gives_the_mask_no_gradient():
  x, _ = _images()
  gradient = jax.grad(flow_losses.masked_mean, 1)(x, jnp.ones((2, 9, 11, 1)))
  assert not gradient.any()


def test_a_lone_direction_is_refused():
  with pytest.raises(errors.UserError, match="both directions"):
    flow_losses.masked_mean(jnp.ones((3, 2, 2, 1)), None)


def test_erode_keeps_pixels_whose_whole_window_counts():
  eroded = flow_losses.erode(_holes((4, 6)), 1)[0, ..., 0]
  expected = np.zeros((9, 11))
  expected[1:-1, 1:-1] = 1  # Windows at the border leave the image.
  expected[3:6, 5:8] = 0
  np.testing.assert_array_equal(eroded, expected)
  expected = np.zeros((9, 11))
  expected[3:-3, 3:-3] = 1
  np.testing.assert_array_equal(
      flow_losses.erode(_holes(), 3)[1, ..., 0], expected
  )
  assert flow_losses.erode(0.25 * _holes(), 1).max() == 0.25


def test_l1_and_l2_are_channel_means():
  x = jnp.array([0.1, 0.5, 0.9]).reshape(1, 1, 1, 3)
  y = jnp.array([0.3, 0.5, 0.5]).reshape(1, 1, 1, 3)
  # By hand: (0.2 + 0.4) / 3 and (0.04 + 0.16) / 3.
  np.testing.assert_allclose(flow_losses.l1_distance(x, y), 0.2, rtol=1e-6)
  np.testing.assert_allclose(flow_losses.l2_distance(x, y), 0.2 / 3, rtol=1e-6)


def _patches(x, size: int) -> np.ndarray:
  x = np.asarray(x, np.float64)
  return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))


def test_ssim_is_that_of_numpy_in_whole_windows():
  x, y = _images()
  p, q = _patches(x, 3), _patches(y, 3)
  mean_p, mean_q = p.mean((-2, -1)), q.mean((-2, -1))
  covariance = ((p - mean_p[..., None, None]) * q).mean((-2, -1))
  ssim = (2 * mean_p * mean_q + 1e-4) * (2 * covariance + 9e-4)
  ssim /= mean_p**2 + mean_q**2 + 1e-4
  ssim /= p.var((-2, -1)) + q.var((-2, -1)) + 9e-4
  got = flow_losses.ssim_distance(x, y)
  np.testing.assert_allclose(
      got[:, 1:-1, 1:-1, 0], ((1 - ssim) / 2).mean(-1), atol=1e-5
  )
  assert got.shape == (2, 9, 11, 1)
  assert not got.at[:, 1:-1, 1:-1].set(0.0).any()


def test_ssim_of_equal_flat_and_inverted_images():
  x, _ = _images()
  np.testing.assert_allclose(flow_losses.ssim_distance(x, x), 0, atol=1e-6)
  # By hand: flat images leave the luminance term.
  flat = jnp.full_like(x, 0.2)
  got = flow_losses.ssim_distance(flat, 3 * flat)[:, 1:-1, 1:-1]
  expected = (1 - (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)) / 2
  np.testing.assert_allclose(got, expected, rtol=1e-4)
  assert flow_losses.ssim_distance(x, 1 - x).max() > 0.5


def test_census_is_that_of_numpy_in_whole_windows():
  x, y = _images(h=8, w=9)

  def signs(image):
    gray = 255 * np.asarray(image, np.float64) @ (0.2989, 0.5870, 0.1140)
    patches = _patches(gray, 7)
    difference = patches - patches[..., 3:4, 3:4]
    return difference / np.sqrt(0.81 + difference**2)

  squared = (signs(x) - signs(y)) ** 2
  distance = (squared / (0.1 + squared)).sum((-2, -1))
  got = flow_losses.census_distance(x, y)
  np.testing.assert_allclose(
      got[:, 3:-3, 3:-3, 0], (distance + 0.01) ** 0.4, rtol=1e-4
  )
  assert got.shape == (2, 8, 9, 1)
  assert not got.at[:, 3:-3, 3:-3].set(0.0).any()


def test_census_of_a_single_bright_pixel():
  flat = jnp.full((2, 13, 13, 3), 0.4)
  # 0.3 brighter in green alone: 0.587 of it in gray.
  got = flow_losses.census_distance(flat, flat.at[:, 6, 6, 1].add(0.3))
  squared = (255 * 0.587 * 0.3) ** 2
  squared /= 0.81 + squared
  each = squared / (0.1 + squared)
  expected = np.zeros((13, 13))
  expected[3:-3, 3:-3] = (each + 0.01) ** 0.4  # All of them see it once,
  expected[6, 6] = (48 * each + 0.01) ** 0.4  # and it sees 48 darker ones.
  np.testing.assert_allclose(got[0, ..., 0], expected, rtol=1e-5)


def test_census_does_not_see_brightness():
  x, _ = _images()
  got = flow_losses.census_distance(x, x + 0.1)[:, 3:-3, 3:-3]
  np.testing.assert_allclose(got, 0.01**0.4, rtol=1e-3)


@pytest.mark.parametrize("distance", ["ssim", "census"])
def test_an_image_smaller_than_the_window_is_refused(distance):
  x, _ = _images(h=6, w=2)
  with pytest.raises(errors.UserError, match="got 6x2"):
    _photometric_loss(x, x, None, **{distance: 1.0})


_ALONE = dict(l1=0.0, l2=0.0, ssim=0.0, census=0.0)


@pytest.mark.parametrize(
    "name, radius", [("l1", 0), ("l2", 0), ("ssim", 1), ("census", 3)]
)
def test_photometric_term_ignores_what_the_mask_hides(name, radius):
  x, y = _images()
  mask = _holes((4, 5), (0, 3))
  loss = functools.partial(_photometric_loss, **_ALONE | {name: 2.0})
  expected = loss(x, y, mask)
  # Whatever a hidden pixel shows, through no window of any size.
  painted = y.at[:, 4, 5].set(0.0).at[:, 0, 3].set(1.0)
  np.testing.assert_allclose(loss(x, painted, mask), expected, rtol=1e-6)
  assert abs(loss(x, painted, None) - loss(x, y, None)) > 1e-4
  # All that lies further from the holes does count.
  distance = getattr(flow_losses, f"{name}_distance")(x, y)
  kept = np.ones((9, 11), bool)
  if radius:
    kept[[*range(radius), *range(-radius, 0)]] = False
    kept[:, [*range(radius), *range(-radius, 0)]] = False
  np.testing.assert_allclose(
      loss(x, y, None), 2 * distance[:, kept].mean(), rtol=1e-5
  )
  kept[max(4 - radius, 0) : 5 + radius, 5 - radius : 6 + radius] = False
  kept[: 1 + radius, 3 - radius : 4 + radius] = False
  if kept.any():
    np.testing.assert_allclose(
        expected, 2 * distance[:, kept].mean(), rtol=1e-5
    )


def test_photometric_loss_is_its_weighted_sum():
  x, y = _images()
  terms = {
      name: _photometric_loss(x, y, None, **_ALONE | {name: 1.0})
      for name in _ALONE
  }
  np.testing.assert_allclose(
      _photometric_loss(x, y, None),
      0.15 * terms["l1"] + 0.85 * terms["ssim"],
      rtol=1e-5,
  )
  np.testing.assert_allclose(
      _photometric_loss(x, y, None, l1=1.0, l2=2.0, ssim=3.0, census=4.0),
      terms["l1"] + 2 * terms["l2"] + 3 * terms["ssim"] + 4 * terms["census"],
      rtol=1e-5,
  )
  assert _photometric_loss(x, y, None, **_ALONE) == 0


def test_a_photometric_weight_of_zero_is_not_computed():
  x, y = _images()
  program = str(jax.make_jaxpr(flow_losses.photometric_loss)(x, y, None))
  assert "reduce_window" in program
  assert "scan" not in program


def test_photometric_gradient_is_finite_on_equal_flat_images():
  flat = jnp.full((2, 9, 9, 3), 0.5)
  loss = functools.partial(
      _photometric_loss, l1=1.0, l2=1.0, ssim=1.0, census=1.0
  )
  gradient = jax.jit(jax.grad(loss, (0, 1)))(flat, flat, _holes(h=9, w=9))
  assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form, scale", [("arflow", 1 / 8), ("uflow", 1.0)])
def test_smoothness_is_that_of_numpy(form, scale, order):
  rng = np.random.default_rng(order)
  flow = rng.normal(size=(2, 8, 10, 2)).astype(np.float32)
  image = rng.random((2, 8, 10, 3)).astype(np.float32)
  means = []
  for axis in (2, 1):
    change = np.diff(scale * flow, order, axis)
    change = np.abs(change) if form == "arflow" else np.hypot(change, 1e-3)
    edge = np.diff(image, axis=axis)
    if order == 2:
      # ARFlow: the second of the two differences; UFlow: their sum.
      first, second = (
          np.take(edge, np.arange(edge.shape[axis] - 1) + i, axis)
          for i in range(2)
      )
      edge = second if form == "arflow" else first + second
    weight = np.exp(-4 * np.abs(edge).mean(-1, keepdims=True))
    means.append((weight * change).mean())
  got = _smoothness_loss(
      jnp.asarray(flow),
      jnp.asarray(image),
      form=form,
      order=order,
      edge_weight=4.0,
  )
  np.testing.assert_allclose(got, np.mean(means), rtol=1e-5)


def test_smoothness_of_a_shear_by_hand():
  image = jnp.full((2, 8, 10, 3), 0.5)
  # u = 4 x: |du/dx| = 4 / 8 in one component of two, and along x only.
  shear = _flow(4 * jnp.arange(10), 7.0)
  np.testing.assert_allclose(_smoothness_loss(shear, image), 0.5 / 4, rtol=1e-6)
  np.testing.assert_allclose(
      _smoothness_loss(shear, image, form="uflow", edge_weight=150.0),
      (4 + 3 * 1e-3) / 4,
      rtol=1e-5,
  )
  second = functools.partial(_smoothness_loss, order=2)
  assert second(shear, image) == 0
  np.testing.assert_allclose(
      second(shear, image, form="uflow"), 1e-3, rtol=1e-4
  )


@pytest.mark.parametrize("axis", [1, 2])
def test_smoothness_lets_a_flow_jump_at_an_edge_of_the_image(axis):
  jump = jnp.broadcast_to(
      (jnp.arange(8) >= 4).astype(jnp.float32)[:, None, None], (2, 8, 8, 2)
  )
  edge = jnp.broadcast_to(jump[..., :1], (2, 8, 8, 3))
  if axis == 2:
    jump, edge = jnp.swapaxes(jump, 1, 2), jnp.swapaxes(edge, 1, 2)
  away = jnp.roll(edge, 2, axis)
  along, across = (_smoothness_loss(jump, image) for image in (edge, away))
  # By hand: one of seven differences is 1 / 8, in one of the two means.
  np.testing.assert_allclose(across, 1 / 8 / 7 / 2, rtol=1e-5)
  np.testing.assert_allclose(along, across * np.exp(-10), rtol=1e-4)


@pytest.mark.parametrize("form", ["arflow", "uflow"])
@pytest.mark.parametrize("order", [1, 2])
def test_smoothness_gradient_is_finite_at_zero_flow(form, order):
  image = jnp.full((2, 8, 10, 3), 0.5)
  gradient = jax.grad(_smoothness_loss)(
      _flow(0.0, 0.0), image, form=form, order=order
  )
  assert np.isfinite(gradient).all()


def test_feature_regression_vanishes_at_the_true_flow_inside_the_frame():
  x_1 = _ramp()
  x_2 = x_1 - jnp.array([2.0, -3.0])  # Moved by (2, -1): x - 2 and 3 (y + 1).
  true = _flow(2.0, -1.0)
  inside = jnp.zeros((2, 8, 10, 1)).at[:, 1:, :-2].set(1.0)
  loss = _regression_loss
  np.testing.assert_allclose(loss(x_1, x_2, true, inside), 0, atol=1e-8)
  assert loss(x_1, x_2, true, None) > 0.1
  # By hand: zero flow misses by 2 in one channel and 3 in the other.
  np.testing.assert_allclose(
      loss(x_1, x_2, _flow(0.0, 0.0), None), (4 + 9) / 2, rtol=1e-6
  )


def test_feature_regression_moves_both_features_and_the_flow():
  gradients = jax.grad(_regression_loss, (0, 1, 2))(
      _ramp(), _ramp() + 1, _flow(0.0, 0.0), None
  )
  assert all(np.isfinite(g).all() and g.any() for g in gradients)


def test_constant_features_minimise_regression_and_cycle():
  x = jnp.full((2, 8, 10, 4), 0.3)
  flow = _flow(0.4, jnp.arange(10))
  np.testing.assert_allclose(_regression_loss(x, x, flow, None), 0, atol=1e-10)
  np.testing.assert_allclose(_cycle_loss(x, flow, -flow, None), 0, atol=1e-10)


def test_cycle_vanishes_where_the_way_back_undoes_the_way_there():
  x = _ramp()
  interior = jnp.zeros((2, 8, 10, 1)).at[:, 2:-2, 3:-3].set(1.0)
  there, back = _flow(2.0, -1.0), _flow(-2.0, 1.0)
  loss = _cycle_loss
  np.testing.assert_allclose(loss(x, there, back, interior), 0, atol=1e-8)
  # By hand: two steps right of 1 miss x by 2, two of 1 down miss 3 y by 6.
  one = _flow(1.0, 1.0)
  np.testing.assert_allclose(loss(x, one, one, interior), (4 + 36) / 2)


def test_cycle_follows_flow_12_first():
  # Pixel x = 2 goes to x = 5, which goes on to x = 9.
  x = _ramp()
  flow_12 = _flow(jnp.zeros(10).at[2].set(3.0), 0.0)
  flow_21 = _flow(jnp.zeros(10).at[5].set(4.0), 0.0)
  only = jnp.zeros((2, 8, 10, 1)).at[:, :, 2].set(1.0)
  np.testing.assert_allclose(
      _cycle_loss(x, flow_12, flow_21, only), (9 - 2) ** 2 / 2
  )


def test_cycle_moves_features_and_both_flows():
  one = _flow(1.0, 1.0)
  gradients = jax.grad(_cycle_loss, (0, 1, 2))(_ramp(), one, one, None)
  assert all(np.isfinite(g).all() and g.any() for g in gradients)


def test_feature_losses_take_every_position_as_a_sample():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)) / 3
  z = x.reshape(24, 5)
  np.testing.assert_allclose(
      flow_losses.feature_variance_loss(x, gamma=2.0),
      vicreg.variance_loss(z, gamma=2.0),
  )
  np.testing.assert_allclose(
      flow_losses.feature_covariance_loss(x),
      vicreg.covariance_loss(z, form="gram"),
      rtol=1e-5,
  )
  # A collapse over positions and images, not over channels, is the worst case.
  collapsed = jnp.broadcast_to(jnp.arange(5.0), x.shape)
  loss, gradient = jax.value_and_grad(flow_losses.feature_variance_loss)(
      collapsed
  )
  np.testing.assert_allclose(loss, 0.99, rtol=1e-5)
  assert np.isfinite(gradient).all()


def test_losses_of_a_sharded_batch_gather_nothing():
  mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  x, y = jax.device_put(
      _images(n=8), jax.sharding.NamedSharding(mesh, jax.P("data"))
  )

  def loss(x, y, mask):
    return _photometric_loss(
        x, y, mask, census=1.0
    ) + flow_losses.feature_covariance_loss(y)

  mask = jnp.ones((8, 9, 11, 1)).at[0].set(0.0)
  compiled = jax.jit(jax.value_and_grad(loss)).lower(x, y, mask).compile()
  text = compiled.as_text()
  assert "all-reduce" in text
  assert not any(op in text for op in ("all-gather", "all-to-all", "permute"))
  np.testing.assert_allclose(
      compiled(x, y, mask)[0], loss(*_images(n=8), mask), rtol=1e-5
  )
