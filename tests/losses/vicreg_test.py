"""VICReg's terms against hand-made and numpy values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.losses import vicreg

_FORMS = ("gram", "direct")
_variance_loss = jax.jit(vicreg.variance_loss, static_argnames=("gamma", "eps"))
_covariance_loss = jax.jit(vicreg.covariance_loss, static_argnames="form")


def _samples(n: int, d: int, seed: int = 0) -> jax.Array:
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d**0.5
  return jnp.asarray(mixed + rng.normal(size=d), jnp.float32)


def test_invariance_is_the_mean_over_samples_and_dimensions():
  z_1 = jnp.array([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
  z_2 = jnp.array([[0.0, 2.0], [3.0, 1.0], [0.0, -2.0]])
  # By hand: (1 + 9 + 4) / 6.
  np.testing.assert_allclose(vicreg.invariance_loss(z_1, z_2), 14 / 6)
  assert vicreg.invariance_loss(z_1, z_1) == 0


def test_variance_is_a_hinge_on_the_unbiased_std():
  # By hand: (-0.3, 0.3) has n - 1 variance 0.18; the second dimension's std is
  # above gamma and adds nothing.
  z = jnp.array([[-0.3, -5.0], [0.3, 5.0]])
  expected = (1.5 - np.sqrt(0.18 + 1e-4)) / 2
  np.testing.assert_allclose(_variance_loss(z, gamma=1.5), expected, rtol=1e-6)
  # sqrt(0.18 + 0.07) = 0.5.
  np.testing.assert_allclose(
      _variance_loss(z, eps=0.07), (1 - 0.5) / 2, rtol=1e-6
  )


@pytest.mark.parametrize("form", _FORMS)
def test_covariance_is_that_of_numpy_without_its_diagonal(form):
  z = _samples(7, 5)
  cov = np.cov(np.asarray(z, np.float64), rowvar=False)
  expected = (np.sum(cov**2) - np.sum(np.diag(cov) ** 2)) / 5
  np.testing.assert_allclose(
      _covariance_loss(z, form=form), expected, rtol=1e-5
  )


@pytest.mark.parametrize("n, d", [(6, 24), (24, 6)])
def test_gram_form_has_the_value_and_gradient_of_the_direct_form(n, d):
  z = _samples(n, d, seed=1)
  (gram, gram_gradient), (direct, direct_gradient) = (
      jax.value_and_grad(functools.partial(_covariance_loss, form=form))(z)
      for form in _FORMS
  )
  np.testing.assert_allclose(gram, direct, rtol=1e-5)
  scale = np.abs(direct_gradient).max()
  np.testing.assert_allclose(gram_gradient, direct_gradient, atol=1e-5 * scale)


@pytest.mark.parametrize("n, d", [(6, 24), (24, 6)])
def test_default_form_builds_the_smaller_matrix(n, d):
  program = str(jax.make_jaxpr(vicreg.covariance_loss)(jnp.zeros((n, d))))
  assert "[6,6]" in program
  assert "[24,24]" not in program


@pytest.mark.parametrize("form", _FORMS)
def test_statistics_do_not_see_a_shift(form):
  z = _samples(6, 8, seed=2)
  for loss in (
      _variance_loss,
      functools.partial(_covariance_loss, form=form),
  ):
    np.testing.assert_allclose(loss(z), loss(z + 10.0), rtol=1e-4)


@pytest.mark.parametrize("form", _FORMS)
def test_decorrelated_dimensions_cost_nothing(form):
  # Columns of a Hadamard matrix: centred, orthogonal, of large variance.
  z = 3.0 * np.array([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1.0]])
  z = jnp.asarray(z, jnp.float32)
  assert abs(_covariance_loss(z, form=form)) < 1e-4
  assert _variance_loss(z) == 0


@pytest.mark.parametrize("form", _FORMS)
def test_collapsed_batch_has_finite_gradients(form):
  z = jnp.full((4, 6), 0.7)
  loss, gradient = jax.value_and_grad(_variance_loss)(z)
  np.testing.assert_allclose(loss, 1 - 1e-2, rtol=1e-5)  # gamma - sqrt(eps)
  assert np.isfinite(gradient).all()
  loss, gradient = jax.value_and_grad(
      functools.partial(_covariance_loss, form=form)
  )(z)
  np.testing.assert_allclose(loss, 0, atol=1e-10)
  assert np.isfinite(gradient).all()


def test_variance_descent_spreads_a_nearly_collapsed_batch():
  z = 0.01 * _samples(8, 4)
  gradient = jax.grad(_variance_loss)(z)
  assert np.all(np.std(z - 0.1 * gradient, axis=0) > np.std(z, axis=0))


@pytest.mark.parametrize("n, d", [(16, 40), (16, 4)])
def test_statistics_are_global_under_a_sharded_batch(n, d):
  mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
  # Each device's own two samples are equal: local statistics would be zero.
  z = jnp.repeat(_samples(n // 2, d, seed=3), 2, axis=0)

  def loss(z):
    return _variance_loss(z, gamma=9.0) + _covariance_loss(z)

  gradient_of = jax.jit(jax.value_and_grad(loss))
  expected, expected_gradient = gradient_of(z)
  got, gradient = gradient_of(jax.device_put(z, sharding))
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_bfloat16_vectors_are_measured_in_float32():
  z = jnp.asarray(_samples(16, 6), jnp.bfloat16)
  exact = z.astype(jnp.float32)
  for loss in (
      _variance_loss,
      _covariance_loss,
      lambda z: vicreg.invariance_loss(z, 0 * z),
  ):
    assert loss(z).dtype == jnp.float32
    np.testing.assert_array_equal(loss(z), loss(exact))


def test_products_run_at_the_highest_precision():
  for form in _FORMS:
    program = str(
        jax.make_jaxpr(functools.partial(vicreg.covariance_loss, form=form))(
            jnp.zeros((4, 4))
        )
    )
    assert "HIGHEST" in program


@pytest.mark.parametrize("loss", [_variance_loss, _covariance_loss])
def test_a_single_sample_is_refused(loss):
  with pytest.raises(errors.UserError, match="at least 2 samples, got 1"):
    loss(jnp.ones((1, 4)))
