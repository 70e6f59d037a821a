"""Crops, flips and pairs, on images whose pixels say where they came from."""

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax.data import transforms
from mcjepa_jax.errors import UserError


def _coordinates(height, width):
  """An image whose red is the column and green the row."""
  y, x = np.mgrid[:height, :width]
  return np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)


def _noise(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_random_box_has_torchvisions_area_and_aspect():
  rng = np.random.default_rng(0)
  boxes = np.array(
      [transforms.random_box(1000, 1000, rng) for _ in range(4000)]
  )
  top, left, height, width = boxes.T
  assert (top >= 0).all() and (top + height <= 1000).all()
  assert (left >= 0).all() and (left + width <= 1000).all()
  area = height * width / 1e6
  # A box that does not fit is drawn again, so only small areas stay uniform.
  small = area[area < 0.7]
  np.testing.assert_allclose(
      np.quantile(small, [0, 0.25, 0.5, 0.75, 1]),
      np.linspace(0.08, 0.7, 5),
      atol=0.02,
  )
  aspect = np.log(width / height)[area < 0.7]
  np.testing.assert_allclose(
      np.quantile(aspect, [0, 0.25, 0.5, 0.75, 1]),
      np.linspace(-1, 1, 5) * np.log(4 / 3),
      atol=0.02,
  )


def test_every_place_is_equally_likely():
  rng = np.random.default_rng(0)
  recipe = dict(scale=(0.25, 0.25), ratio=(1.0, 1.0))
  boxes = [transforms.random_box(4, 4, rng, **recipe) for _ in range(3000)]
  places, counts = np.unique(boxes, axis=0, return_counts=True)
  np.testing.assert_array_equal(
      places, [(y, x, 2, 2) for y in range(3) for x in range(3)]
  )
  np.testing.assert_allclose(counts / 3000, 1 / 9, atol=0.03)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, (0, 493, 10, 13)),
        (1000, 10, (493, 0, 13, 10)),
        (30, 30, (0, 0, 30, 30)),
    ],
)
def test_box_that_never_fits_becomes_the_central_one(height, width, box):
  rng = np.random.default_rng(0)
  assert transforms.random_box(height, width, rng, scale=(4.0, 5.0)) == box


def test_crop_is_pillows_antialiased_bicubic_of_its_box():
  image = _noise(90, 70)
  box = transforms.random_box(90, 70, np.random.default_rng(5))
  top, left, height, width = box
  crop = Image.fromarray(image).crop((left, top, left + width, top + height))
  expected = crop.resize((16, 16), Image.Resampling.BICUBIC)
  ours = transforms.random_resized_crop(
      image, np.random.default_rng(5), size=16
  )
  np.testing.assert_array_equal(ours, expected)


def test_views_are_two_crops_half_of_them_mirrored():
  image = _coordinates(64, 64)
  mirrored, rng = [], np.random.default_rng(0)
  for _ in range(600):
    views = transforms.two_views(image, rng, size=8, scale=(0.3, 1.0))
    assert views.shape == (2, 8, 8, 3) and views.dtype == np.uint8
    mirrored.append(views[:, 0, 0, 0] > views[:, 0, -1, 0])
    assert (views[:, 0, 0, 1] < views[:, -1, 0, 1]).all()
    assert (views[0] != views[1]).any()
  mirrored = np.array(mirrored)
  np.testing.assert_allclose(mirrored.mean(axis=0), 0.5, atol=0.1)
  assert abs(np.corrcoef(mirrored.T)[0, 1]) < 0.2
  views = transforms.two_views(image, rng, size=8, flip=False)
  assert (views[:, 0, 0, 0] < views[:, 0, -1, 0]).all()


def test_pair_keeps_one_geometry_and_all_four_orientations():
  frame_1 = _coordinates(40, 60)
  frame_2 = frame_1 + np.array([0, 0, 9], np.uint8)
  rng, seen, corners = np.random.default_rng(0), [], []
  for _ in range(400):
    pair = transforms.pair_frames(frame_1, frame_2, rng, size=(24, 32))
    assert pair.shape == (2, 24, 32, 3) and pair.flags.c_contiguous
    np.testing.assert_array_equal(pair[0, ..., :2], pair[1, ..., :2])
    # Untouched pixels: neighbours are neighbours of the frame.
    step = np.diff(pair[0, :, :, 0].astype(int), axis=1)
    assert np.unique(step).size == 1 and abs(step[0, 0]) == 1
    assert (np.diff(pair[0, :, :, 1].astype(int), axis=0) == 1).all()
    assert sorted(pair[:, 0, 0, 2]) == [0, 9]
    seen.append((step[0, 0] < 0, pair[0, 0, 0, 2] == 9))
    corners.append((pair[0, 0, 0, 1], pair[0, 0, :, 0].min()))
  _, counts = np.unique(seen, axis=0, return_counts=True)
  np.testing.assert_allclose(counts / 400, 0.25, atol=0.08)
  np.testing.assert_array_equal(np.min(corners, axis=0), [0, 0])
  np.testing.assert_array_equal(np.max(corners, axis=0), [16, 28])


