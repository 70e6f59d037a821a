"""Tests of the cut-outs: what their flow and masks promise, on any images."""

import hashlib
import math
import pickle
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax import errors
from mcjepa_jax.data import sources
from mcjepa_jax.data.pipeline import batches
from mcjepa_jax.data.sets import cutouts, image_sets, synthetic
from tests.helpers import scene_checks


def _photographs(images) -> list[dict[str, np.ndarray]]:
  """A set of images in memory."""
  return [{"image": np.asarray(image)} for image in images]


_GRAYS = np.linspace(20, 235, 40).astype(np.uint8)


def _flat_colors(count: int) -> list[dict[str, np.ndarray]]:
  return _photographs(np.full((40, 50, 3), k, np.uint8) for k in _GRAYS[:count])


@pytest.fixture(scope="module")
def smooth() -> list[dict[str, np.ndarray]]:
  """Blotches of about a tenth of the photograph."""
  noise = np.random.default_rng(0).integers(0, 256, (30, 9, 12, 3), np.uint8)
  return _photographs(Image.fromarray(k).resize((160, 120)) for k in noise)


@pytest.fixture(scope="module")
def photographs(shared_data) -> list[dict[str, np.ndarray]]:
  folder = image_sets.ImageFolder(shared_data / "imagenet" / "train")
  return [folder[i] for i in range(0, 1000, 5)]


def _stacked(images, num_examples=128, **fields) -> dict[str, np.ndarray]:
  pairs = cutouts.Pairs(images, seed=101, num_examples=num_examples, **fields)
  records = list(pairs)
  return {key: np.stack([r[key] for r in records]) for key in records[0]}


@pytest.fixture(scope="module")
def pairs(smooth) -> dict[str, np.ndarray]:
  """128 pairs, stacked by key."""
  return _stacked(smooth)


_SCRIPT = """
import sys
from mcjepa_jax.data.sets import cutouts, image_sets
from tests.helpers import scene_checks
images = image_sets.ImageFolder(sys.argv[1])
record = cutouts.Pairs(images, seed=3, num_examples=9)[7]
sys.stdout.buffer.write(scene_checks.flat(record))
"""


def test_a_record_depends_on_images_seed_and_index_alone(smooth, tmp_path):
  for i, image in enumerate(smooth):
    Image.fromarray(image["image"]).save(tmp_path / f"{i:02d}.png")
  images = image_sets.ImageFolder(tmp_path)
  dataset = cutouts.Pairs(images, seed=3, num_examples=30)
  forward = [scene_checks.flat(dataset[i]) for i in range(8)]
  copy = pickle.loads(pickle.dumps(dataset))
  backward = [scene_checks.flat(copy[i]) for i in reversed(range(8))]
  assert backward == forward[::-1]
  assert len(set(forward)) == 8
  other = cutouts.Pairs(images, seed=4, num_examples=30)
  assert not {scene_checks.flat(other[i]) for i in range(8)} & set(forward)
  assert other.record_id(0) != dataset.record_id(0) != dataset.record_id(1)
  process = subprocess.run(
      [sys.executable, "-c", _SCRIPT, str(tmp_path)],
      capture_output=True,
      check=True,
  )
  there, here = (hashlib.sha256(x) for x in (process.stdout, forward[7]))
  assert there.hexdigest() == here.hexdigest()


def test_a_set_ends_at_its_length(smooth):
  dataset = cutouts.Pairs(smooth, size=(16, 16), seed=0, num_examples=3)
  assert len(dataset) == 3 and len(list(dataset)) == 3
  with pytest.raises(IndexError):
    dataset.record_id(3)


def test_faults_of_the_arguments_are_all_listed():
  with pytest.raises(errors.UserError) as error:
    cutouts.Pairs(
        [], size=(8, 64), seed=-1, num_examples=0, max_motion=float("nan")
    )
  assert len(error.value.messages) == 5
  assert "cutouts height: expected at least 16, got 8" in str(error.value)


