"""Bad input through the commands: lines on stderr, exit code 2, nothing lost."""

import fcntl
import json
import threading

import jax
import numpy as np
import pytest

from mcjepa_jax import errors, evaluate, main, train
from mcjepa_jax.data.readers import flow_files
from mcjepa_jax.evals.adapters import flow_adapter, image_adapter
from mcjepa_jax.storage import workdir_lock
from tests.helpers import layouts, tiny

_QUICKSTART = "--config=configs/quickstart.py"
_IMAGES = (
    "--config.content.sources=(('images', 1.0),)",
    "--config.mode=content",
)
_FRAMES = ("--config.motion.sources=(('frames', 1.0),)", "--config.mode=motion")


def _faults(capsys, *arguments) -> list[str]:
  """The lines of a command that must end with 2 and print nothing else."""
  code = main.main([str(a) for a in arguments])
  captured = capsys.readouterr()
  lines = captured.err.splitlines()
  assert code == 2
  assert captured.out == ""
  assert lines and all(line.startswith("error: ") for line in lines), lines
  return lines


def test_a_batch_that_the_devices_do_not_divide_and_a_wrong_mode(
    capsys, tmp_path
):
  lines = _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path}",
      "--config.motion.batch_size=3", "--config.evals=('flow/nowhere',)",
  )  # fmt: skip
  assert any("motion.batch_size: 3 give 6 frames" in line for line in lines)
  assert any("nowhere" in line for line in lines)


@pytest.mark.parametrize("present", [False, True])
def test_a_missing_and_an_empty_folder(capsys, tmp_path, present):
  if present:
    (tmp_path / "data" / "images").mkdir(parents=True)
  (line,) = _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path / 'w'}", *_IMAGES,
      f"--config.data_root={tmp_path / 'data'}", "--config.evals=()",
  )  # fmt: skip
  assert str(tmp_path / "data" / "images") in line


def test_a_truncated_image_is_told_before_anything_compiles(capsys, tmp_path):
  path = tiny.save_image(tmp_path / "data" / "images" / "a.png")
  path.write_bytes(path.read_bytes()[:200])
  (line,) = _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path / 'w'}", *_IMAGES,
      f"--config.data_root={tmp_path / 'data'}", "--config.evals=()",
  )  # fmt: skip
  assert "a.png" in line


def test_frames_of_unequal_size(capsys, tmp_path):
  folder = tmp_path / "data" / "frames" / "clip"
  layouts.image(folder / "0001.png", 0, size=(64, 80))
  layouts.image(folder / "0002.png", 9, size=(64, 88))
  (line,) = _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path / 'w'}", *_FRAMES,
      f"--config.data_root={tmp_path / 'data'}", "--config.evals=()",
  )  # fmt: skip
  assert "80" in line and "88" in line


def test_a_workdir_that_cannot_be_written(capsys, tmp_path):
  file = tiny.save_image(tmp_path / "file.png")
  (line,) = _faults(
      capsys, _QUICKSTART, f"--workdir={file}/w", "--config.evals=()"
  )
  assert "workdir: cannot write" in line and "file.png" in line


def test_a_workdir_in_use(capsys, tmp_path):
  with (tmp_path / ".lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    (line,) = _faults(
        capsys, _QUICKSTART, f"--workdir={tmp_path}", "--config.evals=()"
    )
  assert "another run" in line and str(tmp_path / ".lock") in line


def test_of_many_hosts_a_lock_of_one_that_died_is_waited_for(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with (tmp_path / ".lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    timer = threading.Timer(0.5, lambda: fcntl.flock(file, fcntl.LOCK_UN))
    timer.start()
    with workdir_lock.sole_owner(tmp_path):
      timer.join()
    fcntl.flock(file, fcntl.LOCK_EX)
    monkeypatch.setattr(workdir_lock, "_LEASE_SECONDS", 0.1)
    with pytest.raises(errors.UserError, match="another run is using"):
      with workdir_lock.sole_owner(tmp_path):
        pytest.fail("it is another's")


def test_a_damaged_config_of_the_run_before(capsys, tmp_path):
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "config.json").write_text('{"seed": ')
  (line,) = _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path}", "--config.evals=()"
  )
  assert "config.json" in line


def test_a_start_that_failed_does_not_bind_the_workdir(capsys, tmp_path):
  _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path}",
      "--config.optimizer.final_fraction=2.0", "--config.evals=()",
  )  # fmt: skip
  assert not (tmp_path / "config.json").exists()


def test_an_encoder_of_another_architecture_to_start_from(
    capsys, tmp_path, untrained
):
  (line,) = _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path}",
      f"--config.init_checkpoint={untrained}", "--config.evals=()",
  )  # fmt: skip
  assert "of another architecture" in line


