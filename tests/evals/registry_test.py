"""The evals by name: which run, which are told, and on how many devices."""

import dataclasses
import json
import pathlib
import re
import shutil

import cv2
import numpy as np
import pytest

from mcjepa_jax import errors, evaluate, loading
from mcjepa_jax.data import sources
from mcjepa_jax.data.readers import flow_files
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import eval_subject, inference, registry, result_table
from mcjepa_jax.evals.adapters import flow_adapter, image_adapter
from mcjepa_jax.models import mcjepa
from mcjepa_jax.training import build
from tests.helpers import layouts, mask_clips, segmentation_runs, tiny


@pytest.fixture
def small(monkeypatch):
  """Procedural sets of a few examples."""
  for adapter, name, count in (
      (flow_adapter, "_SYNTHETIC_PAIRS", 7),
      (flow_adapter, "_TRAIN_PAIRS", 4),
      (image_adapter, "_KNN_BANK", 60),
      (image_adapter, "_KNN_QUERIES", 30),
  ):
    monkeypatch.setattr(adapter, name, count)


def _no_load(monkeypatch):
  """What `evaluate` asks to load, which ends it."""
  asked = []

  def stop(path, **_):
    asked.append(path)
    raise errors.UserError("loaded")

  monkeypatch.setattr(loading, "load", stop)
  return asked


def test_evals_that_cannot_run_are_told_before_anything_is_loaded(
    monkeypatch, capsys, small, tmp_path, untrained
):
  asked = _no_load(monkeypatch)
  cfg = tiny.config(
      checkpoint=str(untrained),
      data_root=str(tmp_path),
      evals=("flow/middlebury", "knn/synthetic", "linear/stl10"),
  )
  with pytest.raises(errors.UserError, match="loaded"):
    evaluate.evaluate(cfg, tmp_path / "w")
  out = capsys.readouterr().out.splitlines()
  assert [line.split(":")[0] for line in out] == [
      "flow/middlebury cannot run",
      "linear/stl10 cannot run",
  ]
  assert len(asked) == 1
  # With nothing left to run, or with a mistake, all is an error at once.
  for evals, words in (
      (("flow/middlebury", "linear/stl10"), ("other-gt-flow", "stl10_binary")),
      (("flow/middlebury", "knn/synthetic", "speed/x"), ("speed/x",)),
      (("flow/nowhere", "knn/synthetic"), ("'nowhere'",)),
      (("knn/nowhere", "knn/synthetic"), ("'nowhere'", "imagenet_tfds")),
  ):
    cfg.evals = evals
    with pytest.raises(errors.UserError) as caught:
      evaluate.evaluate(cfg, tmp_path / "w")
    for word in words:
      assert word in str(caught.value)
  assert len(asked) == 1


@pytest.mark.slow
def test_what_can_run_is_written_and_the_rest_is_an_error_at_the_end(
    capsys, small, tmp_path, untrained
):
  cfg = tiny.config(
      checkpoint=str(untrained),
      data_root=str(tmp_path),
      evals=("flow/middlebury", "rankme/synthetic"),
  )
  with pytest.raises(errors.UserError, match="middlebury") as caught:
    evaluate.evaluate(cfg, tmp_path)
  assert len(caught.value.messages) == 1
  results = json.loads((tmp_path / "evaluation.json").read_text())
  assert results["rankme/synthetic/rank"] > 1
  assert results["meta/seconds/rankme/synthetic"] > 0
  assert not [key for key in results if "middlebury" in key]


@pytest.mark.slow
def test_a_checkpoint_that_does_not_describe_its_model_is_refused(
    tmp_path, untrained
):
  shutil.copytree(untrained, tmp_path / "w")
  path = tmp_path / "w" / "checkpoints" / "3" / "meta" / "metadata"
  meta = json.loads(path.read_text())
  del meta["model"]["encoder"]
  path.write_text(json.dumps(meta))
  cfg = tiny.config(checkpoint=str(tmp_path / "w"), evals=("rankme/synthetic",))
  with pytest.raises(errors.UserError, match="expected the model and the seed"):
    evaluate.evaluate(cfg, tmp_path)


def _subject(cfg, *, devices=1):
  model = build.model(cfg)
  params, initial = (
      sharding.call_once(lambda seed=seed: mcjepa.init_params(model, seed))
      for seed in (1, 0)
  )
  return eval_subject.Subject(
      *(cfg, model, params, initial, sharding.make_mesh(devices)),
      workdir=pathlib.Path("unused"),
  )


