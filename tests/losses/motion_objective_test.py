"""The terms of the motion task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax.losses import content_objective, flow_losses, motion_objective
from mcjepa_jax.ops import flow_ops
from tests.helpers import arrays, tiny

_NO_MOTION = {
    kind: {"stride_1": 0.0, "stride_4": 0.0}
    for kind in motion_objective.MOTION_KINDS
}


def _pair_moving_right(shift):
  """Interleaved frames in which all moves `shift` pixels to the right."""
  wide = arrays.uniform_array((1, 16, 32, 3), seed=4)
  frame_1, frame_2 = wide[:, :, 8:24], wide[:, :, 8 - shift : 24 - shift]
  flow = jnp.zeros((2, 16, 16, 2)).at[0, ..., 0].set(shift)
  return jnp.concatenate([frame_1, frame_2]), flow.at[1, ..., 0].set(-shift)


def test_reconstruction_is_zero_at_the_true_flow_and_not_at_its_opposite():
  frames, flow = _pair_moving_right(3)
  weights = _NO_MOTION | {"reconstruction": {"stride_1": 1.0}}

  def term(flow):
    mask = motion_objective.motion_mask(
        flow, occlusion_kind="none", out_of_frame=True
    )
    terms = motion_objective.motion_terms(
        {},
        {1: flow},
        frames,
        mask,
        weights=weights,
        photometric=dict(l1=1.0, l2=0.0, ssim=0.0, census=0.0),
        smoothness={},
    )
    return float(terms["motion/reconstruction/stride_1"])

  assert term(flow) < 1e-6
  assert term(-flow) > 0.1


def test_the_mask_drops_what_leaves_the_frame_and_what_is_occluded():
  _, flow = _pair_moving_right(3)
  mask = motion_objective.motion_mask(
      flow, occlusion_kind="none", out_of_frame=True
  )
  np.testing.assert_array_equal(mask[0, 0, :, 0], [1.0] * 13 + [0.0] * 3)
  np.testing.assert_array_equal(mask[1, 0, :, 0], [0.0] * 3 + [1.0] * 13)
  # The way back disagrees: not visible.
  wrong = flow.at[1].multiply(-1)
  for occlusion in ("forward_backward",):
    mask = motion_objective.motion_mask(
        wrong, occlusion_kind=occlusion, out_of_frame=False
    )
    assert float(mask[0, 8, 8, 0]) == 0.0
    mask = motion_objective.motion_mask(
        wrong,
        occlusion_kind=occlusion,
        out_of_frame=False,
        occlusion_active=False,
    )
    assert float(mask.min()) == 1.0
  mask = motion_objective.motion_mask(
      wrong, occlusion_kind="range_map", out_of_frame=False
  )
  # All of frame 2 points 3 pixels to the right: nothing lands at the left.
  np.testing.assert_array_equal(mask[0, 0, :3, 0], 0.0)


def test_flow_at_a_finer_stride_is_the_finest_one_scaled():
  flows = {4: jnp.full((2, 4, 4, 2), 1.5), 8: jnp.full((2, 2, 2, 2), 9.0)}
  assert motion_objective.flow_at(flows, 8, (16, 16)) is flows[8]
  fine = motion_objective.flow_at(flows, 2, (16, 16))
  assert fine.shape == (2, 8, 8, 2)
  np.testing.assert_allclose(fine, 3.0, rtol=1e-6)


def test_regression_compares_with_the_other_frame_of_the_pair():
  x = arrays.uniform_array((4, 8, 8, 3), seed=2)
  flow = jnp.zeros((4, 8, 8, 2))
  weights = _NO_MOTION | {"regression": {"stride_4": 1.0}}
  terms = motion_objective.motion_terms(
      {4: x},
      {4: flow},
      jnp.zeros((4, 32, 32, 3)),
      jnp.ones((4, 32, 32, 1)),
      weights=weights,
      photometric={},
      smoothness={},
  )
  expected = jnp.mean((x - flow_ops.swap_pairs(x)) ** 2)
  np.testing.assert_allclose(
      terms["motion/regression/stride_4"], expected, rtol=1e-5
  )


@pytest.mark.parametrize("name", ["motion.terms", "content.terms"])
def test_config_names_every_kind_of_term(name):
  part, terms = name.split(".")
  kinds = set(tiny.config()[part][terms])
  assert kinds == set(
      motion_objective.MOTION_KINDS
      if part == "motion"
      else content_objective.CONTENT_KINDS
  )


@pytest.mark.parametrize("occlusion", ["forward_backward", "range_map"])
def test_a_direction_is_checked_against_the_other_one(occlusion):
  there = np.tile(np.float32((2, 0)), (1, 8, 12, 1))
  flow = np.stack([there[0], -there[0]])
  mask = motion_objective.motion_mask(
      jnp.asarray(flow), occlusion_kind=occlusion, out_of_frame=False
  )
  # The inner columns are visible in both frames whichever way one goes.
  np.testing.assert_array_equal(mask[:, :, 2:-2], 1)
  if occlusion == "range_map":  # nothing of the other frame arrives there
    np.testing.assert_array_equal(mask[0, :, -2:], 0)
    np.testing.assert_array_equal(mask[1, :, :2], 0)


def test_regression_and_cycle_are_the_losses_of_their_own_warps():
  frames, flow = _pair_moving_right(4)
  features, flows = {4: arrays.uniform_array((2, 4, 4, 3), seed=7)}, {
      4: flow[:, ::4, ::4] / 3
  }
  mask = arrays.uniform_array((2, 16, 16, 1), seed=8)
  weights = _NO_MOTION | {
      kind: {"stride_4": 1.0} for kind in ("regression", "cycle")
  }
  weights["reconstruction"] = {"stride_1": 1.0, "stride_4": 1.0}

  def terms(features, flows):
    found = motion_objective.motion_terms(
        features, flows | {1: flow}, frames, mask,
        weights=weights, photometric={"ssim": 0.0}, smoothness={},
    )  # fmt: skip
    return {name: found[name] for name in found if "reconstruct" not in name}

  def alone(features, flows):
    x, forward = features[4], flows[4]
    counts = flow_ops.area_mean(mask, 4)
    backward = flow_ops.swap_pairs(forward)
    return {
        "motion/regression/stride_4": flow_losses.feature_regression_loss(
            x, flow_ops.warp(flow_ops.swap_pairs(x), forward), counts
        ),
        "motion/cycle/stride_4": flow_losses.cycle_loss(
            x, flow_ops.warp(x, backward), forward, counts
        ),
    }

  found, expected = (jax.jit(f)(features, flows) for f in (terms, alone))
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6)
  found, expected = (
      jax.jit(jax.jacrev(f, (0, 1)))(features, flows) for f in (terms, alone)
  )
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert np.any(b)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
