import gc
import json
import tracemalloc
import weakref

import jax
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.data import sources
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import davis, eval_subject, inference, registry
from mcjepa_jax.models import mcjepa
from mcjepa_jax.training import build, validation
from tests.helpers import mask_clips, tiny

_SETTINGS = dict(context=7, radius=12, top=5, temperature=0.1)


def _pixels(stride=1):
  def extract(frames):
    size = min(frames.shape[1:3])
    grid = davis.feature_grid(frames.shape[1:3], size=size, multiple=stride)
    return np.asarray(davis.pixel_features(frames, grid=grid, stride=stride))

  return extract


def _run(sequence, extractors=None, **changes):
  return davis.run(
      "set",
      mask_clips.Sequences(clip=sequence),
      {"": _pixels()} if extractors is None else extractors,
      progress=False,
      **(_SETTINGS | changes),
  )


def _unit(rng, *shape):
  x = rng.normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _similarities(query, key, radius):
  """All of them, [query cell, key cell], -inf where they are too far apart."""
  h, w, d = query.shape
  y, x = np.divmod(np.arange(h * w), w)
  far = np.maximum(abs(y[:, None] - y), abs(x[:, None] - x)) > radius
  similarity = query.reshape(-1, d) @ key.reshape(-1, d).T
  return np.where(far, -np.inf, similarity)


@pytest.mark.parametrize(
    ("shape", "radius"), [((17, 29), 5), ((12, 24), 12), ((3, 40), 2)]
)
def test_the_nearest_cells_are_those_of_the_whole_matrix(shape, radius):
  rng = np.random.default_rng(0)
  query, key = _unit(rng, 2, *shape, 8)
  best, index = davis.nearest(query, key, radius=radius, top=5)
  whole = _similarities(query, key, radius)
  order = np.argsort(-whole, axis=1)[:, :5]
  np.testing.assert_array_equal(np.asarray(index).reshape(-1, 5), order)
  np.testing.assert_allclose(
      np.asarray(best).reshape(-1, 5),
      np.take_along_axis(whole, order, 1),
      atol=1e-6,
  )


def test_masks_are_the_votes_of_the_whole_matrix_over_all_frames():
  rng = np.random.default_rng(1)
  shape, count = (14, 10), 6
  features = _unit(rng, count, *shape, 4)
  given = np.eye(3, dtype=np.float32)[rng.integers(0, 3, shape)]
  given[..., 0] = 0
  propagation = davis.Propagation(context=2, radius=3, top=5, temperature=0.1)
  came = [propagation.step(features[0], given)]
  came += [propagation.step(x) for x in features[1:]]
  for t in range(1, count):
    used = [0, *range(max(1, t - 2), t)]
    affinity = np.exp(
        np.concatenate(
            [_similarities(features[t], features[s], 3) for s in used], 1
        )
        / 0.1
    )
    affinity[affinity < np.sort(affinity, axis=1)[:, -5:-4]] = 0
    affinity /= affinity.sum(1, keepdims=True)
    masks = np.concatenate([came[s].reshape(-1, 3) for s in used])
    np.testing.assert_allclose(
        came[t].reshape(-1, 3), affinity @ masks, atol=1e-5
    )


def test_each_channel_is_weighed_by_its_own_range():
  # No object, the first, the second; in the middle the first is at its most.
  masks = np.array([[[1, 0, 0], [0.3, 0.3, 0.4], [0, 0, 1]]], np.float32)
  assert davis.hard(masks, (1, 3)).tolist() == [[0, 1, 2]]


def test_soft_masks_are_enlarged_about_the_middle_of_their_cells():
  masks = np.zeros((2, 2, 2), np.float32)
  masks[:, 0, 0] = masks[:, 1, 1] = 1
  assert davis.hard(masks, (4, 8)).tolist() == [[0] * 4 + [1] * 4] * 4
  pixels = np.arange(32).reshape(4, 8)
  assert davis.at_cells(pixels, (2, 2)).tolist() == [[10, 14], [26, 30]]


