"""Kills a training again and again, and holds it against one left alone.

  python -m benchmarks.kill [--kills=20] [--seed=1] [--json=PATH] [--dir=FOLDER]

The training is `get_config` below: both tasks, a model of seconds to compile with
an expander so wide that a checkpoint takes a second and more to write, saved every
few steps. Two runs go through first; the second's length is what the times of the
kills are drawn from. Then runs are killed by SIGKILL, with all their processes, and
started again until each has ended, as many as it takes. Every tenth kill waits for
the next commit, which is too short to be met often by chance; every third run finds
no program compiled until it has compiled them.

A kill is exact if the next start took the newest checkpoint that was complete when
it came, the state restored from there is, bit for bit, what the undisturbed run had
at that step, and the run it belongs to ends with the losses, records and final
checkpoint of the undisturbed one. The last line is `exact K/N`; exit code 1 unless
K = N, no torn checkpoint was chosen, of those by chance a quarter fell in a write and
a write takes a second.
"""

from collections import Counter
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import tqdm

from benchmarks import report
from mcjepa_jax import errors
from mcjepa_jax.runtime import command_line

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_CHILD = "--child"
_PARTIAL = ".orbax-checkpoint-tmp"
_STATE_IS_THERE = f"*{_PARTIAL}/state*/_METADATA"
_PHASES = ("start-up", "compile", "step", "write", "commit", "evaluation")
_SPANS = {  # of the run's clock
    "initialise": "start-up",
    "compile": "compile",
    "input": "step",
    "step": "step",
    "checkpoint": "write",
    "evaluate": "evaluation",
    "pictures": "evaluation",
}
_AIMED = 10  # one kill in so many waits for a commit
_LEAST_WRITE = 1.0  # seconds
_COLD = 3  # one run in so many finds no program compiled
_LIFE = 600  # seconds after which a run that does not end is stuck
_TIMED = ("seconds/", "meta/", "feed/", "step/", "examples_per_second")


def get_config() -> Any:
  """The training that is killed: 30 steps, 0.6 GB saved at every second."""
  from tests.helpers import tiny

  return tiny.config(
      model__expander__widths=(5632, 5632, 5632),
      model__encoder__drop_path=0.5,
      motion__jitter__p=0.5,
      num_steps=30,
      save_every=2,
      keep_last=2,
      eval_every=10,
      eval_limit=200,
      evals=("knn/synthetic",),
      workers=1,
      log_every=1,
      log_records=True,
  )


def digest(state: Any, streams: Any) -> str:
  """A hash of all bits of a train state and of where its streams are."""
  import jax
  import numpy as np

  leaves = {
      jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
  }
  result = hashlib.sha256(json.dumps(streams, sort_keys=True).encode())
  for name, leaf in sorted(leaves.items()):
    result.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
    result.update(leaf.tobytes())
  return result.hexdigest()


