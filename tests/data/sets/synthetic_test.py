"""Tests of the procedural set: what its flow, masks and classes promise."""

import dataclasses
import pickle

import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.data.sets import synthetic
from tests.helpers import scene_checks


@pytest.fixture(scope="module")
def pairs() -> dict[str, np.ndarray]:
  """256 held-out pairs, stacked by key."""
  records = list(synthetic.Pairs(seed=101, num_examples=256))
  return {key: np.stack([r[key] for r in records]) for key in records[0]}


def _plain(gray: float, **fields) -> synthetic.Layer:
  """A layer of one gray without texture."""
  return synthetic.Layer(
      color=np.full(3, gray),
      waves=np.zeros((1, 2)),
      phases=np.zeros(1),
      amplitudes=np.zeros((1, 3)),
      **fields,
  )


@pytest.mark.parametrize("source", [synthetic.Pairs, synthetic.Images])
def test_a_record_depends_on_seed_and_index_alone(source):
  dataset = source(seed=3, num_examples=30)
  forward = [scene_checks.flat(dataset[i]) for i in range(12)]
  copy = pickle.loads(pickle.dumps(source(seed=3, num_examples=12)))
  assert [scene_checks.flat(copy[i]) for i in reversed(range(12))] == forward[
      ::-1
  ]
  assert len(set(forward)) == 12


def test_scenes_stay_those_that_results_were_measured_on():
  record = synthetic.Pairs(size=(48, 80), seed=7, num_examples=3)[2]
  means = [
      record[key].astype(np.float64).mean()
      for key in ("frame_1", "frame_2", "flow_12", "visible_1", "segments_1")
  ]
  np.testing.assert_allclose(
      means, (108.7101, 110.6247, 0.665955, 0.873958, 0.238021), rtol=1e-4
  )


def test_seeds_share_no_scene():
  seen = {
      synthetic.Images(seed=seed, num_examples=20)[i]["image"].tobytes()
      for seed in range(4)
      for i in range(20)
  }
  assert len(seen) == 80
  names = {
      synthetic.Images(seed=seed, num_examples=20).record_id(i)
      for seed in range(4)
      for i in range(20)
  }
  assert len(names) == 80


def test_a_set_ends_at_its_length():
  dataset = synthetic.Images(seed=0, num_examples=3)
  assert len(dataset) == 3 and len(list(dataset)) == 3
  with pytest.raises(IndexError):
    dataset[3]
  with pytest.raises(IndexError):
    dataset.record_id(3)


def test_faults_of_the_arguments_are_all_listed():
  with pytest.raises(errors.UserError) as error:
    synthetic.Pairs(size=(8, 64), seed=-1, num_examples=0)
  assert len(error.value.messages) == 3
  assert "height: expected at least 16, got 8" in str(error.value)


def test_records_have_the_promised_types():
  record = synthetic.Pairs(size=(48, 80), seed=0, num_examples=1)[0]
  for key in ("frame_1", "frame_2"):
    assert record[key].shape == (48, 80, 3) and record[key].dtype == np.uint8
  for key in ("flow_12", "flow_21", "flow"):
    assert record[key].shape == (48, 80, 2) and record[key].dtype == np.float32
  for key in ("visible_1", "visible_2", "valid"):
    assert record[key].shape == (48, 80, 1) and record[key].dtype == np.float32
    assert set(np.unique(record[key])) <= {0, 1}
  assert record["segments_1"].shape == (48, 80)
  assert np.issubdtype(record["segments_1"].dtype, np.integer)


def test_flow_is_large_enough_to_be_worth_estimating(pairs):
  length = np.linalg.norm(pairs["flow"], axis=-1)
  assert length.mean() >= 2.5
  assert np.percentile(length, 95) >= 6
  assert length.max() < 14
  assert pairs["valid"].all()
  np.testing.assert_array_equal(pairs["flow"], pairs["flow_12"])


def test_no_constant_flow_beats_zero(pairs):
  flow = pairs["flow"].reshape(-1, 2)[::7].astype(np.float64)
  zero = np.linalg.norm(flow, axis=-1).mean()
  training = synthetic.Pairs(seed=102, num_examples=128)
  mean = np.mean([r["flow"].mean((0, 1)) for r in training], axis=0)
  for constant in (scene_checks.best_constant(flow), mean):
    assert np.linalg.norm(flow - constant, axis=-1).mean() > 0.95 * zero


