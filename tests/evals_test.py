import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mcjepa_jax.data.sets import synthetic
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import (
    flow,
    frozen_features,
    inference,
    knn,
    rank_me,
    registry,
)
from mcjepa_jax.models import mcjepa
from mcjepa_jax.training import build
from tests import tiny


class _Pairs:
  """Two shapes; the last pair of the first shape makes an odd batch."""

  shapes = ((32, 48),) * 3 + ((40, 32),)

  def __len__(self):
    return len(self.shapes)

  def record_id(self, i):
    return f"pair_{i}"

  def __getitem__(self, i):
    h, w = self.shapes[i]
    rng = np.random.default_rng(i)
    valid = np.ones((h, w, 1), np.float32)
    valid[: h // 2] = i != 2
    return {
        "frame_1": rng.integers(0, 256, (h, w, 3), np.uint8),
        "frame_2": rng.integers(0, 256, (h, w, 3), np.uint8),
        "flow": np.full((h, w, 2), (3.0, -4.0), np.float32) * (i + 1),
        "valid": valid,
    }


def _truth_plus(offset):
  """A predictor that is off by `offset`, and counts what it is asked."""
  asked = []

  def predict(frames):
    asked.append(len(frames) // 2)
    count = sum(asked[:-1])
    return np.stack(
        [
            _Pairs()[min(count + i, 3)]["flow"] + np.array(offset, np.float32)
            for i in range(len(frames) // 2)
        ]
    )

  return predict, asked


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_pair_counts_once_whatever_the_batch(batch_size):
  predict, asked = _truth_plus((3.0, 4.0))
  result = flow.run(
      "set", _Pairs(), {"": predict}, batch_size=batch_size,
      classical=False, progress=False,
  )  # fmt: skip
  # The last batch comes once more where none could be timed.
  assert sum(asked) == 4 + (batch_size > 1)
  assert result["flow/set/count"] == 4
  np.testing.assert_allclose(result["flow/set/epe"], 5.0, rtol=1e-6)
  np.testing.assert_allclose(result["flow/set/fl_all"], 100.0)
  # |truth| is 5, 10, 15, 20: the mean over images.
  np.testing.assert_allclose(result["flow/set/epe_zero"], 12.5, rtol=1e-6)
  np.testing.assert_allclose(
      result["flow/set/epe_pair_constant"], 0.0, atol=1e-4
  )
  assert 4.9 < result["flow/set/epe_constant"] < 5.1
  np.testing.assert_allclose(result["flow/set/pair_3/epe_zero"], 20.0)


def test_a_batch_has_one_shape_and_a_limit_of_pixels():
  groups = flow.batches(_Pairs(), batch_size=8, max_pixels=2 * 32 * 48)
  assert [len(g) for g in groups] == [2, 1, 1]


def _mixed(*sides):
  """Squares of these sides, named by their number."""
  return [
      {"frame_1": np.zeros((side, side, 3), np.uint8), "number": i}
      for i, side in enumerate(sides)
  ]


class _Named(list):
  """Examples with record ids, and how many were read."""

  read = 0

  def record_id(self, i):
    return str(i)

  def __getitem__(self, i):
    self.read += 1
    return super().__getitem__(i)


def test_shapes_that_alternate_fill_batches_of_their_own():
  mixed = _Named(_mixed(4, 6, 4, 6, 4, 6, 6))
  groups = flow.batches(mixed, batch_size=3, max_pixels=1000)
  numbers = [[x["number"] for x in group] for group in groups]
  assert numbers == [[0, 2, 4], [1, 3, 5], [6]]


def test_batches_that_wait_are_given_up_before_memory_fills():
  # Every side another one: 4 * 100 pixels may wait.
  mixed, behind = _Named(_mixed(*range(9, 60))), []
  for number, _ in enumerate(flow.batches(mixed, batch_size=8, max_pixels=100)):
    behind.append(mixed.read - number)
  assert len(behind) == 51 and max(behind) <= 6


def test_classical_flows_find_a_translation():
  wide = np.random.default_rng(0).random((80, 112, 3))
  wide = (wide + np.roll(wide, 1, 0) + np.roll(wide, 1, 1)) / 3
  wide = np.kron(wide, np.ones((2, 2, 1)))
  wide = (255 * wide).astype(np.uint8)
  frame_1, frame_2 = wide[20:140, 20:180], wide[18:138, 16:176]
  for method in (flow.farneback, flow.dis):
    middle = method(frame_1, frame_2)[40:80, 40:120]
    np.testing.assert_allclose(np.median(middle, axis=(0, 1)), (4, 2), atol=0.3)


def test_knn_equals_scikit_learn():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 5, 300)
  x = rng.normal(size=(300, 8)) + 0.8 * np.eye(5, 8)[labels] * 3
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  bank, queries = x[:200], x[200:]
  ours, nearest = knn.knn_accuracy(
      bank, labels[:200], 7.0 * queries, labels[200:], ks=(20, 1), chunk=33
  )
  # Cosine distance is 1 - cosine: weights exp((1 - d) / t).
  peer = KNeighborsClassifier(
      20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
  )
  peer.fit(bank, labels[:200])
  # The very labels that it predicts, and so its score.
  guesses = peer.predict(queries)
  assert knn.knn_accuracy(bank, labels[:200], queries, guesses, ks=(20,)) == [
      100.0
  ]
  expected = 100 * np.mean(guesses == labels[200:])
  assert ours == pytest.approx(expected)
  assert 40 < ours < 100
  peer = KNeighborsClassifier(1, metric="cosine").fit(bank, labels[:200])
  assert nearest == pytest.approx(100 * peer.score(queries, labels[200:]))


def _label_oracle(images):
  """An embedder that knows the label of each of some images."""

  def embed(x):
    every = np.stack([images[i]["image"] for i in range(len(images))])
    labels = [images[i]["label"] for i in range(len(images))]
    index = [np.flatnonzero((every == image).all((1, 2, 3)))[0] for image in x]
    return np.eye(synthetic.NUM_CLASSES, dtype=np.float32)[labels][index]

  return embed


def _corner(images):
  return images[:, 0, 0].astype(np.float32)


@pytest.fixture(scope="module")
def parts():
  """260 and 20 procedural images as features; labels are the encoder's."""
  made = []
  for seed, count in ((0, 260), (1, 20)):
    images = synthetic.Images(size=(32, 32), seed=seed, num_examples=count)
    embedders = {"": _label_oracle(images), "random_init": _corner}
    made.append(
        frozen_features.extract(
            images, embedders, size=32, name="", progress=False
        )
    )
  return made


def test_knn_of_a_set_reports_its_twins_and_references(parts):
  result = knn.run("set", *parts, k=1, progress=False)
  assert result["knn/set/top1"] == 100.0
  assert result["knn/set/top1_pixels"] < 60
  assert result["knn/set/chance"] == pytest.approx(100 / synthetic.NUM_CLASSES)
  assert result["knn/set/count"] == 20
  for metric in ("top1", "top1_k200"):
    for twin in ("", "_random_init", "_pixels"):
      assert 0 <= result[f"knn/set/{metric}{twin}"] <= 100
  assert {"knn/set/top1_color", "knn/set/top1_position"} <= set(result)


def test_a_bank_of_fewer_images_has_no_vote_of_200(parts):
  small = frozen_features.FeatureSet(
      {k: v[:200] for k, v in parts[0].features.items()}, parts[0].labels[:200]
  )
  result = knn.run("set", small, parts[1], progress=False)
  assert not [key for key in result if "k200" in key]


def test_rank_tells_how_many_directions_features_have(parts):
  result = rank_me.run("set", parts[0])
  # Ten classes, one direction each, about as often.
  assert 9 < result["rankme/set/rank"] <= 10.1
  assert result["rankme/set/rank_random_init"] <= 3.01
  assert 10 < result["rankme/set/rank_pixels"] <= 260
  assert result["rankme/set/count"] == 260


def test_pixels_of_a_large_set_are_of_smaller_pictures(monkeypatch):
  monkeypatch.setattr(frozen_features, "_PIXEL_VALUES", 12 * 16 * 16 * 3)
  images = synthetic.Images(size=(64, 64), seed=0, num_examples=12)
  part = frozen_features.extract(images, {}, size=64, name="", progress=False)
  assert part.features["pixels"].shape == (12, 16 * 16 * 3)
  mean = np.mean([images[i]["image"].mean() for i in range(12)]) / 255
  assert part.features["pixels"].mean() == pytest.approx(mean, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_predictions_do_not_depend_on_devices_or_on_the_last_batch(devices):
  cfg = tiny.config()
  model = build.model(cfg)
  params = jax.jit(lambda: mcjepa.init_params(model, 0))()
  one, many = sharding.make_mesh(1), sharding.make_mesh(devices)
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (6, 40, 32, 3), np.uint8)
  whole = inference.flow_predictor(model, params, one)(frames)
  part = inference.flow_predictor(model, params, many)(frames[2:4])
  assert whole.shape == (3, 40, 32, 2)
  # Noise through norms over few channels magnifies rounding; another pair's
  # flow is off by half a pixel.
  np.testing.assert_allclose(part[0], whole[1], atol=5e-3)
  assert np.abs(whole[0] - whole[1]).max() > 0.1
  embed = inference.embedder(model, params, many)
  images = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)
  np.testing.assert_allclose(embed(images)[3], embed(images[3:4])[0], atol=1e-5)


def test_an_unknown_eval_is_named_with_what_there_is():
  cfg = tiny.config(evals=("flow/nowhere", "speed", "knn/cifar10"))
  faults = "\n".join(registry.check(cfg))
  assert "'nowhere'" in faults and "synthetic" in faults
  assert "'speed'" in faults
  assert "data_root" in faults