def test_a_still_clip_keeps_its_first_mask():
  frames, labels = mask_clips.clip(shift=0, objects=2)
  result = _run(mask_clips.Sequence(frames, labels, (1, 2)))
  for metric in ("j_and_f", "j_mean", "j_recall", "f_mean", "f_recall"):
    assert result[f"davis/set/{metric}"] == 100
    assert result[f"davis/set/{metric}_copy_first"] == 100
  assert result["davis/set/j_decay"] == result["davis/set/f_decay"] == 0
  assert result["davis/set/clip/j"] == result["davis/set/clip/f"] == 100
  assert result["davis/set/count"] == 1


@pytest.mark.parametrize(("stride", "shift"), [(1, 1), (2, 3), (4, 4)])
def test_a_mask_follows_what_moves(stride, shift):
  frames, labels = mask_clips.clip(
      shape=(64, 96), shift=shift, length=12, side=24, objects=2
  )
  sequence = mask_clips.Sequence(frames, labels, (1, 2))
  result = _run(sequence, {"": _pixels(stride)})
  assert result["davis/set/j_and_f"] > 90
  assert result["davis/set/j_and_f_copy_first"] < 60
  assert result["davis/set/j_decay_copy_first"] > 20


def test_features_that_say_nothing_lose_the_object():
  frames, labels = mask_clips.clip(length=12)
  result = _run(
      mask_clips.Sequence(frames, labels),
      {"": _pixels(2), "noise": _noise(2)},
  )
  assert result["davis/set/j_and_f_noise"] < result["davis/set/j_and_f"] - 30


