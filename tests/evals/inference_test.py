"""Compiled forward passes."""

import jax
import numpy as np
import pytest

from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import inference
from mcjepa_jax.models import mcjepa
from mcjepa_jax.training import build
from tests.helpers import tiny


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_predictions_do_not_depend_on_devices_or_on_the_last_batch(devices):
  cfg = tiny.config()
  model = build.model(cfg)
  params = jax.jit(lambda: mcjepa.init_params(model, 0))()
  one, many = sharding.make_mesh(1), sharding.make_mesh(devices)
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (6, 40, 32, 3), np.uint8)
  whole = inference.flow_predictor(model, params, one)(frames)
  part = inference.flow_predictor(model, params, many)(frames[2:4])
  assert whole.shape == (3, 40, 32, 2)
  # Noise through norms over few channels magnifies rounding; another pair's
  # flow is off by half a pixel.
  np.testing.assert_allclose(part[0], whole[1], atol=5e-3)
  assert np.abs(whole[0] - whole[1]).max() > 0.1
  embed = inference.embedder(model, params, many)
  images = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)
  np.testing.assert_allclose(embed(images)[3], embed(images[3:4])[0], atol=1e-5)
