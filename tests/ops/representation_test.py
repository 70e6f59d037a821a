"""Measures of embeddings: spread and rank."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mcjepa_jax.ops import representation


def test_feature_std_tells_spread_from_collapse():
  # By hand: stds 1 and 3 of the two channels.
  x = jnp.array([[-1.0, 3.0], [1.0, -3.0]]).reshape(2, 1, 1, 2)
  np.testing.assert_allclose(representation.feature_std(x), 2)
  np.testing.assert_allclose(representation.feature_std(x[:, 0, 0]), 2)
  same_everywhere = jnp.broadcast_to(jnp.arange(8.0), (2, 3, 3, 8))
  assert representation.feature_std(same_everywhere) == 0
  normal = jax.random.normal(jax.random.key(0), (4, 16, 16, 3), jnp.bfloat16)
  np.testing.assert_allclose(representation.feature_std(normal), 1, atol=0.05)


def test_rank_me_counts_the_directions_in_use():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(40, 8)))[0]
  np.testing.assert_allclose(representation.rank_me(basis), 8, rtol=1e-4)
  one = np.outer(basis[:, 0], np.ones(8))
  np.testing.assert_allclose(representation.rank_me(one), 1, rtol=1e-4)
  # By hand: p = (3/4, 1/4), exp(entropy) = 4 / 3^(3/4).
  uneven = np.diag([3.0, 1.0])
  np.testing.assert_allclose(
      representation.rank_me(uneven), 4 / 3**0.75, rtol=1e-5
  )
  assert math.isfinite(representation.rank_me(np.zeros((4, 3))))
  assert math.isnan(
      representation.rank_me(np.array([[1.0, np.nan], [2.0, 3.0]]))
  )
