"""The weighted sum of the terms and the ramp."""

import jax.numpy as jnp
import numpy as np

from mcjepa_jax.losses import weighting


def test_losses_are_weights_times_terms_with_the_ramp_where_it_belongs():
  terms = {
      "content/invariance": jnp.array(2.0),
      "motion/cycle/stride_4": jnp.array(3.0),
      "motion/variance/stride_4": jnp.array(5.0),
  }
  losses = weighting.weighted_sums(
      terms,
      motion_weight=0.1,
      motion_ramp=jnp.array(0.5),
      motion={"cycle": {"stride_4": 7.0}, "variance": {"stride_4": 11.0}},
      content={"invariance": 25.0},
  )
  np.testing.assert_allclose(losses["content"], 50.0)
  np.testing.assert_allclose(
      losses["motion"], 0.1 * (0.5 * 7 * 3 + 11 * 5), rtol=1e-6
  )


def test_the_ramp_counts_from_its_start():
  ramp = [float(weighting.ramp(jnp.array(s), 10, 4)) for s in (8, 10, 12, 20)]
  assert ramp == [0.0, 0.25, 0.75, 1.0]
  assert float(weighting.ramp(jnp.array(0), 0, 0)) == 1.0
