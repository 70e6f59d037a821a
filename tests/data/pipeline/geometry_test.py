"""Crops, flips and pairs, on images whose pixels say where they came from."""

import functools

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax.data.pipeline import geometry
from mcjepa_jax.errors import UserError


def _coordinates(height, width):
  """An image whose red is the column and green the row."""
  y, x = np.mgrid[:height, :width]
  return np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)


def _smooth(height, width, seed=0):
  """Waves of 16 pixels and more, so that a resampler's kernel hardly matters."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width]
  image = np.zeros((height, width, 3))
  for channel in range(3):
    for _ in range(4):
      angle, phase = rng.uniform(0, 2 * np.pi, 2)
      along = x * np.cos(angle) + y * np.sin(angle)
      image[..., channel] += np.sin(along * 2 * np.pi / 16 + phase)
  return (127 + 25 * image).astype(np.uint8)


def _photograph(height, width, seed=0):
  """An image with a photograph's 1 / f spectrum."""
  rng = np.random.default_rng(seed)
  frequency = np.hypot(
      np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
  )
  planes = np.fft.fft2(rng.normal(size=(3, height, width)))
  planes = np.fft.ifft2(planes / np.maximum(frequency, 1 / height)).real
  planes *= 45 / planes.std(axis=(1, 2), keepdims=True)
  return np.clip(planes + 120, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _pillow(image, box, size):
  top, left, height, width = box
  picture = Image.fromarray(np.ascontiguousarray(image))
  picture = picture.crop((left, top, left + width, top + height))
  return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))