def test_records_have_the_keys_and_types_of_the_procedural_set(smooth):
  size = (48, 80)
  record = cutouts.Pairs(smooth, size=size, seed=0, num_examples=1)[0]
  model = synthetic.Pairs(size=size, seed=0, num_examples=1)[0]
  del model["label"]
  assert record.keys() == model.keys()
  for key, value in model.items():
    assert record[key].shape == value.shape, key
    assert record[key].dtype == value.dtype, key
  assert record["valid"].all()
  np.testing.assert_array_equal(record["flow"], record["flow_12"])
  assert set(np.unique(record["visible_1"])) == {0, 1}


def test_flow_is_large_enough_to_be_worth_estimating(pairs):
  length = np.linalg.norm(pairs["flow"], axis=-1)
  assert length.mean() >= 2.5
  assert np.percentile(length, 95) >= 6


def test_no_constant_flow_beats_zero(pairs, smooth):
  flow = pairs["flow"].reshape(-1, 2)[::7].astype(np.float64)
  zero = np.linalg.norm(flow, axis=-1).mean()
  training = cutouts.Pairs(smooth, seed=102, num_examples=128)
  mean = np.mean([r["flow"].mean((0, 1)) for r in training], axis=0)
  for constant in (scene_checks.best_constant(flow), mean):
    assert np.linalg.norm(flow - constant, axis=-1).mean() > 0.95 * zero


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
@pytest.mark.parametrize("most", [0.05, 0.2, 0.5])
def test_no_flow_is_longer_than_max_motion(size, most):
  images = _flat_colors(2)
  flow = _stacked(images, 60, size=size, max_motion=most)["flow"]
  longest = np.linalg.norm(flow, axis=-1).max() / min(size)
  assert 0.6 * most < longest <= most


@pytest.mark.parametrize("frame", ["1", "2"])
def test_a_twentieth_of_the_pixels_is_covered_in_the_other_frame(pairs, frame):
  flow = pairs["flow_12" if frame == "1" else "flow_21"]
  target = scene_checks.grid(64, 64) + flow
  inside = ((target >= 0) & (target <= 63)).all(-1)
  visible = pairs["visible_" + frame][..., 0]
  assert (inside & (visible == 0)).mean() >= 0.05
  # What left the frame is not visible either.
  assert not visible[((target < -0.01) | (target > 63.01)).any(-1)].any()


def _difference(pairs, direction, flow) -> float:
  """Of one frame and the other one sampled at the flow, where visible."""
  a, b = direction
  here = pairs["frame_" + a].astype(np.float64)
  there = pairs["frame_" + b].astype(np.float64)
  target = scene_checks.grid(*here.shape[1:3]) + flow
  warped = scene_checks.sample(there, target, scene_checks.cubic)
  return scene_checks.masked_mean(np.abs(warped - here), pairs["visible_" + a])


@pytest.mark.parametrize("direction", ["12", "21"])
def test_flow_carries_one_frame_onto_the_other(pairs, direction):
  assert _difference(pairs, direction, pairs["flow_" + direction]) < 2
  few = {key: value[:32] for key, value in pairs.items()}
  flow = few["flow_" + direction]
  # Any other reading of the two components or of the frames is far off.
  wrong = (flow[..., ::-1], -flow, flow * (1, -1), flow * (-1, 1), 0 * flow)
  assert min(_difference(few, direction, other) for other in wrong) > 8


@pytest.mark.parametrize("direction", ["12", "21"])
def test_flow_carries_one_frame_of_photographs_onto_the_other(
    photographs, direction
):
  # The bound of the procedural set; larger frames are smoother.
  for size, count, most in (((64, 64), 64, 2.0), ((192, 256), 8, 1.1)):
    pairs = _stacked(photographs, count, size=size)
    assert _difference(pairs, direction, pairs["flow_" + direction]) < most


