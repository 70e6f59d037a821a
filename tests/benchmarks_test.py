"""The benchmarks of evals and input: what they look at, and how they end."""

import collections
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import evals, seeds
from tests.helpers.repository import ROOT


@pytest.mark.parametrize(
    "files, part",
    [
        (("jax/_src/api.py", "mcjepa_jax/storage/paths.py"), "decode"),
        (("mcjepa_jax/data/sources.py", "numpy/core.py"), "decode"),
        (("mcjepa_jax/evals/inference.py", "jax/_src/array.py"), "device"),
        (("mcjepa_jax/evals/mask_metrics.py", "cv2/__init__.py"), "metric"),
        (("jax/_src/interpreters/mlir.py", "jax/_src/pjit.py"), "compile"),
    ],
)
def test_a_stack_belongs_to_a_part(files, part):
  """`files` are those of a stack, from outside in."""
  text, call = "def run(call):\n  return call()", None
  for file in reversed(files):
    names = {}
    exec(compile(text, f"/site-packages/{file}", "exec"), names)
    inner = call or (lambda: evals.part_of(sys._getframe()))
    call = functools.partial(names["run"], inner)
  assert call() == part


def test_tracing_is_compiling():
  seen = []

  def function(x):
    seen.append(evals.part_of(sys._getframe()))
    return x

  jax.jit(function)(jnp.zeros(2))
  assert seen == ["compile"]


def test_waiting_for_an_array_is_the_devices():
  counts, x = collections.Counter(), jnp.ones((700, 700))
  wait = jax.jit(lambda x: jnp.linalg.svd(x)[1]).lower(x).compile()
  with evals.waiting_shown(), evals.looked_at(counts):
    for _ in range(100):  # however fast the machine is
      np.asarray(wait(x))
      if counts.total() > 2:
        break
  assert counts["device"] > 0.9 * counts.total() > 2


@pytest.mark.slow
def test_the_table_has_a_row_for_each_eval(tmp_path, capsys):
  path = tmp_path / "rows.json"
  arguments = (
      "--config=configs/quickstart.py",
      "--config.evals=('knn/synthetic',)",
      "--config.compilation_cache=",
      "--config.mesh.devices=1",
      "--config.model.encoder.depths=(1,1,1)",
      "--config.model.encoder.dims=(8,8,16)",
      f"--json={path}",
  )
  assert evals.main(list(arguments)) == 0
  header, row = capsys.readouterr().out.strip().splitlines()[-2:]
  assert header.split()[0] == "eval" and row.split()[0] == "knn/synthetic"
  assert 98 <= sum(map(int, row.split()[2:6])) <= 102  # percent, rounded
  assert path.exists()


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.evals=('knn/x',)", "got 'x'"),
        ("--checkpoint", "--checkpoint: expected --checkpoint=PATH"),
        ("--json", "--json: expected --json=PATH, got nothing"),
    ],
)
def test_what_cannot_run_is_told(argument, words, capsys):
  assert evals.main(["--config=configs/quickstart.py", argument]) == 2
  assert words in capsys.readouterr().err


def _input(*flags):
  return subprocess.run(
      [sys.executable, "-m", "benchmarks.input", *flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )


@pytest.mark.slow
def test_the_benchmark_of_input_writes_rows_and_fails_where_a_target_is_missed(
    tmp_path,
):
  path = tmp_path / "rows.json"
  run = _input(f"--json={path}", "--only=pairs_chairs", "--repeats=1")
  written = json.loads(path.read_text())
  rate, cpu = written["rows"]
  assert (rate["name"], rate["target"]) == ("pairs_chairs", 0.8)
  assert (cpu["name"], cpu["target"]) == ("pairs_chairs_worker_cpu", None)
  for row in written["rows"]:
    assert row.keys() == {
        *("name", "shape", "ours", "reference", "reference_name", "unit"),
        *("ratio", "target", "passed"),
    }
    assert row["ratio"] == row["ours"] / row["reference"] > 0
  # On a busy machine it may.
  assert rate["passed"] == (rate["ratio"] >= 0.8) and cpu["passed"]
  assert run.returncode == (0 if rate["passed"] else 1), run.stderr
  run = _input("--only=pairs_nowhere")
  assert run.returncode and "--only: expected a part of" in run.stderr


def test_seeds_have_one_table_with_their_spread_and_what_is_simpler(
    tmp_path, capsys
):
  flow = {
      f"flow/{name}/{metric}": value
      for name, epe, count in (("a", 1.0, 4), ("b", 4.0, 2))
      for metric, value in {
          "epe": epe,
          "count": count,
          **{f"epe_{end}": 2 * epe for end in (
              "random_init", "zero", "pair_constant", "farneback", "dis")},
      }.items()
  }  # fmt: skip
  content = {
      "knn/c/top1": 40.0,
      "knn/c/top1_random_init": 20.0,
      "knn/c/top1_pixels": 30.0,
      "davis/d/j_and_f": 50.0,
      "davis/d/j_and_f_random_init": 40.0,
      "davis/d/j_and_f_copy_first": 60.0,
  }
  runs = []
  for seed, more in enumerate((0.0, 2.0)):
    run = flow | content | {"flow/a/epe": 1 + more, "knn/c/top1": 40 + more}
    runs.append(tmp_path / f"{seed}.json")
    runs[-1].write_text(json.dumps(run))
  assert seeds.main([str(run) for run in runs]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].startswith("| flow/a | 2.00 ± 1.41 | 2.00 | 2.00 |")
  # (4 * 1 + 2 * 4) / 6 and (4 * 3 + 2 * 4) / 6.
  assert lines[4].startswith("| all pairs | 2.67 ± 0.94 | 4.00 |")
  assert lines[-2:] == [
      "| knn/c/top1 | 41.00 ± 1.41 | 20.00 | 30.00 |  |",
      "| davis/d/j_and_f | 50.00 | 40.00 |  | 60.00 |",
  ]
  assert seeds.main([str(runs[0])]) == 2
