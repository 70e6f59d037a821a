"""The check of data sets: each fault by its name, and what is well passes."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax import check_data, convert_images
from mcjepa_jax.data.catalog import datasets, facts
from mcjepa_jax.errors import UserError
from mcjepa_jax.evals import registry
from tests.helpers import faulty_flow, layouts, tiny
from tests.helpers.repository import ROOT


@pytest.fixture
def run(tmp_path, capsys):
  """Runs the command: (exit code, its JSON, stderr)."""

  def call(*flags):
    code = check_data.main([*flags, f"--output={tmp_path / 'panels'}"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return code, json.loads(lines[-1]) if lines else None, captured.err

  return call


@pytest.mark.parametrize("fault", faulty_flow.FAULTS)
def test_a_fault_of_the_flow_is_named(run, tmp_path, fault):
  code, report, err = run(
      "--dataset=flow/sintel_clean",
      f"--root={faulty_flow.write(tmp_path, fault)}",
      "--allow-partial",
  )
  source = report["sources"]["flow/sintel_clean"]
  warp = source["warp"]
  assert (
      fault in warp["best_explanation"] and warp["pairs"] == faulty_flow.SCENES
  )
  assert (code, report["ok"], source["ok"]) == (
      (0, True, True) if fault == "as given" else (2, False, False)
  )
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  if fault == "as given":
    assert not lines and warp["error_warped"] < 0.5 * warp["error_still"]
  else:
    (line,) = lines
    assert "flow/sintel_clean: the flow seems" in line and fault in line
    assert source["faults"] == [line.partition("sintel_clean: ")[2]]


def test_frames_without_motion_or_texture_are_not_judged(run, tmp_path):
  layouts.sintel(tmp_path / "MPI-Sintel")
  code, report, err = run(
      "--dataset=flow/sintel_clean", f"--root={tmp_path}", "--allow-partial"
  )
  source = report["sources"]["flow/sintel_clean"]
  assert code == 0 and source["warp"]["best_explanation"] is None
  assert "warning: flow/sintel_clean: too little moves" in err


@pytest.mark.parametrize(
    "name", ["sintel_clean", "sintel_final", "flying_chairs", "middlebury"]
)
def test_real_pairs_pass(run, shared_data, name):
  code, report, _ = run(
      f"--dataset=flow/{name}", f"--root={shared_data}", "--allow-partial"
  )
  (source,) = report["sources"].values()
  assert code == 0 and source["decoded"] == source["count"] == 4
  assert source["warp"]["best_explanation"] == "as given"
  assert source["warp"]["error_warped"] < 0.5 * source["warp"]["error_still"]


def test_a_missing_set_is_told_with_its_path_and_its_page(run, tmp_path):
  code, report, err = run("--dataset=flow/sintel_clean", f"--root={tmp_path}")
  assert code == 2 and not report["ok"]
  assert report["sources"]["flow/sintel_clean"]["count"] is None
  assert f"{tmp_path / 'MPI-Sintel'}: not found; expected" in err
  assert "http://sintel.is.tue.mpg.de/" in err
  assert "MPI-Sintel/training/flow/SCENE/frame_NNNN.flo" in err


def test_a_missing_frame_is_named(run, tmp_path):
  frame = "MPI-Sintel/training/clean/s1/frame_0002.png"
  (faulty_flow.write(tmp_path) / frame).unlink()
  code, _, err = run("--dataset=flow/sintel_clean", f"--root={tmp_path}")
  assert code == 2 and f"{tmp_path / frame}: not found" in err


def test_fewer_than_published_is_a_fault_unless_allowed(run, tmp_path):
  flags = (
      "--dataset=flow/sintel_clean",
      f"--root={faulty_flow.write(tmp_path)}",
  )
  told = "expected 1041 examples"
  code, report, err = run(*flags)
  assert code == 2 and f"error: flow/sintel_clean: {told}" in err
  source = report["sources"]["flow/sintel_clean"]
  assert (source["count"], source["published"]) == (faulty_flow.SCENES, 1041)
  code, report, err = run(*flags, "--allow-partial")
  assert code == 0 and f"warning: flow/sintel_clean: {told}" in err
  assert told in report["sources"]["flow/sintel_clean"]["warnings"][0]


def test_more_than_published_is_a_fault(run, tmp_path, monkeypatch):
  fact = facts.Fact(faulty_flow.SCENES - 1, "https://page")
  monkeypatch.setattr(datasets, "published", lambda use: fact)
  code, _, err = run(
      "--dataset=flow/sintel_clean",
      f"--root={faulty_flow.write(tmp_path)}",
      "--allow-partial",
  )
  assert code == 2 and f"https://page says, came {faulty_flow.SCENES}" in err


def test_a_record_that_does_not_decode_is_named(run, tmp_path):
  frame = (
      faulty_flow.write(tmp_path)
      / "MPI-Sintel/training/clean/s1/frame_0002.png"
  )
  frame.write_bytes(b"no image")
  code, report, err = run(
      "--dataset=sintel_clean", f"--root={tmp_path}", "--allow-partial"
  )
  assert code == 2
  assert set(report["sources"]) == {
      "motion/sintel_clean",
      "content/sintel_clean",
      "flow/sintel_clean",
  }
  for use, source in report["sources"].items():
    assert source["decoded"] == source["count"] - 1 and not source["ok"]
    assert f"error: {use}: {frame}: expected an image" in err


def test_kitti_flow_of_8_bits_is_a_fault(run, tmp_path):
  layouts.kitti(tmp_path / "kitti/data_scene_flow")
  path = tmp_path / "kitti/data_scene_flow/training/flow_occ/000007_10.png"
  layouts.image(path, 128)
  code, _, err = run(
      "--dataset=flow/kitti_2015", f"--root={tmp_path}", "--allow-partial"
  )
  assert code == 2 and f"{path}: expected a 16-bit RGB png" in err


def test_a_shard_whose_bytes_changed_is_named(run, tmp_path):
  for i in range(6):
    tiny.save_image(tmp_path / "in" / "ab"[i % 2] / f"{i}.png", seed=i)
  convert_images.convert(
      source=tmp_path / "in", output=tmp_path / "records", shards=2
  )
  flags = ("--dataset=records", f"--root={tmp_path}")
  code, report, _ = run(*flags)
  assert code == 0 and report["sources"]["content/records"]["decoded"] == 6
  shard = tmp_path / "records" / "images-00001-of-00002.array_record"
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
  code, _, err = run(*flags)
  assert code == 2 and f"{shard}: expected the sha256" in err


def test_a_config_is_checked_as_a_whole(run, tmp_path):
  faulty_flow.write(tmp_path)
  flags = (
      f"--config={ROOT / 'configs/quickstart.py'}",
      f"--config.data_root={tmp_path}",
      "--config.motion.sources=(('sintel_clean', 1.0), ('synthetic', 1.0))",
      "--config.evals=('flow/sintel_clean', 'knn/synthetic')",
      "--samples=5",
  )
  code, report, _ = run(*flags, "--allow-partial")
  assert code == 0 and report["ok"]
  assert {u: s["decoded"] for u, s in report["sources"].items()} == {
      "motion/sintel_clean": 3,
      "motion/synthetic": 5,
      "content/synthetic": 5,
      "flow/sintel_clean": 3,
      "knn/synthetic": 5,
  }
  for source in report["sources"].values():
    assert np.asarray(Image.open(source["panel"])).std() > 5
    assert source["ok"] and not source["faults"]
  # What the mode does not train on need not be there.
  code, report, _ = run(*flags, "--config.mode=content", "--config.evals=()")
  assert code == 0 and set(report["sources"]) == {"content/synthetic"}


def test_the_sample_is_always_the_same():
  def sample(use):
    return check_data._Source(use, check_data.Settings(root="")).sample(16)

  first = sample("flow/synthetic")
  assert first == sample("flow/synthetic") != sample("motion/synthetic")
  assert len(set(first)) == 16 and max(first) >= 16


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ([], "expected either --config=FILE.py or --dataset=NAME"),
        (["--dataset=sintel_clean"], "--root: expected --root=FOLDER"),
        (["--dataset=nowhere", "--root=."], "of motion/cutouts, .*'nowhere'"),
        (["--dataset=knn/davis", "--root=."], "KIND/NAME of knn/cifar10"),
        (["--dataset=davis", "--root=none"], "--root: expected a folder"),
        (["--dataset=davis", "--root=.", "--samples=0"], "--samples: expected"),
        (["--config=C", "--root=."], "--root: expected --config.data_root"),
        (
            ["--config=C", "--config.motion.sources=('davis',)"],
            r"motion.sources: expected \(name, positive number\) .*'davis'",
        ),
        (
            ["--config=C", "--config.content.ratio=(0,1)"],
            r"content.ratio: expected \(least, most\), above 0, got \(0, 1\)",
        ),
        (
            ["--config=C", "--config.mode=nonsense"],
            "mode: expected one of .* got 'nonsense'",
        ),
        (["--config=C", "--config.evals=('flow',)"], "evals: expected flow/"),
        (
            ["--config=C", "--config.evals=('knn/nowhere',)"],
            "evals: knn: expected one of cifar10, .* got 'nowhere'",
        ),
    ],
)
def test_a_wrong_command_line_is_a_fault(run, flags, fault):
  config = str(ROOT / "configs" / "quickstart.py")
  code, _, err = run(*(flag.replace("=C", f"={config}") for flag in flags))
  assert code == 2
  assert re.search(f"error: .*{fault}", err) and "Traceback" not in err


@pytest.mark.parametrize(
    ("fault", "told"), [("as given", False), ("u and v swapped", True)]
)
def test_training_is_told_of_flow_that_does_not_fit(tmp_path, fault, told):
  cfg = tiny.config(
      evals=("flow/sintel_clean",),
      data_root=str(faulty_flow.write(tmp_path, fault)),
  )
  faults = registry.check(cfg)
  assert bool(faults) == told
  assert all(f"flow/sintel_clean: the flow seems {fault}" in f for f in faults)


def test_an_output_that_cannot_be_written_is_a_fault(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="--output: .*file/panels cannot be made"):
    check_data.check(
        ["motion/synthetic"],
        check_data.Settings(root=""),
        output=tmp_path / "file/panels",
    )


_USES = [use for dataset in datasets.DATASETS for use in dataset.reads]


def test_each_missing_set_is_told_with_a_path_and_its_page(tmp_path):
  report = check_data.check(
      _USES, check_data.Settings(root=str(tmp_path)), output=tmp_path / "panels"
  )
  for dataset in datasets.DATASETS:
    for use in dataset.reads:
      (fault,) = report["sources"][use]["faults"]
      assert fault.startswith(f"{tmp_path}/")
      assert f"is downloaded from {dataset.download} and lies as" in fault


def test_each_layout_is_found_and_counted(tmp_path):
  layouts.write(tmp_path)
  uses = [use for use in _USES if use.startswith(("motion/", "flow/"))]
  report = check_data.check(
      uses,
      check_data.Settings(root=str(tmp_path)),
      output=tmp_path / "panels",
      allow_partial=True,
  )
  assert report["ok"]
  for source in report["sources"].values():
    assert source["decoded"] == source["count"] > 0
    assert pathlib.Path(source["panel"]).is_file()


def test_evals_read_both_parts_of_a_labelled_set_and_the_test_frames():
  cfg = tiny.config(
      evals=("linear/stl10", "rankme/stl10", "knn/cifar10", "submit/sintel"),
      mode="content",
  )
  uses, _ = check_data.of_config(cfg)
  assert uses == [
      "content/synthetic",
      *("knn/stl10_train", "knn/stl10_test", "knn/cifar10"),
      *("motion/sintel_test_clean", "motion/sintel_test_final"),
  ]
  cfg.evals = ("submit/nowhere",)
  with pytest.raises(UserError, match="kitti, kitti_2012, sintel"):
    check_data.of_config(cfg)


@pytest.mark.parametrize(
    "old, new",
    [("data.check", "check_data"), ("data.convert", "convert_images")],
)
def test_a_former_name_says_the_new_one(old, new):
  run = subprocess.run(
      [sys.executable, "-m", f"mcjepa_jax.{old}", "--dataset=sintel_clean"],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert (run.returncode, run.stdout) == (2, "")
  assert run.stderr == (
      f"error: python -m mcjepa_jax.{old} is now python -m mcjepa_jax.{new}\n"
  )