@pytest.mark.parametrize("direction", ["12", "21"])
def test_flows_compose_to_nothing_where_visible(pairs, direction):
  forward, back = pairs["flow_" + direction], pairs["flow_" + direction[::-1]]
  target = scene_checks.grid(64, 64) + forward
  back = scene_checks.sample(back, target, scene_checks.linear)
  error = np.linalg.norm(forward + back, axis=-1, keepdims=True)
  visible = pairs["visible_" + direction[0]]
  assert scene_checks.masked_mean(error, visible) < 0.1
  assert scene_checks.masked_mean(error, 1 - visible) > 1


def _forward(layer: cutouts.Layer, points: np.ndarray, time: float):
  """The layer's points [n 2] at a time, by the formulas of the module's text."""
  points = points.copy()
  for turn, frequency, phase, amplitude in layer.ripples:
    n = np.array((math.cos(turn), math.sin(turn)))
    push = time * amplitude * np.sin(frequency * points @ n + phase)
    points += push[:, None] * (-n[1], n[0])
  axis = np.array((math.cos(layer.stretch_turn), math.sin(layer.stretch_turn)))
  along = np.outer(axis, axis)
  shape = math.exp(time * layer.stretch) * along
  shape += math.exp(-time * layer.stretch) * (np.eye(2) - along)
  cos, sin = math.cos(time * layer.rotation), math.sin(time * layer.rotation)
  turn = math.exp(time * layer.log_zoom) * np.array(((cos, -sin), (sin, cos)))
  shift = np.add(layer.center, np.multiply(time, layer.translation))
  return points @ (turn @ shape).T + shift


def _backward(layer: cutouts.Layer, points: np.ndarray, time: float):
  """Inverts `_forward` by iteration, not by its formula."""
  local = points - layer.center
  for _ in range(60):
    local = local + points - _forward(layer, local, time)
  np.testing.assert_allclose(_forward(layer, local, time), points, atol=1e-6)
  return local


def _inside(layer: cutouts.Layer, local: np.ndarray) -> np.ndarray:
  """Signed distance to the silhouette along the ray from the centre."""
  angle = np.arctan2(local[:, 1], local[:, 0])
  boundary = 1 + sum(
      (c * np.exp(1j * k * angle)).real
      for k, c in enumerate(layer.harmonics, 2)
  )
  depth = layer.radius * boundary - np.hypot(*local.T)
  for turn, distance in layer.cuts:
    normal = (math.cos(turn), math.sin(turn))
    depth = np.minimum(depth, distance - local @ normal)
  return depth


def _strong_layers() -> list[cutouts.Layer]:
  """Discs that grow and shrink more than any drawn one."""
  ripples = ((0.3, 0.2, 1.0, 4.0), (2.0, 0.1, 2.0, 4.0))
  motion = dict(rotation=0.3, stretch=0.3, stretch_turn=0.4, ripples=ripples)
  return [
      cutouts.Layer(translation=(3.0, 1.0), **motion),
      cutouts.Layer(center=(-20.0, 0.0), radius=10.0, log_zoom=0.3, **motion),
      cutouts.Layer(center=(14.0, 9.0), radius=8.0, log_zoom=-0.3, **motion),
  ]


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_flow_and_occlusion_are_those_of_a_search_in_depth_order(seed):
  size, scale = (48, 80), 48 / 64
  layers = _strong_layers()
  if seed is not None:
    rng = np.random.default_rng(seed)
    layers = cutouts.scene_layers(rng, 40, size, 0.3)
  scene = cutouts.render(layers, _flat_colors(40), size)
  grid = scene_checks.grid(*size).reshape(-1, 2)
  middle = (np.array(size[::-1]) - 1) / 2
  points = (grid - middle) / scale
  for frame, (here, there) in enumerate(((-0.5, 0.5), (0.5, -0.5))):
    local = [_backward(layer, points, here) for layer in layers]
    depth = [_inside(k, p) for k, p in zip(layers[1:], local[1:], strict=True)]
    owner = np.zeros(len(points), int)
    for k, inside in enumerate(depth, 1):
      owner[inside > 0] = k
    target = np.choose(
        owner[:, None],
        [_forward(k, p, there) for k, p in zip(layers, local, strict=True)],
    )
    hidden = (np.abs(target * scale) > middle).any(-1)
    unsure = (np.abs(np.abs(target * scale) - middle) < 1e-3).any(-1)
    unsure |= (np.abs(depth) < 1e-3).any(0)
    for k, layer in enumerate(layers[1:], 1):
      inside = _inside(layer, _backward(layer, target, there))
      hidden |= (inside > 0) & (owner < k)
      unsure |= np.abs(inside) < 1e-3
    assert unsure.mean() < 0.01
    flow = scene["flows"][frame].reshape(-1, 2)[~unsure]
    expected = (target - points)[~unsure] * scale
    np.testing.assert_allclose(flow, expected, atol=1e-3)
    visible = scene["visible"][frame].reshape(-1)
    np.testing.assert_array_equal(visible[~unsure], ~hidden[~unsure])
    np.testing.assert_array_equal(
        scene["segments"][frame].reshape(-1)[~unsure], owner[~unsure]
    )
    assert 0.03 < hidden.mean() < 0.6


