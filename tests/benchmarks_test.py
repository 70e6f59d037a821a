"""The benchmark of evals knows what it looks at, and ends as commands do."""

import collections
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import evals


@pytest.mark.parametrize(
    "files, part",
    [
        (("jax/_src/api.py", "mcjepa_jax/data/files.py"), "decode"),
        (("mcjepa_jax/data/sources.py", "numpy/core.py"), "decode"),
        (("mcjepa_jax/inference.py", "jax/_src/array.py"), "device"),
        (("mcjepa_jax/evals/masks.py", "cv2/__init__.py"), "metric"),
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
  counts, x = collections.Counter(), jnp.ones((1500, 1500))
  wait = jax.jit(lambda x: jnp.linalg.svd(x)[1]).lower(x).compile()
  with evals.waiting_shown(), evals.looked_at(counts):
    np.asarray(wait(x))
  assert counts["device"] > 0.9 * counts.total() > 2


@pytest.mark.slow
def test_the_table_has_a_row_for_each_eval(tmp_path, capsys):
  path = tmp_path / "rows.json"
  arguments = (
      "--config=configs/quickstart.py",
      "--config.evals=('knn/synthetic',)",
      "--config.compilation_cache=",
      f"--json={path}",
  )
  assert evals.main(list(arguments)) == 0
  header, row = capsys.readouterr().out.strip().splitlines()[-2:]
  assert header.split()[0] == "eval" and row.split()[0] == "knn/synthetic"
  assert 98 <= sum(map(int, row.split()[2:6])) <= 102  # percent, rounded
  assert path.exists()


def test_an_eval_that_cannot_run_is_told(capsys):
  arguments = ["--config=configs/quickstart.py", "--config.evals=('knn/x',)"]
  assert evals.main(arguments) == 2
  assert "error: " in capsys.readouterr().err
