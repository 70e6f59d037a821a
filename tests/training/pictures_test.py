"""Pictures of a run."""

import numpy as np

from mcjepa_jax.training import build, pictures
from tests.helpers import tiny


def test_curves_show_each_group_of_terms_that_was_logged():
  lines = [
      {"step": 0, "content/variance": 1.0, "motion/cycle/stride_4": 2.0},
      {"step": 5, "content/variance": 0.5},
  ]
  drawn = pictures.of_logs(lines)
  assert set(drawn) == {"curves_content", "curves_motion"}
  assert all(p.dtype == np.uint8 and p.ndim == 3 for p in drawn.values())


def test_pictures_of_a_state_show_flow_and_features():
  cfg = tiny.config()
  state, _, mesh = tiny.state_and_step(cfg, "both")
  batch = tiny.batch()
  arrays = {
      "motion": {"frames": batch["frames"]},
      "content": {"views": batch["views"]},
  }
  drawn = pictures.of_state(build.model(cfg), state.params, mesh, arrays)
  assert set(drawn) == {"flow", "features"}
  for picture in drawn.values():
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3
    assert picture.std() > 5