def test_a_ripple_shears_by_the_sine_of_the_place_across_it():
  ripple = (0.0, 2 * math.pi / 32, 0.0, 4.0)
  scene = cutouts.render(
      [cutouts.Layer(ripples=(ripple,))], _flat_colors(1), (64, 64)
  )
  x = np.arange(64) - 31.5
  expected = np.zeros((64, 64, 2))
  expected[..., 1] = 4 * np.sin(2 * math.pi / 32 * x)
  for flow, sign in zip(scene["flows"], (1, -1), strict=True):
    np.testing.assert_allclose(flow, sign * expected, atol=1e-4)


def test_an_edge_fades_over_a_pixel():
  layers = [cutouts.Layer(), cutouts.Layer(photograph=1, radius=20.0)]
  images = _photographs(np.full((9, 9, 3), k, np.uint8) for k in (40, 200))
  frame_1 = cutouts.render(layers, images, (96, 96))["images"][0]
  depth = 30 - np.linalg.norm(scene_checks.grid(96, 96) - 47.5, axis=-1)
  expected = 120 + 80 * np.tanh(2 * depth)
  np.testing.assert_allclose(frame_1[..., 0], expected, atol=0.6)


def test_a_small_photograph_keeps_its_proportions():
  y, x = np.indices((40, 80))
  image = np.repeat((2 * (x + y)).astype(np.uint8)[..., None], 3, -1)
  frame = cutouts.render([cutouts.Layer()], _photographs([image]), (64, 64))
  frame = frame["images"][0].astype(float)
  right, down = (np.diff(frame, axis=axis).mean() for axis in (1, 0))
  np.testing.assert_allclose(right, down, rtol=0.05)


def test_layers_show_photographs_that_differ():
  images = _flat_colors(20)
  for record in cutouts.Pairs(images, seed=5, num_examples=10):
    shown = set()
    segments = np.unique(record["segments_1"]).tolist()
    for segment in segments:
      # Most of a silhouette is farther from its edge than the edge is wide.
      values = record["frame_1"][record["segments_1"] == segment]
      shown.add(int(np.median(values)))
    assert len(shown) == len(segments) and shown <= set(_GRAYS.tolist())


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_a_piece_is_upright_and_enlarged_no_more_than_it_must(share):
  ramp = np.linspace(0, 255, 200)
  for axis, shape in ((1, (1, 200, 1)), (0, (200, 1, 1))):
    image = np.broadcast_to(ramp.reshape(shape), (200, 200, 3))
    scene = cutouts.render(
        [cutouts.Layer(share=share)],
        _photographs([image.astype(np.uint8)]),
        (64, 64),
    )
    # Two pixels of margin at either end.
    step = max(share * 255 / (64 + 4), 255 / 200)
    rise = np.diff(scene["images"][0].astype(float), axis=axis)[4:-4, 4:-4]
    np.testing.assert_allclose(rise, step, atol=1.01)
    np.testing.assert_allclose(rise.mean(), step, rtol=0.03)