@pytest.mark.parametrize("frame", ["1", "2"])
def test_a_twentieth_of_the_pixels_is_covered_in_the_other_frame(pairs, frame):
  flow = pairs["flow_12" if frame == "1" else "flow_21"]
  target = scene_checks.grid(64, 64) + flow
  inside = ((target >= 0) & (target <= 63)).all(-1)
  covered = inside & (pairs["visible_" + frame][..., 0] == 0)
  assert covered.mean() >= 0.05
  # What left the frame is not visible either.
  assert not pairs["visible_" + frame][..., 0][
      ((target < -0.01) | (target > 63.01)).any(-1)
  ].any()


@pytest.mark.parametrize("direction", ["12", "21"])
def test_flow_carries_one_frame_onto_the_other(pairs, direction):
  a, b = direction
  here = pairs["frame_" + a].astype(np.float64)
  there = pairs["frame_" + b].astype(np.float64)
  visible, grid = pairs["visible_" + a], scene_checks.grid(64, 64)

  def difference(flow):
    n = len(flow)
    warped = scene_checks.sample(there[:n], grid + flow, scene_checks.cubic)
    return scene_checks.masked_mean(np.abs(warped - here[:n]), visible[:n])

  flow = pairs["flow_" + direction]
  assert difference(flow) < 2
  flow = flow[:32]
  # Any other reading of the two components or of the frames is far off.
  wrong = (flow[..., ::-1], -flow, flow * (1, -1), flow * (-1, 1), 0 * flow)
  assert min(difference(other) for other in wrong) > 10


@pytest.mark.parametrize("direction", ["12", "21"])
def test_flows_compose_to_nothing_where_visible(pairs, direction):
  forward, back = pairs["flow_" + direction], pairs["flow_" + direction[::-1]]
  back = scene_checks.sample(
      back, scene_checks.grid(64, 64) + forward, scene_checks.linear
  )
  error = np.linalg.norm(forward + back, axis=-1, keepdims=True)
  assert scene_checks.masked_mean(error, pairs["visible_" + direction[0]]) < 0.1
  hidden = 1 - pairs["visible_" + direction[0]]
  assert scene_checks.masked_mean(error, hidden) > 1


def test_a_moving_disc_covers_and_uncovers_what_it_should():
  # Half of the motion lies on each side of the reference time: the disc's
  # centre is at x = -4 and x = 4 of the image's.
  layers = [
      _plain(0.25),
      _plain(0.75, radius=10.0, translation=(8.0, 0.0), segment=1),
  ]
  scene = synthetic.render(layers, (64, 64))
  x, y = np.moveaxis(scene_checks.grid(64, 64) - 31.5, -1, 0)
  disc_1 = np.hypot(x + 4, y) < 10
  disc_2 = np.hypot(x - 4, y) < 10
  np.testing.assert_array_equal(scene["segments"], [disc_1, disc_2])
  flow_12, flow_21 = scene["flows"]
  np.testing.assert_allclose(
      flow_12[disc_1], [[8, 0]] * disc_1.sum(), atol=1e-5
  )
  np.testing.assert_allclose(
      flow_21[disc_2], [[-8, 0]] * disc_2.sum(), atol=1e-5
  )
  assert not flow_12[~disc_1].any() and not flow_21[~disc_2].any()
  visible_1, visible_2 = scene["visible"][..., 0]
  np.testing.assert_array_equal(visible_1 == 0, disc_2 & ~disc_1)
  np.testing.assert_array_equal(visible_2 == 0, disc_1 & ~disc_2)
  deep = np.hypot(x + 4, y) < 8
  assert (scene["images"][0][deep] == 191).all()


def test_a_front_object_hides_the_one_behind():
  layers = [
      _plain(0.2),
      _plain(0.5, radius=6.0, translation=(14.0, 0.0), segment=2),
      _plain(0.8, radius=9.0, center=(7.0, 0.0), segment=1),
  ]
  scene = synthetic.render(layers, (64, 64))
  behind = scene["segments"][0] == 2
  assert behind.any()
  # It ends wholly under the resting one, which is seen in both frames.
  assert not scene["visible"][0][behind].any()
  assert scene["visible"][0][scene["segments"][0] == 1].all()
  assert not (scene["segments"][1] == 2).any()


