"""Trains the quickstart in health and in sickness: which alarms does each fire?

  python -m benchmarks.alarms [--only=NAME,NAME] [--json=PATH]

Three healthy seeds of configs/quickstart.py, whole, and trainings that go wrong in
one way each, long enough to be judged. All rules are on and have the thresholds of
configs/default.py. Exit code 1 if a healthy one fires anything, or a sick one not
all that it should.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

from absl import flags as absl_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX reads it

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import report  # noqa: E402
from configs import quickstart  # noqa: E402
from mcjepa_jax import errors, train  # noqa: E402
from mcjepa_jax.ops import occlusion  # noqa: E402
from mcjepa_jax.runtime import command_line  # noqa: E402

_STEPS = 300  # of a sick run: the warm-up and three diagnoses


@dataclasses.dataclass(frozen=True)
class Run:
  """A training, and the alarms that it has to fire."""

  fires: frozenset[str] = frozenset()
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  broken: Callable[[], contextlib.AbstractContextManager] = (
      contextlib.nullcontext
  )


def _all_levels(kind: str, weight: float) -> dict[str, float]:
  return {
      f"motion.terms.{kind}.stride_{stride}": weight
      for stride in (4, 8, 16, 32)
  }


@contextlib.contextmanager
def _hides_everything():
  """A range map that nothing arrives in."""
  plain = occlusion.visible_range_map
  occlusion.visible_range_map = lambda flow: jnp.zeros_like(flow[..., :1])
  try:
    yield
  finally:
    occlusion.visible_range_map = plain


RUNS = {
    **{f"seed {seed}": Run(changes={"seed": seed}) for seed in range(3)},
    "no variance": Run(
        frozenset({"embedding_std"}), {"content.terms.variance": 0.0}
    ),
    # Not to zero: what all pixels share costs no smoothness, and explains a part.
    "smoothness x1e4": Run(
        frozenset({"constant_flow"}), {"motion.terms.smoothness.stride_1": 2e4}
    ),
    "flow held at zero": Run(
        frozenset({"zero_flow", "constant_flow", "photometric"}),
        {"model.estimator.max_flow": 1e-3},
    ),
    "mask hides all": Run(
        frozenset({"occluded"}),
        {"motion.occlusion_start": 0},
        _hides_everything,
    ),
    "features forget": Run(
        frozenset({"feature_std"}),
        _all_levels("regression", 1e3)
        | _all_levels("variance", 0.0)
        | _all_levels("covariance", 0.0),
    ),
    "motion weighs nothing": Run(
        frozenset({"gradient_share"}), {"motion.weight": 1e-8}
    ),
}


def train_once(run: Run, workdir: pathlib.Path) -> set[str]:
  """The names of the alarms that a training fires."""
  config = quickstart.get_config()
  config.evals = ()
  config.alarms.diagnose_every = 50
  if run.fires:
    config.num_steps = _STEPS
  config.update_from_flattened_dict(run.changes)
  with run.broken():
    results = train.train(config.lock(), workdir)
  jax.clear_caches()
  return {
      name.removeprefix("alarm/")
      for name, count in results.items()
      if name.startswith("alarm/") and count
  }


def main(argv: list[str] | None = None) -> int:
  """The exit code; a row is printed for each training."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    flags = command_line.split(argv, ("only", "json")).flags
    wanted = list(RUNS)
    if "only" in flags:
      wanted = command_line.single(flags, only="NAME,NAME")[0].split(",")
      unknown = sorted(set(wanted) - set(RUNS))
      if unknown:
        raise errors.UserError(
            f"--only: expected some of {', '.join(RUNS)}; got {unknown[0]!r}"
        )
    path = (
        command_line.single(flags, json="PATH")[0] if "json" in flags else None
    )
    absl_flags.FLAGS.mark_as_parsed()  # Grain's workers read them
    rows, failed = [], False
    for name in wanted:
      run, began = RUNS[name], time.monotonic()
      with tempfile.TemporaryDirectory() as folder:
        fired = train_once(run, pathlib.Path(folder, "run"))
      passed = run.fires <= fired if run.fires else not fired
      failed |= not passed
      rows.append(
          {
              "run": name,
              "fired": " ".join(sorted(fired)) or "none",
              "expected": " ".join(sorted(run.fires)) or "none",
              "passed": "yes" if passed else "NO",
              "seconds": round(time.monotonic() - began),
          }
      )
      report.show(rows[-1], first=len(rows) == 1, widths=(24, 40))
    report.end(
        path,
        {"cores": os.cpu_count(), "jax": jax.__version__},
        rows,
        failed=failed,
    )

  return command_line.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