def _noise(stride):
  rng = np.random.default_rng(0)

  def extract(frames):
    n, h, w, _ = frames.shape
    return _unit(rng, n, h // stride, w // stride, 8)

  return extract


def test_the_first_and_the_last_frame_do_not_count():
  frames, labels = mask_clips.clip(shift=0)
  labels[-1] = 1 - labels[-1]
  result = _run(mask_clips.Sequence(frames, labels))
  assert result["davis/set/j_and_f"] == 100
  # Two wrong frames of the four that count.
  labels[2:4] = 0
  result = _run(mask_clips.Sequence(frames, labels))
  assert result["davis/set/j_mean"] == result["davis/set/j_recall"] == 50


def test_an_object_begins_where_its_first_mask_lies():
  frames, labels = mask_clips.clip(length=9, shift=1, objects=2)
  late = [np.where((t < 4) & (m == 2), 0, m) for t, m in enumerate(labels)]
  # The sequence begins before any object does, and not every frame is known.
  late[0][:] = 0
  late[2] = late[6] = None
  found = davis.follow(
      mask_clips.Sequence(frames, late, (1, 2)),
      {"": _pixels()},
      name="set",
      batch=2,
      **_SETTINGS,
  )
  assert len(found[""]) == 2
  assert all(values["j_mean"] > 95 for values in found[""])
  # Given at frames 1 and 4: 3, 4, 5, 7 count for the one, 5 and 7 for the
  # other, and a mask that stays is as many pixels behind.
  side = 16
  for values, lags in zip(
      found["copy_first"], ((2, 3, 4, 6), (1, 3)), strict=True
  ):
    expected = np.mean([(side - lag) / (side + lag) for lag in lags])
    assert values["j_mean"] == pytest.approx(100 * expected)


def test_a_label_that_no_object_has_is_said_once_and_counts_as_none(capsys):
  frames, labels = mask_clips.clip(objects=2)
  sequence = mask_clips.Sequence(frames, [*(labels % 2)[:2], *labels[2:]])
  expected = _run(mask_clips.Sequence(frames, list(labels % 2)))
  assert capsys.readouterr().out == ""
  assert _run(sequence) == expected
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("davis/set/clip: label 2, from frame 2 on, is not in")


def test_an_object_that_no_mask_shows_is_said(capsys):
  frames, labels = mask_clips.clip(shift=0)
  result = _run(mask_clips.Sequence(frames, labels, (1, 7)))
  assert result["davis/set/j_and_f"] == 100
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("davis/set/clip: no mask shows object 7")


def test_one_bar_is_over_all_frames_and_each_sequence_has_a_line(capsys):
  still = mask_clips.Sequence(*mask_clips.clip(shift=0, length=5))
  short = mask_clips.Sequence(*mask_clips.clip(shift=0, length=2))
  davis.run("set", mask_clips.Sequences(one=still, two=short), {"": _pixels()})
  came = capsys.readouterr()
  assert came.out.splitlines() == [
      "davis/set/one: J&F 100.0, copy_first 100.0",
      "davis/set/two: nothing to measure",
  ]
  assert "/7 [" in came.err and "2/2 two" in came.err
  assert "/5 [" not in came.err and "/2 [" not in came.err


@pytest.mark.parametrize("shift", [0, 2])
def test_frames_that_share_a_pass_change_no_number(shift):
  sequence = mask_clips.Sequence(*mask_clips.clip(shift=shift, length=7))
  one, three = (_run(sequence, batch=batch) for batch in (1, 3))
  assert one == three


def test_labels_need_not_be_consecutive():
  frames, labels = mask_clips.clip(shift=1, objects=2)
  labels[labels == 2] = 200
  result = _run(mask_clips.Sequence(frames, labels, (1, 200)))
  assert result["davis/set/j_and_f"] > 95


def test_there_may_be_as_many_objects_as_labels():
  masks = np.zeros((2, 3, 255), np.float32)
  masks[1, 2, 254] = masks[0, 0, 1] = 1
  assert davis.hard(masks, (2, 3)).tolist() == [[1, 0, 0], [0, 0, 254]]


def test_a_set_in_which_nothing_counts_is_an_error():
  frames, labels = mask_clips.clip(length=2)
  with pytest.raises(errors.UserError, match="davis/set: expected an object"):
    _run(mask_clips.Sequence(frames, labels))


def test_a_sequence_in_which_nothing_counts_is_left_out():
  frames, labels = mask_clips.clip(shift=0)
  result = davis.run(
      "set",
      mask_clips.Sequences(
          short=mask_clips.Sequence(frames[:2], labels[:2]),
          long=mask_clips.Sequence(frames, labels),
      ),
      {"": _pixels()},
      progress=False,
  )
  assert result["davis/set/count"] == 1
  assert result["davis/set/j_and_f"] == 100
  assert "davis/set/short/j" not in result


def test_an_object_smaller_than_a_cell_is_lost_and_counted():
  frames, labels = mask_clips.clip(shape=(32, 48), side=1)
  result = _run(mask_clips.Sequence(frames, labels), {"": _pixels(16)})
  assert result["davis/set/j_and_f"] == 0
  assert all(np.isfinite(value) for value in result.values())


class _Endless(mask_clips.Sequence):
  """Frames and labels made when they are asked for."""

  def __init__(self, length):
    frames, labels = mask_clips.clip(shape=(32, 48), shift=0, length=1)
    super().__init__(frames, [True] * length)
    self._labels = labels[0]

  def __len__(self):
    return len(self.masks)

  def frame(self, index):
    return self.frames[0].copy()

  def labels(self, index):
    return self._labels.copy()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sequence():
  live, most = weakref.WeakSet(), 0

  class Features(np.ndarray):
    __hash__ = object.__hash__

  def extract(frames):
    nonlocal most
    features = _pixels(4)(frames)
    found = []
    for x in features:
      found.append(np.array(x).view(Features))
      live.add(found[-1])
    gc.collect()
    most = max(most, len(live))
    return found

  peaks = []
  for length in (20, 100):
    tracemalloc.start()
    result = _run(_Endless(length), {"": extract}, batch=2, radius=3)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert result["davis/set/j_mean_copy_first"] == 100
  # The given one, the seven before, a batch and the batch before it.
  assert most <= 1 + 7 + 2 + 2
  assert peaks[1] < 1.3 * peaks[0] + 100_000


def test_the_grid_keeps_480p_and_rounds_up():
  assert davis.feature_grid((480, 854), size=480, multiple=32) == (480, 864)
  assert davis.feature_grid((720, 1280), size=480, multiple=32) == (480, 864)
  assert davis.feature_grid((1280, 720), size=480, multiple=32) == (864, 480)


def _subject(root, devices=1, **changes):
  cfg = tiny.config(data_root=str(root), evals=("davis/2017",))
  cfg.davis.update(dict(size=32, radius=3) | changes)
  model = build.model(cfg)
  params, initial = (
      jax.jit(lambda seed=seed: mcjepa.init_params(model, seed))()
      for seed in (1, 0)
  )
  mesh = sharding.make_mesh(devices)
  return eval_subject.Subject(cfg, model, params, initial, mesh, root)


def _results(subject):
  results, found = registry.run(subject)
  assert not found
  return {k: v for k, v in results.items() if not k.startswith("meta/")}


@pytest.mark.parametrize(
    ("devices", "batch", "frames"), [(1, 1, 1), (1, 4, 4), (4, 3, 4), (4, 5, 8)]
)
def test_a_pass_has_as_many_frames_as_the_devices_divide(
    monkeypatch, tmp_path, devices, batch, frames
):
  mask_clips.davis(tmp_path / "DAVIS")
  monkeypatch.setattr(
      davis, "run", lambda *_, batch, **__: {"davis/2017/batch": batch}
  )
  cfg = tiny.config(data_root=str(tmp_path), davis__batch=batch)
  mesh = sharding.make_mesh(devices)
  untrained = {"encoder": {}}
  found = registry.run(
      eval_subject.Subject(
          *(cfg, build.model(cfg), untrained, untrained, mesh, tmp_path)
      ),
      ("davis/2017",),
  )[0]
  assert found["davis/2017/batch"] == frames


def test_a_pass_without_a_frame_is_refused():
  (fault,) = validation.faults(tiny.config(davis__batch=0))
  assert fault == "davis.batch: expected a positive number, got 0"


@pytest.mark.slow
def test_results_have_their_references_and_do_not_depend_on_devices(tmp_path):
  mask_clips.davis(
      tmp_path / "DAVIS", listed=("walk", "run"), shape=(48, 72), length=7
  )
  one, many = (
      _results(_subject(tmp_path, devices, batch=batch))
      for devices, batch in ((1, 1), (4, 3))
  )
  for suffix in ("", "_random_init", "_pixels", "_copy_first"):
    for metric in ("j_and_f", "j_mean", "j_recall", "j_decay",
                   "f_mean", "f_recall", "f_decay"):  # fmt: skip
      assert np.isfinite(one[f"davis/2017/{metric}{suffix}"])
    for name in ("walk", "run"):
      j, f, both = (
          one[f"davis/2017/{name}/{metric}{suffix}"]
          for metric in ("j", "f", "j_and_f")
      )
      assert 0 <= j <= 100 and both == pytest.approx((j + f) / 2)
  assert one["davis/2017/count"] == 2
  assert one.keys() == many.keys()
  for key, value in one.items():
    # A rounding may turn the label of a pixel.
    assert many[key] == pytest.approx(value, abs=0.2), key
  assert json.loads(json.dumps(one)) == one


@pytest.mark.proof
@pytest.mark.slow
def test_a_shape_compiles_once_whatever_the_objects_and_the_length(tmp_path):
  mask_clips.davis(tmp_path / "DAVIS", listed=("walk", "run"), shape=(64, 72))
  frames, labels = mask_clips.clip(shape=(64, 72), length=9)
  mask_clips.save(tmp_path / "DAVIS", "run", frames, labels)
  subject = _subject(tmp_path, 2)
  davis.nearest.clear_cache()
  forward = inference._dense_forward(subject.model, subject.mesh)
  forward.clear_cache()
  _results(subject)
  assert forward._cache_size() == 1
  # The model's cells have 8 channels, the pixels' 192.
  assert davis.nearest._cache_size() == 2


def test_a_stride_that_the_encoder_has_not_is_told(tmp_path):
  mask_clips.davis(tmp_path / "DAVIS")
  _, (fault,) = registry.run(_subject(tmp_path, stride=3))
  assert fault.startswith("davis.stride: expected one of")


def test_an_unknown_set_is_named_with_what_there_is():
  (fault,) = registry.check(tiny.config(evals=("davis/2018",), data_root="x"))
  assert "2016, 2017, youtube_vos" in fault and "'2018'" in fault


def test_pixels_follow_a_real_swan_better_than_a_mask_that_stays(shared_data):
  found = sources.mask_sequences("2016", str(shared_data))
  names = [found.record_id(i) for i in range(len(found))]
  swan = found.sequence(names.index("blackswan"))

  def extract(frames):
    grid = davis.feature_grid(swan.size, size=128, multiple=4)
    return np.asarray(davis.pixel_features(frames, grid=grid, stride=4))

  short = mask_clips.Sequence(
      [swan.frame(i) for i in range(0, 40, 4)],
      [swan.labels(i) for i in range(0, 40, 4)],
  )
  result = _run(short, {"": extract})
  assert result["davis/set/j_and_f"] > 70
  assert result["davis/set/j_and_f_copy_first"] < 50
