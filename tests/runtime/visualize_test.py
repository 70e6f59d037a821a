"""Pictures: Middlebury's colours, panels, components, plots."""

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax.runtime import visualize


def _color(u, v, **scale):
  return tuple(int(c) for c in _flow(u, v, **scale)[0, 0])


def _flow(u, v, **scale):
  return visualize.flow_to_color(np.array([[[u, v]]], np.float32), **scale)


def test_wheel_has_middleburys_corners_and_steps():
  wheel = visualize.color_wheel()
  assert wheel.shape == (55, 3)
  corners = {
      0: (255, 0, 0),
      15: (255, 255, 0),
      21: (0, 255, 0),
      25: (0, 255, 255),
      36: (0, 0, 255),
      49: (255, 0, 255),
  }
  for i, corner in corners.items():
    assert tuple(wheel[i]) == corner
  assert tuple(wheel[1]) == (255, 17, 0)
  # 255 - floor(255 / 6), and not floor(255 - 255 / 6).
  assert tuple(wheel[16]) == (213, 255, 0)
  assert tuple(wheel[54]) == (255, 0, 43)


@pytest.mark.parametrize(
    ("u", "v", "color"),
    [
        # Positions 0, 13.5, 27 and 40.5 of the wheel.
        (3, 0, (255, 0, 0)),
        (0, 3, (255, 229, 0)),
        (-3, 0, (0, 209, 255)),
        (0, -3, (88, 0, 255)),
        (0, 0, (255, 255, 255)),
    ],
)
def test_directions_have_their_colours(u, v, color):
  assert _color(u, v, max_flow=3.0) == color


def test_length_fades_to_white_and_excess_darkens():
  assert _color(1, 0, max_flow=2.0) == (255, 127, 127)
  assert _color(5, 0, max_flow=2.0) == (191, 0, 0)
  # Without a scale the longest vector is full colour.
  flow = np.array([[[2, 0], [4, 0]]], np.float32)
  assert visualize.flow_to_color(flow).tolist() == [
      [[255, 127, 127], [255, 0, 0]]
  ]


def test_unknown_flow_is_black_and_does_not_set_the_scale():
  flow = np.array([[[1e10, 0], [np.nan, 0], [0, -np.inf], [2, 0]]], np.float32)
  colors = visualize.flow_to_color(flow)
  assert (colors[0, :3] == 0).all()
  assert tuple(colors[0, 3]) == (255, 0, 0)


def test_stack_of_flows_has_one_scale():
  flow = np.zeros((2, 1, 1, 2), np.float32)
  flow[0, ..., 0], flow[1, ..., 0] = 1, 2
  colors = visualize.flow_to_color(flow)
  assert colors[:, 0, 0].tolist() == [[255, 127, 127], [255, 0, 0]]


def _tiles(panel, count, width):
  return [panel[:, i * (width + 2) :][:, :width] for i in range(count)]


def test_panel_warps_frame_2_onto_frame_1():
  rng = np.random.default_rng(0)
  frame_2 = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
  # Content moves 3 right and 2 down, so frame 1 is frame 2 moved back.
  frame_1 = np.roll(frame_2, (-2, -3), axis=(0, 1))
  flow = np.tile(np.float32([3, 2]), (20, 30, 1))
  visible = np.zeros((20, 30, 1), bool)
  visible[5:] = True
  panel = visualize.flow_panel(
      frame_1, frame_2 / 255, flow, truth=2 * flow, visible=visible
  )
  tiles = [t[-20:] for t in _tiles(panel, 6, 30)]
  np.testing.assert_array_equal(tiles[0], frame_1)
  np.testing.assert_array_equal(tiles[1], frame_2)
  np.testing.assert_array_equal(tiles[2][:-2, :-3], frame_1[:-2, :-3])
  assert (tiles[2][-2:] == 0).all() and (tiles[2][:, -3:] == 0).all()
  # One scale for both flows, the truth's.
  length = float(np.linalg.norm([6, 4]))
  for tile, drawn in ((tiles[3], flow), (tiles[4], 2 * flow)):
    expected = visualize.flow_to_color(drawn, max_flow=length)
    np.testing.assert_array_equal(tile, expected)
  assert (tiles[5][:5] == 0).all() and (tiles[5][5:] == 255).all()