def test_an_eval_that_ends_in_a_fault_leaves_the_others_their_results(
    monkeypatch,
):
  def broken(subject, name):
    raise errors.UserError(f"{name}/frame_7.png: damaged", "and more")

  def fine(subject, name):
    return {f"fine/{name}/metric": 1.0}

  monkeypatch.setattr(
      registry,
      "_EVALS",
      {
          "broken": registry.Eval(None, broken, between_steps=True),
          "fine": registry.Eval(None, fine, between_steps=True),
          "slow": registry.Eval(None, fine),
      },
  )
  cfg = tiny.config(evals=("broken/a", "fine/b", "slow/c"))
  mesh = sharding.make_mesh(1)
  subject = eval_subject.Subject(
      cfg, build.model(cfg), None, None, mesh, pathlib.Path("unused")
  )
  results, faults = registry.run(subject)
  assert faults == ["a/frame_7.png: damaged", "and more"]
  assert set(results) == {
      "fine/b/metric", "meta/seconds/fine/b",
      "fine/c/metric", "meta/seconds/slow/c",
  }  # fmt: skip
  results, _ = registry.run(subject, between_steps=True)
  assert set(results) == {"fine/b/metric", "meta/seconds/fine/b"}
  results, faults = registry.run(subject, ("fine/x",))
  assert "fine/x/metric" in results and not faults


def test_the_best_metric_must_be_of_an_eval_between_steps(small):
  cfg = tiny.config(
      evals=("linear/synthetic",), keep_best=1,
      best_metric="linear/synthetic/top1",
  )  # fmt: skip
  assert any("best_metric" in fault for fault in registry.check(cfg))
  cfg.update(evals=("knn/synthetic",), best_metric="knn/synthetic/top1")
  assert not registry.check(cfg)


def test_a_limit_spreads_over_the_set():
  few = sources.evenly_spaced([{"label": 10 * i} for i in range(10)], 4)
  assert [few[i]["label"] for i in range(len(few))] == [0, 30, 60, 90]
  every = list(range(5))
  for limit in (0, 5, 9):
    assert sources.evenly_spaced(every, limit) is every


@pytest.mark.proof
@pytest.mark.slow
def test_numbers_are_equal_on_1_and_on_4_devices(small):
  cfg = tiny.config(
      evals=(
          *("flow/synthetic", "knn/synthetic"),
          *("linear/synthetic", "rankme/synthetic"),
      )
  )
  cfg.linear.epochs = 3
  cfg.eval_batch_size = 4
  one, four = (
      registry.run(_subject(cfg, devices=devices))[0] for devices in (1, 4)
  )
  assert one.keys() == four.keys()
  assert one["flow/synthetic/count"] == 7  # batches of 4 and 3
  rank = one["rankme/synthetic/rank"]
  assert rank != one["rankme/synthetic/rank_random_init"]
  for key, value in one.items():
    if "seconds" not in key:
      # Noise through norms over few channels magnifies rounding.
      np.testing.assert_allclose(four[key], value, rtol=5e-3, err_msg=key)


def _pairs(root):
  folder = root / "pairs"
  folder.mkdir()
  layouts.image(folder / "a_img1.png", 0)
  layouts.image(folder / "a_img2.png", 1)
  height, width = cv2.imread(str(folder / "a_img1.png")).shape[:2]
  flow_files.write_flo(
      folder / "a_flow.flo", np.ones((height, width, 2), np.float32)
  )


_KINDS = {
    # How its set is written, a result that has an untrained twin, and the bars
    # that it shows: what each is of, how many, and of what.
    "flow/pairs": (_pairs, "epe", ("flow/pairs: .*/1 ",)),
    "knn/synthetic": (None, "top1", ("features/synthetic: .*/30 ",)),
    "linear/synthetic": (None, "top1", ("linear/synthetic.*/1 ",)),
    "finetune/synthetic": (
        None,
        "top1",
        ("finetune/synthetic: ", "finetune/synthetic random_init: "),
    ),
    "rankme/synthetic": (None, "rank", ("features/synthetic: .*/60 ",)),
    "segmentation/camvid_val": (
        segmentation_runs.camvid,
        "miou",
        (
            "segmentation/camvid_val: .*/3 .*step",
            "segmentation/camvid_val: .*/3 .*image",
        ),
    ),
    "upernet/camvid_val": (
        segmentation_runs.camvid,
        "miou",
        (
            "upernet/camvid_val: .*/3 .*step",
            "upernet/camvid_val: .*/3 .*image",
            "upernet/camvid_val random_init: .*/3 .*step",
            "upernet/camvid_val random_init: .*/3 .*image",
        ),
    ),
    "davis/2017": (
        lambda root: mask_clips.davis(root / "DAVIS", length=4),
        "j_and_f",
        ("davis/2017: .*/4 .*frame",),
    ),
    "submit/kitti_2012": (
        layouts.whole_kitti_2012_test,
        None,  # the trained model alone is submitted
        ("submit/kitti_2012: .*/195 ",),
    ),
}