def child(folder: pathlib.Path, all_digests: bool, argv: list[str]) -> int:
  """The command, which tells in a folder where it is and what it restores."""
  phase = os.open(folder / "phase", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

  def tell_phase(span):
    # Fixed in length and in one call: whole whenever the kill comes.
    os.pwrite(phase, _SPANS[span].ljust(16).encode(), 0)

  def tell(event):
    with (folder / "events.jsonl").open("a") as file:
      file.write(json.dumps(event) + "\n")

  tell_phase("initialise")
  from mcjepa_jax import main as training
  from mcjepa_jax.runtime import run_clock
  from mcjepa_jax.storage import checkpoint
  from mcjepa_jax.training import context

  plain_span = run_clock.Clock.span
  plain_first = context.first_state
  plain_restore = checkpoint.Checkpoints.restore
  plain_save = checkpoint.Checkpoints.save

  @contextlib.contextmanager
  def span(clock, name):
    with plain_span(clock, name):
      tell_phase(name)
      yield
    if clock._open:
      tell_phase(clock._open[-1])

  def first_state(run):
    tell({"restored": None})
    return plain_first(run)

  def restore(checkpoints, step, abstract):
    state, streams, meta = plain_restore(checkpoints, step, abstract)
    tell({"restored": step, "digest": digest(state, streams)})
    return state, streams, meta

  def save(checkpoints, step, state, streams, *rest):
    if all_digests:
      tell({"saved": step, "digest": digest(state, streams)})
    return plain_save(checkpoints, step, state, streams, *rest)

  run_clock.Clock.span = span
  context.first_state = first_state
  checkpoint.Checkpoints.restore = restore
  checkpoint.Checkpoints.save = save
  return training.main(argv)


class Life:
  """One process of a run, from its start to its end or its kill."""

  def __init__(
      self,
      workdir: pathlib.Path,
      *,
      all_digests: bool = False,
      own_cache: bool = False,
  ):
    """Starts or goes on with the run of a workdir.

    With its `own_cache` it compiles what other runs have compiled before.
    """
    self._told = workdir.with_name(f"{workdir.name}.told")
    self._told.mkdir(exist_ok=True)
    (self._told / "events.jsonl").unlink(missing_ok=True)
    self._checkpoints = workdir / "checkpoints"
    self._began = time.time()
    self.log = self._told / "log"
    cache = workdir.with_name(f"{workdir.name}.cache" if own_cache else "cache")
    arguments = (
        f"--config={__file__}",
        f"--workdir={workdir}",
        f"--config.compilation_cache={cache}",
    )
    with self.log.open("w") as log:
      self._process = subprocess.Popen(
          [sys.executable, "-m", "benchmarks.kill", _CHILD, str(self._told),
           str(int(all_digests)), *arguments],
          cwd=_ROOT, stdout=log, stderr=log, start_new_session=True,
      )  # fmt: skip

  def ends(self, seconds: float) -> bool:
    """Waits, and returns whether the run has ended by itself.

    Raises:
      UserError: it ended with a fault.
    """
    try:
      code = self._process.wait(seconds)
    except subprocess.TimeoutExpired:
      return False
    if code:
      raise errors.UserError(
          f"a run that was not killed ended with {code}: {self._last_words()}"
      )
    return True

  def commits(self) -> bool:
    """Waits for the next commit, and returns whether the run ended before it."""
    while not any(self._partial(_STATE_IS_THERE)):
      if self.ends(0.002):
        return True
      if time.time() > self._began + _LIFE:
        break
    return False

  def __enter__(self) -> "Life":
    return self

  def __exit__(self, *exception) -> None:
    if self._process.poll() is None:
      self.kill()

  def kill(self) -> str:
    """Kills all its processes; returns the phase that it was in."""
    os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    if any(self._partial(_STATE_IS_THERE)):
      return "commit"
    if any(self._partial(f"*{_PARTIAL}")):
      return "write"
    return (self._told / "phase").read_text().strip() or "start-up"

  def _partial(self, pattern: str) -> Iterator[pathlib.Path]:
    """What of this life's own is not committed; earlier ones leave such too."""
    for path in self._checkpoints.glob(pattern):
      with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ctime >= self._began:
          yield path

  def events(self, kind: str) -> list[dict[str, Any]]:
    """What it told of a kind, `saved` or `restored`."""
    path = self._told / "events.jsonl"
    text = path.read_text() if path.exists() else ""
    # The kill may have torn the last line.
    told = [json.loads(x) for x in text.split("\n")[:-1]]
    return [event for event in told if kind in event]

  def _last_words(self) -> str:
    return " | ".join(self.log.read_text().strip().splitlines()[-3:])


def complete(workdir: pathlib.Path) -> list[int]:
  """The steps whose checkpoints were committed, in order."""
  folder = workdir / "checkpoints"
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def seconds_to_write(workdir: pathlib.Path) -> float:
  """Between the start of the newest checkpoint's write and its commit."""
  newest = workdir / "checkpoints" / str(complete(workdir)[-1])
  meta = json.loads((newest / "_CHECKPOINT_METADATA").read_text())
  return (meta["commit_timestamp_nsecs"] - meta["init_timestamp_nsecs"]) / 1e9


def outcome(workdir: pathlib.Path) -> tuple[Any, ...]:
  """What a run comes to: its losses, its records, its last state's digest."""
  from tests.helpers import workdirs

  losses = [
      {
          key: value
          for key, value in line.items()
          if not key.startswith(_TIMED) and not key.endswith("seconds_per_pair")
      }
      for line in workdirs.lines(workdir / "metrics.jsonl")
  ]
  records = workdirs.lines(workdir / "records.jsonl")
  last = digest(*workdirs.saved(workdir, complete(workdir)[-1]))
  return losses, records, last


@dataclasses.dataclass
class Kill:
  """A kill, and what the next start made of it."""

  run: int
  at: float  # seconds after the start
  phase: str
  complete: list[int]  # steps on the disk that could be chosen
  aimed: bool
  restored: int | None = None
  exact: bool = False

  def settle(self, event: dict[str, Any], digests: dict[int, str]) -> None:
    """Takes in which step the next start restored, None for none."""
    self.restored = event["restored"]
    newest = self.complete[-1] if self.complete else None
    self.exact = self.restored == newest and (
        newest is None or event["digest"] == digests[newest]
    )

  @property
  def torn(self) -> bool:
    """Whether what was restored was never complete."""
    return self.restored is not None and self.restored not in self.complete

  def row(self) -> dict[str, Any]:
    """The row of the table."""
    newest = self.complete[-1] if self.complete else "none"
    return {
        "run": self.run,
        "seconds": round(self.at, 1),
        "phase": self.phase + ("*" if self.aimed else ""),
        "newest": newest,
        "restored": "none" if self.restored is None else self.restored,
        "exact": "yes" if self.exact else "NO",
    }


def undisturbed(
    workdir: pathlib.Path, *, all_digests: bool
) -> tuple[dict[int, str], float]:
  """The digest of each step that a run saves, if wanted; how long it takes."""
  began = time.monotonic()
  with Life(workdir, all_digests=all_digests) as life:
    if not life.ends(_LIFE):
      raise errors.UserError(f"a run did not end in {_LIFE} s; see {life.log}")
  digests = {e["saved"]: e["digest"] for e in life.events("saved")}
  return digests, time.monotonic() - began


def killed_run(
    workdir: pathlib.Path,
    run: int,
    draws: Iterator[tuple[float, bool]],
    made: list[Kill],
    digests: dict[int, str],
) -> Iterator[Kill]:
  """Yields the kills of a run, until it has ended, once each is settled.

  `made` gets each as it is made, and loses one that came when all was done: the
  next start finds a finished run.
  """
  unsettled: list[Kill] = []

  def settled(life):
    for event in life.events("restored")[:1]:
      for kill in unsettled:
        kill.settle(event, digests)
      yield from unsettled
      unsettled.clear()

  while True:
    at, aimed = next(draws)
    began = time.monotonic()
    with Life(workdir, own_cache=run % _COLD == 0) as life:
      if life.ends(at) or (aimed and life.commits()):
        yield from settled(life)
        del made[len(made) - len(unsettled) :]
        return
      at, phase = time.monotonic() - began, life.kill()
    if at >= _LIFE:
      raise errors.UserError(f"a run did not end in {_LIFE} s; see {life.log}")
    yield from settled(life)
    made.append(Kill(run, at, phase, complete(workdir), aimed))
    unsettled.append(made[-1])


def kills_of(
    folder: pathlib.Path, count: int, seed: int
) -> tuple[list[Kill], dict[str, Any]]:
  """The kills, each shown as it is settled, and figures of the undisturbed run."""
  digests, cold = undisturbed(folder / "alone", all_digests=True)
  expected = outcome(folder / "alone")
  # As the killed ones are, which take no digests either: they take time.
  _, length = undisturbed(folder / "again", all_digests=False)
  if outcome(folder / "again") != expected:
    raise errors.UserError(
        "two undisturbed runs of one seed differ: no kill can be judged"
    )
  write = seconds_to_write(folder / "again")
  files = [p for p in (folder / "again/checkpoints").glob("*/state/**/*")]
  size = sum(p.stat().st_size for p in files if p.is_file()) / len(
      complete(folder / "again")
  )
  tqdm.tqdm.write(
      f"Undisturbed: {cold:.0f} s, then {length:.0f} s with its programs compiled;"
      f" a checkpoint of {size / 1e9:.2f} GB takes {write:.1f} s to write."
  )
  rng, bar = random.Random(seed), tqdm.tqdm(total=count, unit="kill")
  made: list[Kill] = []

  def drawn():
    # More than kills: of some a run has ended before.
    while True:
      if len(made) < count:
        yield rng.uniform(0, length), len(made) % _AIMED == _AIMED - 1
      else:
        yield _LIFE, False

  kills: list[Kill] = []
  draws, run = drawn(), 0
  while len(kills) < count:
    run += 1
    workdir, first = folder / f"killed_{run}", len(kills)
    fault = "it ended otherwise than the undisturbed one"
    try:
      for kill in killed_run(workdir, run, draws, made, digests):
        kills.append(kill)
        report.show(kill.row(), first=len(kills) == 1, widths=(6, 12))
        bar.update()
      same = outcome(workdir) == expected
    except errors.UserError as error:
      if len(made) == first:  # it was not even killed
        raise
      same, fault = False, f"it did not go on: {error}"
      kills[first:] = made[first:]
    if not same:
      tqdm.tqdm.write(f"Run {run}: none of its kills is exact: {fault}.")
      for kill in kills[first:]:
        kill.exact = False
    for path in (workdir, *folder.glob(f"{workdir.name}.*")):
      shutil.rmtree(path, ignore_errors=True)
  bar.close()
  figures = {
      "seconds_alone": round(length, 1),
      "seconds_to_write": round(write, 2),
      "checkpoint_gb": round(size / 1e9, 3),
      "runs": run,
  }
  return kills, figures


def main(argv: list[str] | None = None) -> int:
  """The exit code; a row is printed for each kill."""
  argv = sys.argv[1:] if argv is None else argv
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the runs' as well
  failed = True

  def body():
    nonlocal failed
    arguments = command_line.split(argv, ("kills", "seed", "json", "dir"))
    flags = arguments.flags
    count = command_line.number(flags, "kills", 20, 10_000)
    seed = command_line.number(flags, "seed", 1, 2**31)
    given = [name for name in ("json", "dir") if name in flags]
    paths = dict(
        zip(
            given,
            command_line.single(flags, **dict.fromkeys(given, "PATH")),
            strict=True,
        )
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=paths.get("dir")) as folder:
      kills, figures = kills_of(pathlib.Path(folder), count, seed)
    phases = Counter(kill.phase for kill in kills)
    by_chance = [kill for kill in kills if not kill.aimed]
    writes = sum(kill.phase in ("write", "commit") for kill in by_chance)
    torn = sum(kill.torn for kill in kills)
    exact = sum(kill.exact for kill in kills)
    told = ", ".join(f"{phases[phase]} in {phase}" for phase in _PHASES)
    print(f"{told}; * waited for a commit. Torn checkpoints chosen: {torn}.")
    short = figures["seconds_to_write"] < _LEAST_WRITE
    failed = exact < count or torn > 0 or 4 * writes < len(by_chance) or short
    meta = figures | {
        "kills": count,
        "seed": seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "phases": dict(phases),
        "torn": torn,
        "exact": exact,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    report.end(paths.get("json"), meta, [k.row() for k in kills], failed=False)
    print(f"exact {exact}/{count}")

  code = command_line.guarded(body, debug="--debug" in argv)
  return code or int(failed)


if __name__ == "__main__":
  if sys.argv[1:2] == [_CHILD]:
    raise SystemExit(
        child(pathlib.Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:])
    )
  raise SystemExit(main())
