import numpy as np
import pytest
from scipy import ndimage

from mcjepa_jax.evals import mask_metrics


def _square(y, x, side=10, shape=(60, 80)):
  mask = np.zeros(shape, bool)
  mask[y : y + side, x : x + side] = True
  return mask


def test_j_is_intersection_over_union():
  # 10x10 each, 5x10 in common: 50 of 150.
  assert (
      mask_metrics.region_similarity(_square(0, 0), _square(5, 0)) == 50 / 150
  )
  assert mask_metrics.region_similarity(_square(0, 0), _square(30, 0)) == 0
  assert mask_metrics.region_similarity(_square(3, 4), _square(3, 4)) == 1


def test_two_empty_masks_agree_and_an_empty_one_does_not():
  empty, full = np.zeros((60, 80), bool), _square(5, 5)
  for measure in (
      mask_metrics.region_similarity,
      mask_metrics.boundary_accuracy,
  ):
    assert measure(empty, empty) == 1
    assert measure(empty, full) == measure(full, empty) == 0


def test_a_boundary_lies_half_a_pixel_up_and_left():
  mask = np.zeros((5, 5), bool)
  mask[2:4, 2:4] = True
  expected = """
  .....
  .###.
  .#.#.
  .###.
  .....
  """.split()
  came = [
      "".join(".#"[v] for v in row) for row in mask_metrics.boundary(mask) * 1
  ]
  assert came == expected


def test_a_boundary_reaches_the_last_row_and_column_but_not_the_corner():
  mask = np.zeros((4, 4), bool)
  mask[:, 2:] = True
  assert (
      mask_metrics.boundary(mask).tolist() == [[False, True, False, False]] * 4
  )
  assert mask_metrics.boundary(mask.T)[1].all()
  corner = np.zeros((4, 4), bool)
  corner[3, 3] = True
  assert not mask_metrics.boundary(corner)[3, 3]


@pytest.mark.parametrize(("shift", "expected"), [(0, 1), (1, 1), (2, 0)])
def test_f_has_a_tolerance_of_0008_of_the_diagonal(shift, expected):
  # The diagonal of 60x80 is 100: 0.8, rounded up to a pixel.
  left, moved = np.zeros((2, 60, 80), bool)
  left[:, 40:] = True
  moved[:, 40 + shift :] = True
  assert mask_metrics.boundary_accuracy(left, moved) == expected


@pytest.mark.parametrize(
    ("offset", "expected"), [((4, 4), 0.0), ((4, 3), 0.25), ((5, 0), 0.5)]
)
def test_the_tolerance_is_a_disk(offset, expected):
  # 300x400 has a diagonal of 500, so a radius of 4. The boundary of one pixel
  # is 2x2: at (4, 3) the nearest two corners alone are near, sqrt(13) apart; at
  # (5, 0) the lower two and the upper two are, 4 apart.
  ours = _square(100, 100, 1, (300, 400))
  theirs = _square(100 + offset[0], 100 + offset[1], 1, (300, 400))
  assert mask_metrics.boundary_accuracy(ours, theirs) == expected


def test_f_weighs_precision_and_recall():
  # Of two squares far apart one is found: precision 1, recall a half.
  both = _square(5, 5) | _square(40, 50)
  assert mask_metrics.boundary_accuracy(_square(5, 5), both) == pytest.approx(
      2 / 3
  )


def test_f_equals_the_distance_to_the_other_boundary():
  # The diagonal of 600x800 is 1000.
  rng = np.random.default_rng(0)
  blobs = [
      ndimage.gaussian_filter(rng.normal(size=(600, 800)), 15) > 0.01
      for _ in range(2)
  ]
  edges = [mask_metrics.boundary(blob) for blob in blobs]
  far = [ndimage.distance_transform_edt(~edge) for edge in edges]
  precision, recall = (
      np.mean(far[1 - i][edges[i]] <= 8 + 1e-9) for i in range(2)
  )
  np.testing.assert_allclose(
      mask_metrics.boundary_accuracy(*blobs),
      2 * precision * recall / (precision + recall),
      rtol=1e-12,
  )
  assert 0.1 < precision < 0.9


def test_statistics_are_mean_recall_and_decay_over_quarters():
  values = np.array([1.0, 1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0])
  # Ends at 1, 2.75, 4.5, 6.25, 8: the quarters are 1-3 and 6-8.
  mean, recall, decay = mask_metrics.statistics(values)
  np.testing.assert_allclose(
      (mean, recall, decay), (4.5 / 8, 0.5, 2.8 / 3 - 0.6 / 3)
  )


@pytest.mark.parametrize("length", [1, 2, 3, 300])
def test_statistics_of_any_length_are_finite(length):
  mean, recall, decay = mask_metrics.statistics(np.full(length, 0.75))
  assert (mean, recall, decay) == (0.75, 1, 0)


def test_decay_sees_the_end_of_a_long_sequence():
  values = np.ones(400)
  values[-80:] = 0
  # The last quarter is frames 300 to 400, counted from 1.
  assert mask_metrics.statistics(values).decay == pytest.approx(80 / 101)