def test_points_that_leave_the_frame_are_not_visible():
  scene = synthetic.render([_plain(0.5, translation=(5.0, -2.0))], (32, 64))
  # The shorter side is 32: the scene's units are half a pixel.
  np.testing.assert_allclose(
      scene["flows"][0], np.tile((2.5, -1.0), (32, 64, 1)), atol=1e-5
  )
  x, y = np.moveaxis(scene_checks.grid(32, 64), -1, 0)
  expected = (x + 2.5 <= 63) & (y >= 1)
  np.testing.assert_array_equal(scene["visible"][0][..., 0], expected)
  expected = (x >= 2.5) & (y + 1 <= 31)
  np.testing.assert_array_equal(scene["visible"][1][..., 0], expected)


def test_rotation_and_zoom_move_points_as_written():
  turn, zoom = 0.1, 0.05
  layer = _plain(0.5, rotation=turn, log_zoom=zoom, translation=(1.0, 2.0))
  flow_12, flow_21 = synthetic.render([layer], (64, 64))["flows"]
  p = scene_checks.grid(64, 64) - 31.5
  matrix = np.exp(zoom) * np.array(
      [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
  )
  start, end = np.array((-0.5, -1.0)), np.array((0.5, 1.0))
  forward = (p - start) @ matrix.T + end - p
  np.testing.assert_allclose(flow_12, forward, atol=1e-4)
  backward = (p - end) @ np.linalg.inv(matrix).T + start - p
  np.testing.assert_allclose(flow_21, backward, atol=1e-4)
  # Right of the centre a positive rotation moves down.
  assert flow_12[32, 63, 1] > 2 + 2.5


def test_a_larger_image_shows_the_same_scene():
  small = synthetic.Pairs(size=(64, 64), seed=5, num_examples=1)[0]
  large = synthetic.Pairs(size=(128, 128), seed=5, num_examples=1)[0]
  area = large["frame_1"].reshape(64, 2, 64, 2, 3).mean((1, 3))
  assert np.abs(area - small["frame_1"]).mean() < 3
  ratio = np.abs(large["flow"]).mean() / np.abs(small["flow"]).mean()
  np.testing.assert_allclose(ratio, 2, rtol=0.02)


def test_images_are_first_frames_with_the_object_where_they_say():
  images = synthetic.Images(seed=8, num_examples=40)
  pairs = synthetic.Pairs(seed=8, num_examples=40)
  errors_x, errors_y, ratios = [], [], []
  for image, pair in zip(images, pairs, strict=True):
    np.testing.assert_array_equal(image["image"], pair["frame_1"])
    assert image["label"] == pair["label"]
    y, x = np.nonzero(pair["segments_1"] == 1)
    errors_x.append(x.mean() - image["center"][0])
    errors_y.append(y.mean() - image["center"][1])
    ratios.append(len(x) / (np.pi / 4 * image["extent"] ** 2))
  # Other objects and the border hide a little of it.
  assert np.abs(errors_x).mean() < 2 and np.abs(errors_y).mean() < 2
  assert 0.85 < np.mean(ratios) < 1.05


def test_classes_are_equally_frequent_in_a_shuffled_order():
  assert synthetic.NUM_CLASSES == len(synthetic.CLASS_NAMES) >= 10
  dataset = synthetic.Images(size=(16, 16), seed=9, num_examples=100)
  labels = np.array([record["label"] for record in dataset])
  blocks = labels.reshape(-1, synthetic.NUM_CLASSES)
  np.testing.assert_array_equal(
      np.sort(blocks), np.tile(range(synthetic.NUM_CLASSES), (10, 1))
  )
  assert len({tuple(block) for block in blocks}) > 5


def test_the_label_changes_the_pattern_of_the_object_and_nothing_else():
  scenes = [
      synthetic.render(
          synthetic.scene_layers(np.random.default_rng(4), label, (64, 64)),
          (64, 64),
      )
      for label in range(synthetic.NUM_CLASSES)
  ]
  first = scenes[0]
  # Two pixels beyond the object no trace of its soft edge is left.
  main = first["segments"] == 1
  near = np.zeros_like(main)
  for dy in range(-2, 3):
    for dx in range(-2, 3):
      near |= np.roll(main, (dy, dx), (1, 2))
  for other in scenes[1:]:
    np.testing.assert_array_equal(other["flows"], first["flows"])
    np.testing.assert_array_equal(other["segments"], first["segments"])
    np.testing.assert_allclose(
        other["images"][~near].astype(int),
        first["images"][~near].astype(int),
        atol=1,
    )
    change = np.abs(other["images"][main] - first["images"][main].astype(int))
    assert change.mean() > 10


def _patterns(name: str, num: int = 64) -> np.ndarray:
  """Values [num 64 64] of a class's pattern in layers that rest."""
  grid = np.moveaxis(scene_checks.grid(64, 64) - 31.5, -1, 0).astype(np.float32)
  rng = np.random.default_rng(0)
  layers = [
      dataclasses.replace(
          _plain(0.0),
          contrast=np.ones(3),
          pattern=synthetic.draw_pattern(rng, name),
      )
      for _ in range(num)
  ]
  rest = np.eye(3)[None]
  return np.stack([synthetic.paint(k, rest, grid)[0, 0] for k in layers])


@pytest.mark.parametrize("name", synthetic.CLASS_NAMES)
def test_both_colours_of_a_pattern_are_equally_frequent(name):
  values = _patterns(name)
  assert abs(values.mean()) < 0.05
  assert values.std() > 0.5 and np.abs(values).max() <= 1


@pytest.mark.parametrize("name", synthetic.CLASS_NAMES)
def test_a_pattern_is_what_its_name_says(name):
  values = _patterns(name)
  scale, direction = name.split("_")
  spectrum = (np.abs(np.fft.rfft2(values * np.hanning(64))) ** 2).mean(0)
  fy = np.abs(np.fft.fftfreq(64))[:, None] * np.ones(33)
  fx = np.fft.rfftfreq(64)[None] * np.ones((64, 1))
  spectrum[np.hypot(fx, fy) < 0.05] = 0
  wavelength = spectrum.sum() / (spectrum * np.hypot(fx, fy)).sum()
  low, high = {"fine": (4, 6.5), "coarse": (7, 12)}[scale]
  assert low < wavelength < high
  turn = np.degrees(np.arctan2(fy, fx))
  shares = {
      "vertical": spectrum[turn < 30].sum(),
      "diagonal": spectrum[(turn > 30) & (turn < 60)].sum(),
      "horizontal": spectrum[turn > 60].sum(),
  }
  total = sum(shares.values())
  shares = {key: share / total for key, share in shares.items()}
  if direction in shares:
    assert shares[direction] > 0.75
  else:
    assert 0.3 < shares["vertical"] / (1 - shares["diagonal"]) < 0.7
    crossed = shares["diagonal"]
    assert crossed < 0.2 if direction == "woven" else 0.3 < crossed < 0.7


def _neighbours_accuracy(bank, bank_labels, queries, labels, k=20) -> float:
  """Percent right of kNN with cosine similarity at temperature 0.07."""
  mean, std = bank.mean(0), bank.std(0) + 1e-6
  bank, queries = (bank - mean) / std, (queries - mean) / std
  bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
  queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
  similarity = queries @ bank.T
  nearest = np.argsort(-similarity, axis=1)[:, :k]
  weight = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
  votes = np.zeros((len(queries), synthetic.NUM_CLASSES))
  for c in range(synthetic.NUM_CLASSES):
    votes[:, c] = (weight * (bank_labels[nearest] == c)).sum(1)
  return 100 * float((votes.argmax(1) == labels).mean())


def test_neither_colour_nor_place_gives_the_class_away_and_pixels_say_little():
  def load(seed, num_examples):
    records = list(synthetic.Images(seed=seed, num_examples=num_examples))
    images = np.stack([r["image"] for r in records]).astype(np.float32) / 255
    place = np.array([(*r["center"], r["extent"]) for r in records])
    labels = np.array([r["label"] for r in records])
    pixels = images.reshape(len(images), -1)
    return labels, (images.mean((1, 2)), place, pixels)

  bank_labels, bank = load(11, 1000)
  labels, queries = load(12, 500)
  color, place, pixels = (
      _neighbours_accuracy(a, bank_labels, b, labels)
      for a, b in zip(bank, queries, strict=True)
  )
  # Chance is 10; the standard error of 500 queries is 1.3.
  assert abs(color - 10) < 4 and abs(place - 10) < 4
  assert pixels < 36
