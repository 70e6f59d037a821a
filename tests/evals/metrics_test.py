"""Metrics against hand-made values, scipy and KITTI's formulas."""

import math

import numpy as np
import pytest
from scipy import optimize

from mcjepa_jax.data.readers import flow_files
from mcjepa_jax.evals import metrics


def _flow(*vectors) -> np.ndarray:
  return np.array([vectors], np.float32)


def _all(flow: np.ndarray) -> np.ndarray:
  return np.ones((*flow.shape[:2], 1), np.float32)


def test_endpoint_error_is_the_length_of_the_difference():
  error = metrics.endpoint_error(_flow((3, 4), (1, 1)), _flow((0, 0), (1, -1)))
  np.testing.assert_allclose(error, [[5, 2]])


@pytest.mark.parametrize(
    "flow, truth, is_outlier",
    [
        ((0, 3.1), (0, 0), True),
        ((0, 2.9), (0, 0), False),  # Not above 3 px, though infinitely many %.
        ((103.1, 0), (100, 0), False),  # Above 3 px, but 3.1 %.
        ((105.1, 0), (100, 0), True),
        ((97, 0), (100, 0), False),
        ((3, 0), (0, 0), False),  # Exactly 3 px.
        ((np.nan, 0), (1, 0), True),
    ],
)
def test_an_outlier_is_off_by_3_px_and_by_5_percent(flow, truth, is_outlier):
  truth = _flow(truth)
  totals = metrics.flow_totals(_flow(flow), truth, _all(truth))
  assert (totals.outliers, totals.pixels) == (is_outlier, 1)


def test_epe_weighs_pairs_equally_and_fl_all_weighs_pixels():
  small = _flow((10, 0), (0, 0))
  large = _flow(*[(0, 1)] * 6)
  total = sum(
      (
          metrics.flow_totals(flow, np.zeros_like(flow), _all(flow))
          for flow in (small, large)
      ),
      metrics.FlowTotals(),
  )
  # By hand: (10 + 0) / 2 = 5 and 1, their mean; one outlier of eight pixels.
  assert total.epe == 3
  assert total.fl_all == 12.5
  assert total.px1 == 12.5


def test_of_several_truths_the_nearest_the_longest_and_the_mean_count():
  # By hand: off by 4.5 of (0, 30), 4.5 % of the longest; mean speed 45.
  truth = _flow(((0, 0), (100, 0), (0, 30), (30, 40)))
  totals = metrics.flow_totals(_flow((0, 34.5)), truth, _all(truth))
  assert totals == metrics.FlowTotals(1, 4.5, 1, 0, 1, {"s40": (4.5, 1)})
  # Off by 4 of (0, 10), of which 5 % of the longest is 2.5; mean speed 17.5.
  truth = _flow(((50, 0), (0, 0), (0, 10), (6, 8)))
  totals = metrics.flow_totals(_flow((0, 6)), truth, _all(truth))
  assert totals == metrics.FlowTotals(1, 4.0, 1, 1, 1, {"s10_40": (4.0, 1)})


def test_40_px_are_fast_where_there_are_several_truths():
  for truth, name in (
      (_flow((40, 0)), "s10_40"),
      (_flow(((20, 0), (60, 0), (40, 0), (40, 0))), "s40"),
  ):
    totals = metrics.flow_totals(_flow((40, 0)), truth, _all(truth))
    assert set(totals.classes) == {name}


def test_invalid_pixels_are_never_read():
  truth = _flow((1, 0), (np.nan, 1e10))
  valid = np.array([[[1.0], [0.0]]])
  totals = metrics.flow_totals(np.zeros_like(truth), truth, valid)
  assert totals == metrics.FlowTotals(1, 1.0, 1, 0, classes={"s0_10": (1.0, 1)})
  np.testing.assert_allclose(
      metrics.best_constant_flow([truth], [valid]), (1, 0)
  )


def test_a_pair_without_valid_pixels_counts_nowhere():
  flow = _flow((1, 0))
  nothing = np.zeros((1, 1, 1))
  assert metrics.flow_totals(flow, flow, nothing) == metrics.FlowTotals()
  assert math.isnan(metrics.FlowTotals().epe)
  assert math.isnan(metrics.FlowTotals().fl_all)
  constant = metrics.best_constant_flow([flow, 9 * flow], [_all(flow), nothing])
  np.testing.assert_allclose(constant, (1, 0))
  assert not metrics.best_constant_flow([flow], [nothing]).any()


