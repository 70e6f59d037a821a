"""Kills trainings at any moment and looks whether they end as if left alone.

  python -m benchmarks.kill [--kills=20] [--seed=0] [--json=PATH]

A training whose state takes a second and more to write is saved every few steps
and killed (SIGKILL to the whole process group) at times drawn over its wall
time, again and again, until its last step; then another one begins. Of each kill
the table shows what the training was at, the newest complete checkpoint, and
whether the next start went on from it. A kill counts as exact if the training
that it belongs to ends with the record ids and losses of each step, and with the
state, of one that nobody killed, bit for bit.

The last line is `exact K/N`. Exit code 1 unless K = N, every start chose the
newest complete checkpoint, and a quarter of the kills fell in a write.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags
import jax
import numpy as np
import tqdm

from benchmarks import report
from configs import quickstart
from mcjepa_jax import journal, suite, train

_KILLS = flags.DEFINE_integer("kills", 20, "How many.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the times of the kills.")
_JSON = flags.DEFINE_string("json", None, "Where to write the rows.")
_CHILD = flags.DEFINE_string("child", "", "Train in this workdir; internal.")

_STEPS = 48
# Of logs/metrics: what the clock says is of no interest.
_TIMED = re.compile(r"seconds/|feed/|step/|examples_per_second|goodput/")
_PHASE = "phase.txt"
_DIGEST = "digest.txt"
_MAX_SECONDS = 900.0  # a training that takes longer hangs
_WRITES = 0.25  # of the kills
_OFTEN = 0.5  # of the kills are aimed at a write


def _config() -> Any:
  """A small model in a state of half a gigabyte."""
  config = quickstart.get_config()
  with config.unlocked():
    config.num_steps = _STEPS
    config.model.expander.widths = (6144, 6144, 64)
    config.motion.batch_size = 2
    config.motion.start_step = 8
    config.content.batch_size = 4
    config.motion.occlusion_start = 0
    config.log_every = 1
    config.log_records = True
    config.save_every = 4
    config.eval_every = 16
    config.evals = ("flow/synthetic",)
  return config


def _train(workdir: pathlib.Path) -> None:
  """Trains, and writes what it is at and, at last, the digest of the state."""
  at = (workdir / _PHASE).open("w")

  def note(phase):
    at.seek(0)
    at.write(f"{phase:16}")
    at.flush()

  span, loop = journal.Clock.span, train.run_loop

  @contextlib.contextmanager
  def noted(clock, name):
    note(name)
    with span(clock, name):
      yield
    note("between")

  def digested(run, state):
    state = loop(run, state)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
      digest.update(np.asarray(leaf).tobytes())
    (workdir / _DIGEST).write_text(digest.hexdigest())
    return state

  journal.Clock.span, train.run_loop = noted, digested
  suite._SYNTHETIC_PAIRS, suite._TRAIN_PAIRS = 16, 16
  note("start-up")
  train.train(_config(), workdir)


class _Life:
  """One training, through as many processes as it takes."""

  def __init__(self, workdir: pathlib.Path):
    self.workdir = workdir
    self.kills: list[dict[str, Any]] = []
    workdir.mkdir()
    (workdir / _PHASE).touch()  # a process killed at once wrote none

  def start(self) -> subprocess.Popen:
    log = (self.workdir / "log.txt").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kill", f"--child={self.workdir}"],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

  def resumed(self) -> int:
    """The step at which the last process went on; 0 is the beginning."""
    found = re.search(r"Resumed at step (\d+)", self._log())
    return int(found[1]) if found else 0

  def _log(self) -> str:
    return (self.workdir / "log.txt").read_text(errors="replace")

  def folders(self) -> list[str]:
    folder = self.workdir / "checkpoints"
    return [p.name for p in folder.iterdir()] if folder.is_dir() else []

  def complete(self) -> int:
    """The newest checkpoint that has its final name; 0 if none."""
    return max((int(n) for n in self.folders() if n.isdigit()), default=0)

  def phase(self) -> str:
    """What a stopped process is at; a write goes on behind the steps."""
    writes = [n for n in self.folders() if not n.isdigit()]
    phase = (self.workdir / _PHASE).read_text().strip() or "start-up"
    return f"write, {phase}" if writes else phase

  def outcome(self) -> tuple[Any, ...]:
    """Records and losses of each step, and the digest of the state."""
    logs = [
        {k: v for k, v in line.items() if not _TIMED.match(k)}
        for line in journal.read_lines(self.workdir / "metrics.jsonl")
    ]
    records = journal.read_lines(self.workdir / "records.jsonl")
    return logs, records, (self.workdir / _DIGEST).read_text()

  def end(self, process: subprocess.Popen) -> None:
    """Waits for the end of the training; raises if it was another one."""
    try:
      code = process.wait(_MAX_SECONDS)
    finally:
      _kill_group(process)
    if code:
      raise RuntimeError(f"exit code {code}:\n{self._log()[-4000:]}")


def _kill_group(process: subprocess.Popen) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _wait_for_write(life: _Life, process: subprocess.Popen, until: float):
  while process.poll() is None and time.monotonic() < until:
    if any(not name.isdigit() for name in life.folders()):
      return
    time.sleep(0.01)


def _kill(
    life: _Life,
    process: subprocess.Popen,
    rng: np.random.Generator,
    whole: float,
) -> dict[str, Any] | None:
  """Kills the process at a time drawn; None if it ended before."""
  start = time.monotonic()
  if rng.random() < _OFTEN:
    # Anywhere in a write: from a time drawn on the next one, and into it.
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(rng.uniform(0, whole))
    _wait_for_write(life, process, start + whole)
    delay = rng.uniform(0, 2.0)
  else:
    delay = rng.uniform(0, whole)
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(delay)
  if process.poll() is not None:
    return None
  # Stopped first, so that what is read is what is killed.
  try:
    os.killpg(process.pid, signal.SIGSTOP)
    return {
        "seconds": round(time.monotonic() - start, 2),
        "phase": life.phase(),
        "complete": life.complete(),
    }
  finally:
    _kill_group(process)


def _lives(
    folder: pathlib.Path, kills: int, rng: np.random.Generator, whole: float
) -> Iterator[_Life]:
  """Trainings that were killed and went on, each at its end."""
  done, number = 0, 0
  bar = tqdm.tqdm(total=kills, unit="kill")
  while done < kills:
    life = _Life(folder / f"life_{number}")
    number += 1
    while True:
      process = life.start()
      kill = _kill(life, process, rng, whole) if done < kills else None
      if kill is None:
        life.end(process)
      if life.kills:
        last = life.kills[-1]
        # A process killed before it said so chose nothing yet.
        spoke = kill is None or life.resumed() or not last["complete"]
        if "resumed" not in last and spoke:
          last["resumed"] = life.resumed()
      if kill is None:
        break
      if life.kills and "resumed" not in life.kills[-1]:
        life.kills[-1]["resumed"] = None
      life.kills.append(kill)
      done += 1
      bar.update()
      bar.write(
          f"kill {done}: after {kill['seconds']} s, in {kill['phase']}; newest"
          f" complete checkpoint {kill['complete']}"
      )
    yield life
    shutil.rmtree(life.workdir)
  bar.close()


def main(argv: list[str]) -> None:
  """Kills, compares, prints the table and `exact K/N`."""
  del argv
  if _CHILD.value:
    _train(pathlib.Path(_CHILD.value))
    return
  rng = np.random.default_rng(_SEED.value)
  rows = []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for number in range(2):  # the second one finds the first one's programs
      alone = _Life(folder / f"alone_{number}")
      start = time.monotonic()
      alone.end(alone.start())
      whole = time.monotonic() - start
    expected = alone.outcome()
    size = sum(
        f.stat().st_size
        for f in (alone.workdir / f"checkpoints/{_STEPS}").rglob("*")
        if f.is_file()
    )
    print(f"Alone: {whole:.0f} s; a checkpoint has {size / 2**20:.0f} MiB.")
    for life in _lives(folder, _KILLS.value, rng, whole):
      exact = life.outcome() == expected
      rows += [{**kill, "exact": exact} for kill in life.kills]
  exact = sum(row["exact"] for row in rows)
  torn = sum(row["resumed"] not in (None, row["complete"]) for row in rows)
  writes = sum(row["phase"].startswith("write") for row in rows)
  meta = {
      "seed": _SEED.value,
      "steps": _STEPS,
      "seconds_alone": round(whole, 1),
      "checkpoint_mib": round(size / 2**20),
      "exact": exact,
      "torn": torn,
      "writes": writes,
      "cores": os.cpu_count(),
      "jax": jax.__version__,
  }
  print(json.dumps(meta))
  print(f"in a write {writes}/{len(rows)}, torn checkpoints chosen {torn}")
  print(f"exact {exact}/{len(rows)}", flush=True)
  failed = exact < len(rows) or torn or writes < _WRITES * len(rows)
  report.end(_JSON.value, meta, rows, failed=bool(failed))


if __name__ == "__main__":
  app.run(main)
