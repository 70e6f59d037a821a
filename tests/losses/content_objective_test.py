"""The terms of the content task."""

import jax.numpy as jnp
import numpy as np

from mcjepa_jax.losses import (
    content_objective,
    vicreg,
)
from tests.helpers import arrays


def test_content_terms_average_the_hinges_and_sum_the_covariances():
  z = 3 * arrays.uniform_array((12, 5))
  weights = dict(invariance=1.0, variance=1.0, covariance=1.0)
  terms = content_objective.content_terms(z, weights=weights)
  z_1, z_2 = z[::2], z[1::2]
  np.testing.assert_allclose(
      terms["content/invariance"], jnp.mean((z_1 - z_2) ** 2), rtol=1e-5
  )
  np.testing.assert_allclose(
      terms["content/variance"],
      (vicreg.variance_loss(z_1) + vicreg.variance_loss(z_2)) / 2,
      rtol=1e-5,
  )
  np.testing.assert_allclose(
      terms["content/covariance"],
      vicreg.covariance_loss(z_1) + vicreg.covariance_loss(z_2),
      rtol=1e-5,
  )


def test_a_term_of_weight_zero_is_not_computed():
  weights = dict(invariance=1.0, variance=0.0, covariance=0.0)
  terms = content_objective.content_terms(
      jnp.full((2, 3), jnp.nan), weights=weights
  )
  assert list(terms) == ["content/invariance"]