def test_flip_and_swap_can_be_switched_off():
  frame_1, frame_2 = _noise(24, 32, 1), _noise(24, 32, 2)
  for seed in range(8):
    pair = transforms.pair_frames(
        frame_1,
        frame_2,
        np.random.default_rng(seed),
        size=(24, 32),
        flip=False,
        swap=False,
    )
    np.testing.assert_array_equal(pair, [frame_1, frame_2])


def test_small_frame_is_enlarged_just_enough():
  # 20x60 for 32x48: the height asks for 1.6, so 30 of the 60 columns remain.
  rng = np.random.default_rng(0)
  boxes = [
      transforms.pair_box(20, 60, rng, size=(32, 48), scale=(0.5, 1.0))
      for _ in range(100)
  ]
  assert {(box[0], *box[2:]) for box in boxes} == {(0, 20, 30)}
  assert {box[1] for box in boxes} >= {0, 30}
  pair = transforms.pair_frames(
      _noise(20, 60), _noise(20, 60), rng, size=(32, 48)
  )
  assert pair.shape == (2, 32, 48, 3)


def test_scale_is_drawn_log_uniformly():
  rng = np.random.default_rng(0)
  boxes = np.array(
      [
          transforms.pair_box(
              1000, 2000, rng, size=(100, 200), scale=(1 / 8, 1 / 2)
          )
          for _ in range(2000)
      ]
  )
  np.testing.assert_allclose(boxes[:, 3], 2 * boxes[:, 2], atol=1)
  quantiles = np.quantile(np.log2(boxes[:, 2] / 100), [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(quantiles, [1, 1.5, 2, 2.5, 3], atol=0.07)


def test_scaled_pair_is_resampled_once_from_its_box():
  frame = _noise(60, 80)
  pair = transforms.pair_frames(
      frame,
      frame,
      np.random.default_rng(0),
      size=(30, 40),
      scale=(0.5, 0.5),
      flip=False,
  )
  expected = Image.fromarray(frame).resize((40, 30), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(pair, [expected, expected])


def test_resize_mode_keeps_the_whole_frame():
  frame = _noise(30, 100)
  pair = transforms.pair_frames(
      frame,
      frame,
      np.random.default_rng(0),
      size=(16, 48),
      mode="resize",
      flip=False,
  )
  expected = Image.fromarray(frame).resize((48, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(pair, [expected, expected])


def test_faults_of_a_pair_are_the_users():
  rng = np.random.default_rng(0)
  with pytest.raises(UserError, match="10x20 and 10x21"):
    transforms.pair_frames(_noise(10, 20), _noise(10, 21), rng, size=(8, 8))
  with pytest.raises(UserError, match='"crop" or "resize", got "pad"'):
    transforms.pair_frames(
        _noise(10, 20), _noise(10, 20), rng, size=(8, 8), mode="pad"
    )


def test_center_resize_takes_the_central_square():
  image = np.zeros((20, 60, 3), np.uint8)
  image[:, 20:40] = 255
  assert (transforms.center_resize(image, 8) == 255).all()
  assert (transforms.center_resize(np.swapaxes(image, 0, 1), 8) == 255).all()
  np.testing.assert_array_equal(
      transforms.center_resize(image, 20), image[:, 20:40]
  )


@pytest.mark.parametrize("mode", ["crop", "resize"])
def test_everything_follows_from_the_generator(mode):
  image = _noise(50, 60)

  def draw(seed):
    rng = np.random.default_rng(seed)
    pair = transforms.pair_frames(
        image, image[::-1], rng, size=(16, 16), mode=mode, scale=(0.4, 1.0)
    )
    return np.concatenate([pair, transforms.two_views(image, rng, size=16)])

  np.testing.assert_array_equal(draw(1), draw(1))
  assert (draw(1) != draw(2)).any()