def test_fine_detail_is_averaged_not_aliased():
  checks = np.indices((1280, 1280)).sum(0) % 2 * 255
  image = np.repeat(checks[..., None], 3, -1).astype(np.uint8)
  pair = cutouts.Pairs(_photographs([image]), seed=0, num_examples=1)[0]
  for frame in (pair["frame_1"], pair["frame_2"]):
    np.testing.assert_allclose(frame, 127.5, atol=3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (400, 2), (5, 7)])
def test_small_and_narrow_photographs_are_enlarged(shape):
  noise = np.random.default_rng(0).integers(100, 150, (*shape, 3), np.uint8)
  images = _photographs([noise])
  record = cutouts.Pairs(images, size=(32, 96), seed=0, num_examples=1)[0]
  # A bicubic filter overshoots.
  assert 85 < record["frame_1"].min() <= record["frame_1"].max() < 165
  assert np.linalg.norm(record["flow"], axis=-1).max() > 2


@pytest.mark.parametrize("folder", ["images", "images/kind"])
def test_sources_make_pairs_of_a_folder_of_any_photographs(tmp_path, folder):
  rng = np.random.default_rng(0)
  (tmp_path / folder).mkdir(parents=True)
  for name, shape in (("a.png", (60, 70)), ("b.jpg", (50, 90, 3))):
    noise = rng.integers(0, 256, shape, np.uint8)
    Image.fromarray(noise).save(tmp_path / folder / name)
  motion = sources.motion("cutouts", str(tmp_path), seed=1, size=(32, 64))
  held_out = sources.flow_pairs(
      "cutouts",
      str(tmp_path),
      seed=sources.held_out_seed(1),
      size=(32, 64),
      count=3,
  )
  assert len(motion) > 100_000 and len(held_out) == 3
  batch = batches.motion_stream(
      [batches.MotionSource("cutouts", motion, (32, 64))], batch_size=2, seed=0
  )[0].arrays
  assert batch.keys() == {"frames"}
  assert batch["frames"].shape == (4, 32, 64, 3)
  assert "label" not in motion[0]
  assert {"frame_1", "frame_2", "flow", "valid"} <= held_out[0].keys()
  assert not np.array_equal(motion[0]["flow"], held_out[0]["flow"])
  assert motion.record_id(0) != held_out.record_id(0)


def test_sources_name_a_folder_without_images(tmp_path):
  with pytest.raises(errors.UserError, match="images: expected a folder"):
    sources.motion("cutouts", str(tmp_path), seed=1, size=(32, 64))


def test_a_photograph_that_cannot_be_read_is_replaced_and_named(tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / "images").mkdir()
  for i in range(4):
    noise = rng.integers(0, 256, (60, 70, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"images/{i}.png")

  def parts():
    pairs = sources.motion("cutouts", str(tmp_path), seed=1, size=(32, 32))
    source = batches.MotionSource("cutouts", pairs, (32, 32))
    stream = batches.motion_stream([source], batch_size=8, seed=0)
    return [stream[k] for k in range(2)]

  whole = parts()
  (tmp_path / "images/2.png").write_bytes(b"no image")
  for part, before in zip(parts(), whole, strict=True):
    # The scenes stay, and their motion.
    assert part.records == before.records and not before.faults
    records, faults = zip(*part.faults, strict=True)
    assert set(records) == {"cutouts/2.png"}
    assert all("2.png: expected an image" in fault for fault in faults)
  same = [
      (a == b).all()
      for part, before in zip(parts(), whole, strict=True)
      for a, b in zip(
          part.arrays["frames"], before.arrays["frames"], strict=True
      )
  ]
  assert not all(same)
  for i in range(4):
    (tmp_path / f"images/{i}.png").write_bytes(b"no image")
  with pytest.raises(errors.UserError, match="cutouts/.*expected an image"):
    parts()
