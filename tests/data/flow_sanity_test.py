"""True flow held against its frames."""

import numpy as np
import pytest

from mcjepa_jax.data import flow_sanity
from tests.helpers import faulty_flow


def test_flow_of_other_frames_fits_by_no_reading():
  judge, rng = flow_sanity.Judge(), np.random.default_rng(0)
  for i in range(faulty_flow.SCENES):
    noise = rng.integers(0, 256, (96, 128, 3), np.uint8)
    judge.add({**faulty_flow.PAIRS[i], "frame_2": noise})
  (fault,) = judge.faults()
  assert "does not fit its frames, nor does another reading" in fault
  assert not judge.misreadings(certain=True)


def test_what_is_hidden_or_unknown_is_not_judged():
  example = faulty_flow.PAIRS[0]
  spoilt = example["frame_1"].copy()
  spoilt[:, :80] = 255 - spoilt[:, :80]
  seen = np.ones_like(example["valid"])
  seen[:, :80] = 0
  example = {**example, "frame_1": spoilt}
  assert flow_sanity.Judge().add(example) > 0.9
  for key in ("visible", "valid"):
    assert flow_sanity.Judge().add({**example, key: seen}) < 0.4


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda flow: 100 * flow, "shorter than the frame's diagonal"),
        (lambda flow: np.full_like(flow, np.nan), "came none in 1 of 1"),
    ],
)
def test_flow_that_cannot_be_is_a_fault(change, fault):
  judge, example = flow_sanity.Judge(), faulty_flow.PAIRS[0]
  judge.add({**example, "flow": change(example["flow"])})
  assert fault in judge.faults()[0]


def test_the_flows_length_and_share_are_reported():
  judge, example = flow_sanity.Judge(), faulty_flow.PAIRS[0]
  valid = np.zeros_like(example["valid"])
  valid[::4] = 1
  flow = np.where(valid > 0, np.float32((3, -4)), 99)
  judge.add({**example, "flow": flow, "valid": valid})
  assert judge.flow() == dict(max=5.0, mean=5.0, valid=0.25)