_PROOF = (pytest.mark.slow, pytest.mark.proof)
_SLOW = ("finetune/synthetic", "segmentation/camvid_val", "upernet/camvid_val")


@pytest.mark.parametrize(
    "entry",
    [pytest.param(x, marks=_PROOF if x in _SLOW else []) for x in _KINDS],
)
def test_every_kind_shows_its_progress_and_has_its_untrained_twin(
    small, capsys, tmp_path, entry
):
  write, metric, bars = _KINDS[entry]
  if write:
    write(tmp_path)
  cfg = segmentation_runs.config(
      tmp_path, evals=(entry,), workers=0, eval_batch_size=65
  )
  cfg.linear.epochs = cfg.finetune.epochs = 1
  cfg.davis.update(size=32, radius=3)
  assert registry.check(cfg) == []
  results, faults = registry.run(
      dataclasses.replace(_subject(cfg), workdir=tmp_path)
  )
  assert not faults
  if metric:
    assert results[f"{entry}/{metric}"] >= 0
    assert results[f"{entry}/{metric}_random_init"] >= 0
  shown = capsys.readouterr().err.split("\r")
  for bar in bars:
    assert any(re.match(bar, each) for each in shown), bar


def test_no_kind_is_left_out():
  assert {entry.partition("/")[0] for entry in _KINDS} == set(registry._EVALS)


def test_flow_compiles_once_for_a_size_whatever_the_last_batch(small):
  cfg = tiny.config(evals=("flow/synthetic",), eval_batch_size=4)
  subject = _subject(cfg)
  forward = inference._flow_forward(subject.model, subject.mesh)
  forward.clear_cache()
  results, _ = registry.run(subject)
  assert results["flow/synthetic/count"] == 7  # batches of 4 and 3
  assert forward._cache_size() == 1


def test_labelled_sets_are_split_as_they_are_published_or_by_fifths(tmp_path):
  folder = tmp_path / "imagenet"
  for split, count in (("train", 3), ("val", 1)):
    for name in ("n01", "n02"):
      for i in range(count):
        tiny.save_image(folder / split / name / f"{i}.jpeg", (8, 8), i)
  options = dict(seed=0, eval_seed=1, size=8, counts=(4, 2))
  train, test = sources.labelled_split("imagenet", str(tmp_path), **options)
  assert (len(train), len(test)) == (6, 2)
  assert test.record_id(0) == "n01/0.jpeg"
  train, test = sources.labelled_split(
      "imagenet_train", str(tmp_path), **options
  )
  assert [test.record_id(i) for i in range(2)] == ["n01/0.jpeg", "n02/2.jpeg"]
  assert len(train) == 4 and train.classes == ["n01", "n02"]
  tiny.save_image(folder / "val" / "n03" / "0.jpeg", (8, 8))
  with pytest.raises(errors.UserError, match="same classes.*n03"):
    sources.labelled_split("imagenet", str(tmp_path), **options)
  train, test = sources.labelled_split(
      "synthetic", "", **options | dict(size=16)
  )
  assert (len(train), len(test)) == (4, 2)
  assert set(map(train.record_id, range(4))).isdisjoint(
      map(test.record_id, range(2))
  )


def test_the_table_leaves_out_single_examples_and_silent_alarms():
  lines = result_table.table(
      {
          "flow/middlebury/epe": 1.5,
          "flow/middlebury/Urban2/epe": 3.0,
          "alarm/rollback": 0,
          "alarm/zero_flow": 2,
          "seconds/install": 0.0,
          "meta/config": "quickstart",
      }
  ).splitlines()
  assert [line.split() for line in lines] == [
      ["flow/middlebury/epe", "1.500"],
      ["alarm/zero_flow", "2"],
      ["seconds/install", "0.000"],
      ["meta/config", "quickstart"],
  ]


def test_an_unknown_eval_is_named_with_what_there_is():
  cfg = tiny.config(evals=("flow/nowhere", "speed", "knn/cifar10"))
  faults = "\n".join(registry.check(cfg))
  assert "'nowhere'" in faults and "synthetic" in faults
  assert "'speed'" in faults
  assert "data_root" in faults