def _noise(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_random_box_has_torchvisions_area_and_aspect():
  rng = np.random.default_rng(0)
  boxes = np.array([geometry.random_box(1000, 1000, rng) for _ in range(4000)])
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
  boxes = [geometry.random_box(4, 4, rng, **recipe) for _ in range(3000)]
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
  assert geometry.random_box(height, width, rng, scale=(4.0, 5.0)) == box


class _TorchDraws(np.random.Generator):
  """Draws what torchvision draws."""

  def __init__(self, seed):
    super().__init__(np.random.PCG64(0))
    self._torch = pytest.importorskip("torch")
    self._torch.manual_seed(seed)

  def uniform(self, low, high):
    return self._torch.empty(1).uniform_(low, high).item()

  def integers(self, end):
    return self._torch.randint(0, end, (1,)).item()


def test_boxes_are_torchvisions_for_the_same_draws():
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("torchvision.transforms").RandomResizedCrop
  for seed in range(100):
    # Every seventh never fits.
    height, width = (60, 400) if seed % 7 == 0 else (375, 500)
    scale = (0.9, 1.0) if seed % 7 == 0 else (0.08, 1.0)
    ours = geometry.random_box(
        height, width, _TorchDraws(seed), scale=scale, ratio=(3 / 4, 4 / 3)
    )
    torch.manual_seed(seed)
    expected = theirs.get_params(
        torch.zeros(3, height, width), scale=scale, ratio=(3 / 4, 4 / 3)
    )
    # torchvision takes the exponential in float32.
    np.testing.assert_allclose(ours, expected, atol=1)


@pytest.mark.parametrize(
    "size",
    [(224, 224), (100, 224), (300, 60), (40, 40), (500, 400), (320, 500)],
)
def test_resampling_is_pillows_antialiased_bicubic_within_two_grey_levels(size):
  image = _photograph(300, 400)
  box = (11, 23, 270, 331)
  ours = geometry.resample(image, box, size)
  expected = _pillow(image, box, size)
  assert np.abs(ours.astype(int) - expected).mean() < 2
  mirrored = geometry.resample(image, box, size, flip=True)
  np.testing.assert_array_equal(mirrored, ours[:, ::-1])


def test_resampling_does_not_alias_nor_shift():
  # A checkerboard is gray at half its size and below; OpenCV's bicubic alone
  # leaves stripes of it.
  board = np.indices((240, 240)).sum(axis=0) % 2 * 255
  board = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
  for side in (100, 70, 30):
    view = geometry.resample(board, (0, 0, 240, 240), (side, side))
    assert np.ptp(view[3:-3, 3:-3]) < 25 and abs(view.mean() - 127.5) < 1
  ramp = _coordinates(240, 240)
  view = geometry.resample(ramp, (0, 0, 240, 240), (80, 80)).astype(int)
  centres = 3 * np.arange(80) + 1
  np.testing.assert_allclose(view[40, 3:-3, 0], centres[3:-3], atol=1)
  np.testing.assert_allclose(view[3:-3, 40, 1], centres[3:-3], atol=1)


def test_a_hostile_reduction_takes_little_memory():
  image = np.full((2, 2**20, 3), 50, np.uint8)
  view = geometry.resample(image, (0, 0, 2, 2**20), (8, 8))
  assert (view == 50).all()


def test_no_pixel_beside_the_box_is_read():
  image = np.zeros((50, 60, 3), np.uint8)
  image[10:30, 20:50] = 200
  for size in ((8, 8), (40, 40), (10, 90)):
    view = geometry.resample(image, (10, 20, 20, 30), size)
    assert (view == 200).all()


def test_views_are_the_boxes_and_flips_of_their_draws():
  image = _photograph(90, 120)
  for seed in range(20):
    views = geometry.two_views(image, np.random.default_rng(seed), size=32)
    rng = np.random.default_rng(seed)
    for view in views:
      expected = _pillow(image, geometry.random_box(90, 120, rng), (32, 32))
      if rng.random() < 0.5:
        expected = expected[:, ::-1]
      assert np.abs(view.astype(int) - expected).mean() < 3


def test_views_are_two_crops_half_of_them_mirrored():
  image = _coordinates(64, 64)
  mirrored, rng = [], np.random.default_rng(0)
  for _ in range(600):
    views = np.stack(geometry.two_views(image, rng, size=8, scale=(0.3, 1.0)))
    assert views.shape == (2, 8, 8, 3) and views.dtype == np.uint8
    mirrored.append(views[:, 0, 0, 0] > views[:, 0, -1, 0])
    assert (views[:, 0, 0, 1] < views[:, -1, 0, 1]).all()
    assert (views[0] != views[1]).any()
  mirrored = np.array(mirrored)
  np.testing.assert_allclose(mirrored.mean(axis=0), 0.5, atol=0.1)
  assert abs(np.corrcoef(mirrored.T)[0, 1]) < 0.2
  views = np.stack(geometry.two_views(image, rng, size=8, flip=False))
  assert (views[:, 0, 0, 0] < views[:, 0, -1, 0]).all()


def test_pair_keeps_one_geometry_and_all_four_orientations():
  frame_1 = _coordinates(40, 60)
  frame_2 = frame_1 + np.array([0, 0, 9], np.uint8)
  rng, seen, corners = np.random.default_rng(0), [], []
  for _ in range(400):
    pair = np.stack(geometry.pair_frames(frame_1, frame_2, rng, size=(24, 32)))
    assert pair.shape == (2, 24, 32, 3)
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
  quantiles = np.quantile(corners, [0.25, 0.5, 0.75], axis=0)
  np.testing.assert_allclose(quantiles, [[4, 7], [8, 14], [12, 21]], atol=2.5)


def test_flip_and_swap_can_be_switched_off():
  frame_1, frame_2 = _noise(24, 32, 1), _noise(24, 32, 2)
  for seed in range(8):
    pair = geometry.pair_frames(
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
      geometry.pair_box(20, 60, rng, size=(32, 48), scale=(0.5, 1.0))
      for _ in range(100)
  ]
  assert {(box[0], *box[2:]) for box in boxes} == {(0, 20, 30)}
  assert {box[1] for box in boxes} >= {0, 30}
  pair = geometry.pair_frames(
      _noise(20, 60), _noise(20, 60), rng, size=(32, 48)
  )
  assert [frame.shape for frame in pair] == 2 * [(32, 48, 3)]


def test_scale_is_drawn_log_uniformly():
  rng = np.random.default_rng(0)
  boxes = np.array(
      [
          geometry.pair_box(
              1000, 2000, rng, size=(100, 200), scale=(1 / 8, 1 / 2)
          )
          for _ in range(2000)
      ]
  )
  np.testing.assert_allclose(boxes[:, 3], 2 * boxes[:, 2], atol=1)
  quantiles = np.quantile(np.log2(boxes[:, 2] / 100), [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(quantiles, [1, 1.5, 2, 2.5, 3], atol=0.07)


def test_scaled_pair_is_resampled_once_from_its_box():
  frame = _photograph(60, 80)
  pair = geometry.pair_frames(
      frame,
      frame,
      np.random.default_rng(0),
      size=(30, 40),
      scale=(0.5, 0.5),
      flip=False,
  )
  expected = geometry.resample(frame, (0, 0, 60, 80), (30, 40))
  np.testing.assert_array_equal(pair, [expected, expected])


def test_resize_mode_keeps_the_whole_frame():
  frame = _photograph(30, 100)
  pair = geometry.pair_frames(
      frame,
      frame,
      np.random.default_rng(0),
      size=(16, 48),
      mode="resize",
      flip=False,
  )
  expected = geometry.resample(frame, (0, 0, 30, 100), (16, 48))
  np.testing.assert_array_equal(pair, [expected, expected])


_TURN = dict(
    rotation=(-20.0, 20.0),
    relative_rotation=2.0,
    relative_scale=1.05,
    relative_shift=4.0,
)


def _corners(crop):
  """The corners of both cuts' outermost pixels, in their frames."""
  rows, columns = crop.size
  corners = np.array(
      [[x, y, 1] for x in (-0.5, columns - 0.5) for y in (-0.5, rows - 0.5)]
  )
  return np.concatenate([corners @ m.T for m in crop.maps])


@pytest.mark.parametrize("mode", ["crop", "resize"])
@pytest.mark.parametrize("size", [(24, 40), (90, 70)])
def test_a_turned_cut_lies_inside_and_anywhere(mode, size):
  rng, low, high = np.random.default_rng(0), [], []
  for _ in range(400):
    crop = geometry.pair_geometry(
        60, 100, rng, size=size, mode=mode, scale=(0.5, 1.0), **_TURN
    )
    corners = _corners(crop)
    low.append(corners.min(axis=0))
    high.append(corners.max(axis=0))
  assert (np.array(low) >= -0.5 - 1e-6).all()
  assert (np.array(high) <= np.array([99.5, 59.5]) + 1e-6).all()
  # It touches all four sides of the frame at some time.
  np.testing.assert_allclose(np.min(low, axis=0), -0.5, atol=1)
  np.testing.assert_allclose(np.max(high, axis=0), [99.5, 59.5], atol=1)


def test_turns_are_drawn_uniformly_from_their_ranges():
  rng, angles, zooms, shifts, turns = np.random.default_rng(0), [], [], [], []
  draw = functools.partial(
      geometry.pair_geometry, 400, 400, rng, size=(40, 60), flip=False
  )
  for _ in range(2000):
    first, second = np.concatenate(
        [draw(swap=False, **_TURN).maps, [[[0, 0, 1]]] * 2], axis=1
    )
    angles.append(np.degrees(np.arctan2(first[1, 0], first[0, 0])))
    moved = np.linalg.inv(second) @ first
    zooms.append(np.log(np.linalg.det(moved)) / 2)
    turns.append(np.degrees(np.arctan2(moved[1, 0], moved[0, 0])))
    centre = np.array([29.5, 19.5, 1])
    shifts.append((moved @ centre - centre)[:2])
  for values, bound in (
      (angles, 20),
      (turns, 2),
      (zooms, np.log(1.05)),
      (shifts, 4),
  ):
    quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(
        quantiles, bound * np.linspace(-1, 1, 5), atol=0.07 * bound
    )


def test_a_turn_is_torchvisions():
  functional = pytest.importorskip("torchvision.transforms.functional")
  for angle in (-30.0, 7.0, 90.0):
    crop = geometry.pair_geometry(
        300,
        300,
        np.random.default_rng(0),
        size=(40, 60),
        scale=(0.5, 0.5),
        flip=False,
        rotation=(angle, angle),
    )
    # The cut turns clockwise in the frame, so what it shows anticlockwise.
    expected = functional._get_inverse_affine_matrix(
        [0.0, 0.0], -angle, [0.0, 0.0], 0.5, [0.0, 0.0]
    )
    expected = np.reshape(expected, (2, 3))
    np.testing.assert_allclose(crop.maps[0][:, :2], expected[:, :2], atol=1e-6)


def test_no_turn_leaves_the_draws_of_a_plain_pair():
  frame_1, frame_2 = _noise(60, 80, 1), _noise(60, 80, 2)
  for seed in range(10):
    rng = np.random.default_rng(seed)
    pair = geometry.pair_frames(frame_1, frame_2, rng, size=(24, 32))
    ours = rng.random()
    rng = np.random.default_rng(seed)
    top, left, *_ = geometry.pair_box(60, 80, rng, size=(24, 32))
    mirrored, swapped = rng.random(2) < 0.5
    frames = (frame_2, frame_1) if swapped else (frame_1, frame_2)
    for frame, cut in zip(frames, pair, strict=True):
      expected = frame[top : top + 24, left : left + 32]
      np.testing.assert_array_equal(
          cut, expected[:, ::-1] if mirrored else expected
      )
    assert ours == rng.random()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_turned_cut_shows_what_its_map_says(scale):
  # Red is the column and green the row, so a cut tells where it came from.
  frame = _coordinates(200, 250)
  rng = np.random.default_rng(0)
  for _ in range(10):
    crop = geometry.pair_geometry(
        200, 250, rng, size=(50, 60), scale=(scale, scale), **_TURN
    )
    y, x = np.mgrid[3:47, 3:57]
    pixels = np.stack([x, y, np.ones_like(x)], axis=-1)
    for cut, matrix in zip(
        geometry.cut_pair(crop, frame, frame), crop.maps, strict=True
    ):
      np.testing.assert_allclose(
          cut[3:47, 3:57, :2], pixels @ matrix.T, atol=1.1
      )


def _analytic(height, width, kind):
  """An affine or a quadratic flow field as a function of points (x, y)."""

  def flow(points):
    x = (points[..., 0] - width / 2) / width
    y = (points[..., 1] - height / 2) / height
    u, v = 3 + 8 * x - 5 * y, -2 + 4 * x + 6 * y
    if kind == "quadratic":
      u, v = u + 9 * x * x - 4 * x * y, v + 7 * y * y
    return np.stack([u, v], axis=-1)

  y, x = np.mgrid[:height, :width]
  return flow, flow(np.stack([x, y], axis=-1)).astype(np.float32)


@pytest.mark.parametrize("kind", ["affine", "quadratic"])
@pytest.mark.parametrize("turn", [{}, _TURN])
@pytest.mark.parametrize("mode", ["crop", "resize"])
def test_flow_of_a_cut_leads_to_the_same_point_of_frame_2(kind, turn, mode):
  function, flow = _analytic(150, 200, kind)
  valid = np.ones((150, 200, 1), np.float32)
  rng = np.random.default_rng(0)
  for _ in range(8):
    crop = geometry.pair_geometry(
        150, 200, rng, size=(64, 96), mode=mode, scale=(0.7, 1.4), **turn
    )
    cut, known = geometry.cut_flow(crop, flow, valid)
    assert cut.shape == (64, 96, 2) and (known == 1).all()
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([x, y], axis=-1).astype(np.float64)
    first, second = (lambda p, m=m: p @ m[:, :2].T + m[:, 2] for m in crop.maps)
    source = first(pixels)
    reached = second(pixels + cut)
    # In pixels of the cut: the frame's may be larger.
    scale = np.linalg.norm(crop.maps[0][:, :2], 2)
    error = np.abs(reached - (source + function(source))) / scale
    assert error[2:-2, 2:-2].max() < 1e-3


def test_flow_of_a_cut_warps_its_second_frame_onto_its_first():
  # What the frames show agrees with the flow: frame_2 is frame_1 moved by 3, -2.
  cv2 = pytest.importorskip("cv2")
  whole = _smooth(160, 200)
  frame_1, frame_2 = whole[10:150, 10:190], whole[12:152, 7:187]
  flow = np.full((140, 180, 2), (3, -2), np.float32)
  valid = np.ones((140, 180, 1), np.float32)
  rng = np.random.default_rng(1)
  for _ in range(8):
    crop = geometry.pair_geometry(
        140, 180, rng, size=(60, 70), swap=False, **_TURN
    )
    ours, other = geometry.cut_pair(crop, frame_1, frame_2)
    cut, _ = geometry.cut_flow(crop, flow, valid)
    y, x = np.mgrid[:60, :70].astype(np.float32)
    warped = cv2.remap(other, x + cut[..., 0], y + cut[..., 1], cv2.INTER_CUBIC)
    error = np.abs(warped.astype(int) - ours)[12:-12, 12:-12]
    unmoved = np.abs(other.astype(int) - ours)[12:-12, 12:-12]
    assert error.mean() < 3 and unmoved.mean() > 3 * error.mean()


def test_a_swapped_cut_is_that_of_the_swapped_frames():
  frame_1, frame_2 = _smooth(60, 80, 1), _smooth(60, 80, 2)
  rng, swaps = np.random.default_rng(0), 0
  for turn in 20 * [{}] + 20 * [_TURN]:
    crop = geometry.pair_geometry(60, 80, rng, size=(30, 40), **turn)
    swaps += crop.swap
    cuts = geometry.cut_pair(crop, frame_1, frame_2)
    frames = (frame_2, frame_1) if crop.swap else (frame_1, frame_2)
    plain = geometry.cut_pair(crop._replace(swap=False), *frames)
    np.testing.assert_array_equal(cuts, plain)
  assert 8 <= swaps <= 32


def test_flow_is_known_where_all_it_is_read_from_is():
  _, flow = _analytic(60, 80, "affine")
  valid = np.ones((60, 80, 1), np.float32)
  valid[20:30, 30:50] = 0
  flow = flow * valid
  rng = np.random.default_rng(0)
  function, _ = _analytic(60, 80, "affine")
  for turn in ({}, _TURN):
    unknown = 0
    for _ in range(8):
      crop = geometry.pair_geometry(60, 80, rng, size=(40, 50), **turn)
      cut, known = geometry.cut_flow(crop, flow, valid)
      assert (cut[known[..., 0] == 0] == 0).all()
      unknown += (known == 0).sum()
      y, x = np.mgrid[:40, :50]
      pixels = np.stack([x, y], axis=-1).astype(np.float64)
      first, second = crop.maps
      source = pixels @ first[:, :2].T + first[:, 2]
      there = (pixels + cut) @ second[:, :2].T + second[:, 2]
      error = np.abs(there - source - function(source)) * known
      assert error[2:-2, 2:-2].max() < 1e-3
    assert unknown > 0


def test_faults_of_a_pair_are_the_users():
  rng = np.random.default_rng(0)
  with pytest.raises(UserError, match="10x20 and 10x21"):
    geometry.pair_frames(_noise(10, 20), _noise(10, 21), rng, size=(8, 8))
  with pytest.raises(UserError, match='"crop" or "resize", got "pad"'):
    geometry.pair_frames(
        _noise(10, 20), _noise(10, 20), rng, size=(8, 8), mode="pad"
    )


def test_center_resize_takes_the_central_square():
  image = np.zeros((20, 60, 3), np.uint8)
  image[:, 20:40] = 255
  assert (geometry.center_resize(image, 8) == 255).all()
  assert (geometry.center_resize(np.swapaxes(image, 0, 1), 8) == 255).all()
  np.testing.assert_array_equal(
      geometry.center_resize(image, 20), image[:, 20:40]
  )


@pytest.mark.parametrize("mode", ["crop", "resize"])
def test_everything_follows_from_the_generator(mode):
  image = _noise(50, 60)

  def draw(seed):
    rng = np.random.default_rng(seed)
    pair = geometry.pair_frames(
        image, image[::-1], rng, size=(16, 16), mode=mode, scale=(0.4, 1.0)
    )
    return np.stack(pair + geometry.two_views(image, rng, size=16))

  np.testing.assert_array_equal(draw(1), draw(1))
  assert (draw(1) != draw(2)).any()