def test_epe_and_fl_all_of_the_kitti_sample(shared_data):
  folder = shared_data / "kitti" / "devkit2015"
  truth, valid = flow_files.read_kitti_flow(folder / "flow_gt.png")
  flow, _ = flow_files.read_kitti_flow(folder / "flow_est.png")
  totals = metrics.flow_totals(flow, truth, valid)
  # From a pixel by pixel loop in the form of the kit's C++ (err > 3 and
  # err / length > 0.05), the files read by OpenCV.
  assert (totals.pixels, totals.outliers) == (111326, 23031)
  np.testing.assert_allclose(totals.epe, 12.200722590595594, rtol=1e-9)
  np.testing.assert_allclose(totals.fl_all, 20.687889621472074, rtol=1e-9)


def _epe(constant, truths, valids):
  return sum(
      (
          metrics.flow_totals(
              np.broadcast_to(constant, truth.shape), truth, valid
          )
          for truth, valid in zip(truths, valids, strict=True)
      ),
      metrics.FlowTotals(),
  ).epe


@pytest.mark.parametrize("pairs", [1, 3])
def test_best_constant_flow_has_the_least_epe_that_scipy_finds(pairs):
  rng = np.random.default_rng(pairs)
  truths, valids = [], []
  for i in range(pairs):
    # Skewed, elongated, of another size and centre each.
    truth = rng.gamma(0.6, (4, 1), size=(5 + 7 * i, 9, 2)) + 5 * i
    truths.append(truth.astype(np.float32))
    valids.append(rng.integers(0, 2, (*truth.shape[:2], 1)).astype(np.float32))
  constant = metrics.best_constant_flow(truths, valids)
  reference = optimize.minimize(
      _epe,
      np.zeros(2),
      (truths, valids),
      method="Nelder-Mead",
      options=dict(xatol=1e-8, fatol=1e-12, maxiter=2000),
  )
  assert _epe(constant, truths, valids) <= reference.fun + 1e-9
  np.testing.assert_allclose(constant, reference.x, atol=1e-4)


def test_best_constant_flow_is_the_median_on_a_line():
  truth = _flow((0, 0), (1, 0), (2, 0), (30, 0), (100, 0))
  constant = metrics.best_constant_flow([truth], [_all(truth)])
  np.testing.assert_allclose(constant, (2, 0), atol=1e-5)


def test_best_constant_flow_weighs_pairs_equally():
  one, many = _flow((4, 0)), _flow(*[(0, 0)] * 9, (1, 0))
  # By hand: the pair of one vector holds half of all weight.
  constant = metrics.best_constant_flow(
      [one, one, many], [_all(one), _all(one), _all(many)]
  )
  np.testing.assert_allclose(constant, (4, 0), atol=1e-5)


def test_best_constant_flow_leaves_a_start_on_a_data_point():
  # The mean is the first vector exactly; three of the five are another.
  truth = _flow((0, 0), (1, 0), (1, 0), (1, 0), (-3, 0))
  constant = metrics.best_constant_flow([truth], [_all(truth)])
  np.testing.assert_allclose(constant, (1, 0), atol=1e-5)
  # By hand: pull 0.4, stiffness 2 / 3, and the vector holds half of the pull.
  step = metrics.best_constant_flow([truth], [_all(truth)], max_steps=1)
  np.testing.assert_allclose(step, (0.3, 0), rtol=1e-6)


def test_best_constant_flow_stays_on_the_best_data_point():
  # The mean is the first vector, whose weight of 3 outdoes a pull of 1.
  truth = _flow((0, 0), (0, 0), (0, 0), (2, 0), (-1, 0), (-1, 0))
  constant = metrics.best_constant_flow([truth], [_all(truth)])
  np.testing.assert_array_equal(constant, (0, 0))
  same = _flow((2.5, -1), (2.5, -1), (2.5, -1))
  np.testing.assert_array_equal(
      metrics.best_constant_flow([same], [_all(same)]), (2.5, -1)
  )


def test_correct_counts_labels_among_the_highest_scores():
  scores = np.array(
      [[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0, 0, 0], [1, np.nan, 0]]
  )
  labels = np.array([1, 1, 2, 0])
  assert metrics.correct(scores, labels).tolist() == [True, False, False, False]
  assert metrics.correct(scores, labels, top=2).tolist() == [
      True,
      False,
      False,
      True,
  ]
  assert metrics.correct(scores, labels, top=3).all()
