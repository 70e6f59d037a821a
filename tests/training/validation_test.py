import math

import pytest

from configs import mcjepa_convnext_tiny, quickstart
from mcjepa_jax import errors
from mcjepa_jax.data.pipeline import batches
from mcjepa_jax.data.sets import synthetic
from mcjepa_jax.training import validation
from tests.helpers import tiny


@pytest.mark.parametrize("module", [quickstart, mcjepa_convnext_tiny])
def test_the_configs_as_they_are_have_no_fault(module):
  assert validation.faults(module.get_config(), devices=1) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(mode="both"), "mode: expected one of combined"),
        (dict(remat="layer"), "remat: expected one of none, stage, block"),
        (dict(keep_hours=1e12), "keep_hours: expected 0 to 1000000, got"),
        (dict(hang_seconds=math.inf), "hang_seconds: expected 0 to"),
        (dict(num_steps=0), "num_steps: expected a positive number, got 0"),
        (dict(motion__size=(30, 32)), "motion.size: expected .* of 16"),
        (dict(content__size=40), "content.size: expected a multiple of 16"),
        (dict(model__estimator__finest_stride=3), "finest_stride.*got 3"),
        (dict(motion__smoothness__order=3), "smoothness.order.*1 or 2"),
        (
            dict(motion__terms__cycle__stride_32=1.0),
            "terms.cycle.stride_32.*strides are",
        ),
        (
            dict(motion__terms__cycle__stride_4=-1.0),
            "terms.cycle.stride_4: expected 0 or more",
        ),
        (dict(accumulate=3), "batch_size: expected a multiple of accumulate"),
        (dict(motion__sources=(("synthetic",),)), "motion.sources: expected"),
        (dict(motion__sources=("synthetic",)), "motion.sources: expected"),
        (
            dict(motion__sources=(("synthetic", 1.0, 64),)),
            "motion.sources: expected .*height, width",
        ),
        (
            dict(motion__sources=(("synthetic", 1.0, (64, 60)),)),
            "motion.sources: synthetic: expected .* of 16",
        ),
        (dict(motion__mixing="shares"), "mixing: expected one of weights"),
        (dict(content__sources=()), "content.sources: expected"),
        (dict(bad_records=2.0), "bad_records: expected 0 to 1"),
        (dict(motion__size=("a", 64)), "motion.size: expected"),
        (dict(motion__downscale=(0.0, 1.0)), "downscale: expected .* above 0"),
        (dict(motion__gaps=(1,)), "motion.gaps: expected"),
        (dict(content__ratio=(0, 1)), "content.ratio: expected"),
        (dict(content__scale=(2.0, 3.0)), "content.scale: .* up to 1, got"),
        (dict(content__blur=(1.0,)), "content.blur: expected two of 0 to 1"),
        (dict(content__jitter__p=7.0), "content.jitter.p: expected 0 to 1"),
        (dict(content__jitter__hue=9.0), "jitter.hue: expected 0 to 0.5"),
        (dict(content__terms__variance=-1.0), "variance: expected 0 or more"),
        (dict(model__expander__widths=()), "expander.widths: expected"),
        (dict(model__encoder__drop_path=1.5), "drop_path: expected 0 to"),
        (dict(seed=10**20), "seed: expected 0 to 2147483647, got 1000"),
        (dict(evals=(1,)), "evals: expected names"),
        (dict(davis__size=0), "davis.size: expected 1 to 4096, got 0"),
        (dict(davis__radius=65), "davis.radius: expected 1 to 64, got 65"),
        (dict(davis__top=0), "davis.top: expected 1 to 100, got 0"),
        (dict(davis__context=-1), "davis.context: expected 0 or more"),
        (dict(davis__temperature=0.0), "temperature: expected a positive"),
        (
            dict(evals=("davis/2017",), davis__stride=64),
            "davis.stride: expected one of .*, got 64",
        ),
        (
            dict(optimizer__encoder__learning_rate=float("inf")),
            "learning_rate: expected a positive number, got inf",
        ),
        (dict(motion__weight=0.0), "motion: mode combined trains it"),
        (dict(keep_best=1), "best_metric: with keep_best expected a result"),
    ],
)
def test_a_fault_names_the_key_what_was_expected_and_what_came(changes, words):
  import re

  faults = validation.faults(tiny.config(**changes), devices=1)
  assert any(re.search(words, fault) for fault in faults), faults


def test_all_faults_are_found_at_once():
  faults = validation.faults(
      tiny.config(mode="x", num_steps=0, motion__batch_size=0), devices=1
  )
  assert len(faults) == 3


def test_eight_pairs_fill_sixteen_devices_and_three_do_not_divide_four():
  assert not validation.faults(
      tiny.config(motion__batch_size=8, content__batch_size=8), devices=16
  )
  faults = validation.faults(tiny.config(motion__batch_size=3), devices=4)
  assert faults == [
      "motion.batch_size: 3 give 6 frames a micro-batch, which 4 devices do not"
      " divide"
  ]


@pytest.mark.parametrize("pairs", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 16])
def test_a_batch_that_the_devices_divide_feeds_as_many_hosts(pairs, hosts):
  faults = validation.faults(
      tiny.config(motion__batch_size=pairs, mode="motion"), devices=hosts
  )
  source = batches.MotionSource(
      "made", synthetic.Pairs(seed=0, num_examples=2), (32, 32)
  )
  refused = errors.collect(
      lambda: batches.motion_stream(
          [source], batch_size=pairs, seed=0, host_count=hosts
      )
  )
  assert bool(faults) == bool(refused) == bool(2 * pairs % hosts)


def test_what_a_resumed_run_may_change_are_keys_of_the_config():
  assert set(quickstart.get_config()) >= validation.OPERATIONAL


def test_a_run_that_is_to_roll_back_keeps_something_to_go_back_to():
  changes = dict(alarms__action="rollback", alarms__window=100, save_every=50)
  (fault,) = validation.no_way_back(tiny.config(**changes))
  assert "as many as 100 steps" in fault and "got (2 - 1) * 50" in fault
  for more in (dict(keep_last=3), dict(keep_hours=1.0)):
    assert not validation.no_way_back(tiny.config(**changes | more))
  assert not validation.no_way_back(
      tiny.config(**changes | dict(alarms__action="stop"))
  )