def test_panel_without_truth_and_mask_has_four_tiles():
  frame = np.zeros((8, 8, 3), np.uint8)
  flow = np.full((8, 8, 2), 0.5, np.float32)
  panel = visualize.flow_panel(frame, frame, flow)
  assert panel.shape[1] == 4 * 8 + 3 * 2
  # Halfway between two pixels of a constant image lies the same value.
  warped = visualize.flow_panel(frame + 90, frame + 90, flow)[-8:, 20:28]
  assert (warped[:-1, :-1] == 90).all() and (warped[-1] == 0).all()


def test_components_are_shared_and_invariant_to_rotation():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(2, 6, 7, 5)) * [9, 5, 2, 0.1, 0.1]
  colors = visualize.feature_pca(scores)
  assert colors.shape == (2, 6, 7, 3) and colors.dtype == np.uint8
  for i in range(3):
    correlation = np.corrcoef(colors[..., i].ravel(), scores[..., i].ravel())
    assert abs(correlation[0, 1]) > 0.97
  # A feature and its colour are the same in both images.
  scores[1] = scores[0]
  colors = visualize.feature_pca(scores)
  np.testing.assert_array_equal(colors[0], colors[1])
  rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
  rotated = visualize.feature_pca(3 * scores @ rotation + 1).astype(int)
  for i in range(3):
    same = np.abs(rotated[..., i] - colors[..., i]).max()
    mirrored = np.abs(255 - rotated[..., i] - colors[..., i]).max()
    assert min(same, mirrored) <= 1


def test_components_of_collapsed_or_thin_features_are_gray():
  assert (visualize.feature_pca(np.full((1, 4, 4, 8), 3.0)) == 128).all()
  thin = visualize.feature_pca(np.arange(16.0).reshape(1, 4, 4, 1))
  assert thin[0, 0, 0, 0] == 0 and thin[0, 3, 3, 0] == 255
  assert (thin[..., 1:] == 128).all()


def test_grid_fills_rows_first():
  images = np.arange(3, dtype=np.uint8)[:, None, None, None] + np.zeros(
      (3, 4, 5, 3), np.uint8
  )
  sheet = visualize.grid(images, columns=2)
  assert sheet.shape == (10, 12, 3)
  assert (sheet[:4, :5] == 0).all() and (sheet[:4, 7:] == 1).all()
  assert (sheet[6:, :5] == 2).all() and (sheet[6:, 5:] == 255).all()


def test_png_holds_the_same_pixels(tmp_path):
  image = np.random.default_rng(0).uniform(size=(5, 6, 3))
  path = tmp_path / "new" / "picture.png"
  visualize.save_png(path, image)
  np.testing.assert_array_equal(Image.open(path), np.round(255 * image))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.3, 9.7, [2, 4, 6, 8]),
        (-3e5, 2e5, [-3e5, -2e5, -1e5, 0, 1e5, 2e5]),
    ],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
  np.testing.assert_allclose(visualize.ticks(low, high), expected, atol=1e-9)


def _where(image, color):
  y, x = np.nonzero(np.abs(image.astype(int) - color).max(axis=-1) < 40)
  return x, y


def test_rising_curve_rises_across_the_whole_plot():
  steps = np.arange(0, 1000, 10)
  image = visualize.curves({"loss": (steps, steps**2)}, (200, 300), title="t")
  assert image.shape == (200, 300, 3) and image.dtype == np.uint8
  x, y = _where(image, visualize._LINE_COLORS[0])
  x, y = x[y > 45], y[y > 45]
  assert x.max() - x.min() > 220 and y.max() - y.min() > 90
  middle = y[np.abs(x - (x.min() + x.max()) / 2) <= 2].mean()
  # A quarter of the way up at half the steps: linear axes, y upwards.
  rise = (y.max() - middle) / (y.max() - y.min())
  assert rise == pytest.approx(0.25, abs=0.05)


def test_values_that_are_not_finite_break_the_line():
  steps = np.arange(100)
  values = np.where((steps > 30) & (steps < 60), np.nan, 1.0)
  values[99] = np.inf
  image = visualize.curves({"loss": (steps, values)}, (200, 300))
  x, y = _where(image, visualize._LINE_COLORS[0])
  x = np.unique(x[y > 45])
  assert 60 < np.diff(x).max() < 100


@pytest.mark.parametrize(
    "series",
    [{}, {"none": ([], [])}, {"one": ([3], [2.0])}, {"nan": ([1], [np.nan])}],
)
def test_little_or_no_data_still_gives_a_plot(series):
  series = {k: tuple(map(np.array, v)) for k, v in series.items()}
  assert visualize.curves(series, (120, 160)).shape == (120, 160, 3)
