"""Seconds of each eval of a config, and where they go.

  python -m benchmarks.evals --config=FILE.py [--config.KEY=VALUE ...] \
    [--checkpoint=PATH] [--json=PATH]

Runs the evals one after the other as an evaluation does, of a checkpoint or of
untrained parameters. 50 times a second a thread looks where the evaluation is:
`compile` is tracing and compiling, `decode` reading and resizing of examples, or
waiting for them, `device` a forward pass, a training step or waiting for one,
`metric` all else. The peak of memory is the eval's own, its workers included,
where /proc/self/clear_refs resets it.
"""

from collections import Counter
from collections.abc import Iterator
import contextlib
import os
import pathlib
import platform
import sys
import tempfile
import threading
from types import FrameType
from typing import Any

from benchmarks import report
from mcjepa_jax import errors
from mcjepa_jax.runtime import command_line, config_files

_PARTS = ("compile", "decode", "device", "metric")
_INTERVAL = 0.02  # seconds
_COMPILING = (
    "jax/_src/compiler.py",
    "jax/_src/interpreters/mlir.py",
    "jax/_src/interpreters/partial_eval.py",
)


def part_of(frame: FrameType | None) -> str:
  """What a thread does whose innermost frame this is, one of `_PARTS`."""
  files = []
  while frame:
    files.append(frame.f_code.co_filename)
    frame = frame.f_back
  if any(file.endswith(_COMPILING) for file in files):
    return "compile"
  for file in files:
    if "/mcjepa_jax/data/" in file or file.endswith("/storage/paths.py"):
      return "decode"
    if "/jax/_src/" in file:
      return "device"
  return "metric"


@contextlib.contextmanager
def waiting_shown() -> Iterator[None]:
  """Lets np.asarray wait for a jax.Array in Python, where it can be seen."""
  import jax
  import numpy as np

  asarray = np.asarray

  def waiting(x, *args, **kwargs):
    if isinstance(x, jax.Array):
      jax.block_until_ready(x)
    return asarray(x, *args, **kwargs)

  np.asarray = waiting
  try:
    yield
  finally:
    np.asarray = asarray


@contextlib.contextmanager
def looked_at(counts: Counter[str]) -> Iterator[None]:
  """Counts how often this thread is found in each part."""
  ident, stop = threading.get_ident(), threading.Event()

  def look():
    while not stop.wait(_INTERVAL):
      counts[part_of(sys._current_frames().get(ident))] += 1

  thread = threading.Thread(target=look, daemon=True)
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()


def _subject(config: Any, checkpoint: str, workdir: pathlib.Path) -> Any:
  """What is evaluated: a checkpoint beside untrained parameters, or these alone."""
  from mcjepa_jax import loading
  from mcjepa_jax.distributed import sharding
  from mcjepa_jax.evals import eval_subject
  from mcjepa_jax.models import mcjepa
  from mcjepa_jax.training import build

  mesh = build.mesh(config)
  model, params = build.model(config), None
  if checkpoint:
    path = pathlib.Path(checkpoint).expanduser()
    model, params, meta = loading.load(path, mesh=mesh)
    with config.unlocked():
      config.seed = meta["seed"]
  initial = sharding.call_once(lambda: mcjepa.init_params(model, config.seed))
  if params is None:
    params = initial
  return eval_subject.Subject(config, model, params, initial, mesh, workdir)


def _measured(subject: Any, entry: str) -> dict[str, float | str]:
  """The row of an eval."""
  from mcjepa_jax.evals import registry
  from mcjepa_jax.runtime import process_memory

  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  counts: Counter[str] = Counter()
  with waiting_shown(), looked_at(counts):
    results, faults = registry.run(subject, [entry])
  if faults:
    raise errors.UserError(*faults)
  return {
      "eval": entry,
      "seconds": round(results[f"meta/seconds/{entry}"], 1),
      **{part: round(100 * counts[part] / counts.total()) for part in _PARTS},
      "peak_gb": round(process_memory.peak_rss_gb(), 2),
  }


def main(argv: list[str] | None = None) -> int:
  """The exit code; the table is printed, a row as each eval ends."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    arguments = command_line.split(argv, ("config", "checkpoint", "json"))
    given = [name for name in ("checkpoint", "json") if name in arguments.flags]
    file, *paths = command_line.single(
        arguments.flags, config="FILE.py", **dict.fromkeys(given, "PATH")
    )
    paths = dict(zip(given, paths, strict=True))
    checkpoint = paths.get("checkpoint", "")
    config = config_files.load_config(file, arguments.overrides)
    command_line.set_up_jax(config.compilation_cache)
    from mcjepa_jax.evals import registry
    from mcjepa_jax.runtime import environment

    if faults := registry.check(config):
      raise errors.UserError(*faults)
    rows = []
    with tempfile.TemporaryDirectory() as workdir:
      subject = _subject(config, checkpoint, pathlib.Path(workdir))
      for entry in config.evals:
        rows.append(row := _measured(subject, entry))
        report.show(row, first=len(rows) == 1, widths=(24, 9))
    meta = {
        "config": config.name,
        "checkpoint": bool(checkpoint),
        "devices": environment.describe_devices(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    report.end(paths.get("json"), meta, rows, failed=False)

  return command_line.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