def test_truth_that_is_cut_short_is_told_before_a_checkpoint_is_loaded(
    capsys, tmp_path, untrained
):
  data = tmp_path / "data" / "middlebury"
  for name in ("frame10.png", "frame11.png"):
    tiny.save_image(data / "other-data" / "Toy" / name)
  truth = data / "other-gt-flow" / "Toy" / "flow10.flo"
  truth.parent.mkdir(parents=True)
  flow_files.write_flo(truth, np.zeros((40, 48, 2), np.float32))
  truth.write_bytes(truth.read_bytes()[:-100])
  (line,) = _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path / 'w'}",
      "--config.task=evaluate", f"--config.checkpoint={untrained}",
      f"--config.data_root={tmp_path / 'data'}",
      "--config.evals=('flow/middlebury',)",
  )  # fmt: skip
  assert "flow10.flo" in line


def test_results_that_cannot_be_written_and_no_checkpoint(capsys, tmp_path):
  lines = _faults(
      capsys, _QUICKSTART, f"--workdir={tmp_path / 'w'}",
      "--config.task=evaluate", f"--config.checkpoint={tmp_path / 'none'}",
      f"--config.results={tmp_path}",
  )  # fmt: skip
  assert len(lines) == 2
  assert any("results: expected a file" in line for line in lines)
  assert any("none does not exist" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys\ndef get_config():\n  sys.exit(0)\n", "SystemExit"),
        ("def get_config():\n  return {}\n", "expected get_config to return"),
        (
            "from configs import quickstart\n"
            "def get_config():\n"
            "  config = quickstart.get_config()\n"
            "  with config.unlocked():\n"
            "    config.extra = 1\n"
            "    del config.seed\n"
            "  return config\n",
            "no such key extra",
        ),
    ],
)
def test_a_config_file_that_is_none(capsys, tmp_path, text, words):
  path = tmp_path / "configs" / "mine.py"
  path.parent.mkdir()
  path.write_text(text)
  lines = _faults(capsys, f"--config={path}", f"--workdir={tmp_path / 'w'}")
  assert words in lines[0]


@pytest.mark.parametrize("value", ["", "s3://bucket/run"])
def test_a_workdir_that_nothing_can_be_written_to(capsys, value):
  (line,) = _faults(capsys, _QUICKSTART, f"--workdir={value}")
  assert "workdir: expected" in line


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_evaluate_writes_flat_results_whatever_the_devices(
    monkeypatch, tmp_path, untrained, devices
):
  for adapter, name, count in (
      (flow_adapter, "_SYNTHETIC_PAIRS", 11),
      (flow_adapter, "_TRAIN_PAIRS", 8),
      (image_adapter, "_KNN_BANK", 60),
      (image_adapter, "_KNN_QUERIES", 30),
  ):
    monkeypatch.setattr(adapter, name, count)
  cfg = tiny.config(
      checkpoint=str(untrained),
      results=str(tmp_path / "out.json"),
      evals=("flow/synthetic", "knn/synthetic"),
  )
  cfg.mesh.devices = devices
  evaluate.evaluate(cfg, tmp_path)
  results = json.loads((tmp_path / "out.json").read_text())
  assert results["flow/synthetic/count"] == 11
  assert results["knn/synthetic/count"] == 30
  assert results["meta/step"] == 3
  assert results["meta/checkpoint"] == str(untrained)
  # An untrained model: the random-init rows are its own.
  assert results["flow/synthetic/epe"] == pytest.approx(
      results["flow/synthetic/epe_random_init"], rel=1e-6
  )
  rows = [
      key
      for key in results
      if key.count("/") > 2 and not key.startswith("meta/")
  ]
  assert len({key.rsplit("/", 1)[0] for key in rows}) == 11
  expected = {"config", "checkpoint", "step", "commit", "devices", "seconds"}
  assert {f"meta/{key}" for key in expected} <= set(results)


@pytest.mark.slow
def test_an_unreadable_image_is_replaced_and_named_unless_none_may_be(
    tmp_path, capsys
):
  folder = tmp_path / "data" / "images"
  for i in range(6):
    path = tiny.save_image(folder / f"{i}.png", seed=i)
  path.write_bytes(path.read_bytes()[:200])
  cfg = tiny.config(
      mode="content",
      data_root=str(tmp_path / "data"),
      content__sources=(("images", 1.0),),
      num_steps=4,
  )
  train.train(cfg, tmp_path / "w")
  (line,) = (tmp_path / "w" / "quarantine.jsonl").read_text().splitlines()
  assert json.loads(line)["record"] == "images/5.png"
  assert "5.png" in json.loads(line)["fault"]
  assert capsys.readouterr().out.count("Replaced images/5.png: ") == 1
  (last,) = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()[-1:]
  assert json.loads(last)["quarantined/content"] == 1
  cfg.bad_records = 0.0
  with pytest.raises(errors.UserError, match="bad_records.*got 1 of"):
    train.train(cfg, tmp_path / "w2")
