"""Features of labelled sets."""

import numpy as np
import pytest

from mcjepa_jax.data.sets import synthetic
from mcjepa_jax.evals import frozen_features


def test_pixels_of_a_large_set_are_of_smaller_pictures(monkeypatch):
  monkeypatch.setattr(frozen_features, "_PIXEL_VALUES", 12 * 16 * 16 * 3)
  images = synthetic.Images(size=(64, 64), seed=0, num_examples=12)
  part = frozen_features.extract(images, {}, size=64, name="", progress=False)
  assert part.features["pixels"].shape == (12, 16 * 16 * 3)
  mean = np.mean([images[i]["image"].mean() for i in range(12)]) / 255
  assert part.features["pixels"].mean() == pytest.approx(mean, abs=0.02)
