"""What a run writes down: JSON lines, TensorBoard, where its time went."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import errno
import itertools
import json
import math
import os
import pathlib
import resource
import socket
import struct
import sys
import time
from typing import Any

from jaxtyping import UInt8
import numpy as np
import psutil

from mcjepa_jax import errors
from mcjepa_jax.runtime import visualize

_FEW_RECORDS = 1_000
_NAMED = 10  # bad records in an error
_files = itertools.count()  # of TensorBoard, by this process


class Clock:
  """Seconds of the wall clock by what they were spent on.

  Nested spans count for the inner one alone, so that all spans and `other`
  add up to the time since `started`, and what `add` brought.
  """

  def __init__(self, started: float | None = None):
    self.started = time.perf_counter() if started is None else started
    self._seconds: dict[str, float] = {}
    self._open: list[str] = []
    self._mark = self.started
    self._earlier = 0.0

  def _turn(self) -> None:
    now = time.perf_counter()
    name = self._open[-1] if self._open else "other"
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
    self._mark = now

  @contextlib.contextmanager
  def span(self, name: str) -> Iterator[None]:
    """Counts the time inside for `name`."""
    self._turn()
    self._open.append(name)
    try:
      yield
    finally:
      self._turn()
      self._open.pop()

  def add(self, seconds: Mapping[str, float]) -> None:
    """Counts what `seconds` said in an earlier session of the run."""
    parts = dict(seconds)
    self._earlier += parts.pop("total", 0.0)
    for name, value in parts.items():
      self._seconds[name] = self._seconds.get(name, 0.0) + value

  def lose(self, since: Mapping[str, float]) -> None:
    """Counts the steps and the input after `since` as lost."""
    self._turn()
    for name in ("step", "input"):
      spent = self._seconds.get(name, 0.0) - since.get(name, 0.0)
      self._seconds[name] = since.get(name, 0.0)
      self._seconds["lost"] = self._seconds.get("lost", 0.0) + spent

  def seconds(self) -> dict[str, float]:
    """Seconds so far by name, `other` and their sum `total` included."""
    self._turn()
    total = self._earlier + self._mark - self.started
    return self._seconds | {"total": total}


def process_start() -> float:
  """When this process began, on the scale of time.perf_counter.

  A script that becomes this process by `exec` says in MCJEPA_STARTED when, in
  seconds since 1970: what it did before is not counted.
  """
  began = max(
      psutil.Process().create_time(),
      float(os.environ.get("MCJEPA_STARTED") or 0),
  )
  return time.perf_counter() - (time.time() - began)


def peak_rss_gb() -> float:
  """Peak resident memory of this process and its live children, in GB.

  A sum of each one's own peak: no less than the tree ever held at once. Where
  there is no /proc it is of this process alone.
  """
  this = psutil.Process()
  total = 0
  for process in (this, *this.children(recursive=True)):
    try:
      status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
      continue  # it ended meanwhile, or there is no /proc
    for line in status.splitlines():
      if line.startswith("VmHWM:"):
        total += 1024 * int(line.split()[1])
  return total / 1e9 or own_peak_rss_gb()


def own_peak_rss_gb() -> float:
  """Peak resident memory of this process, in GB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts in KiB, macOS in bytes.
  return peak * (1024 if sys.platform == "linux" else 1) / 1e9


def save_picture(
    workdir: pathlib.Path, name: str, image: UInt8[np.ndarray, "h w 3"]
) -> None:
  """Writes WORKDIR/pictures/NAME.png."""
  visualize.save_png(workdir / "pictures" / f"{name}.png", image)


def check_writable(folder: pathlib.Path, key: str) -> None:
  """Makes the folder, and raises UserError if it cannot be written."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # Containers on many hosts have one process number.
    probe = folder / f".write_test.{socket.gethostname()}.{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise errors.UserError(
        f"{key}: cannot write {folder}: {error.strerror}"
    ) from error


@contextlib.contextmanager
def refusal_told(folder: pathlib.Path) -> Iterator[None]:
  """Raises UserError where the folder takes no more of what is written inside."""
  try:
    yield
  except OSError as error:
    # A write to an open file names none.
    ours = pathlib.Path(str(error.filename or "/")).is_relative_to(folder)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if not (ours or full):
      raise
    raise errors.UserError(
        f"workdir: cannot write {error.filename or folder}: {error.strerror};"
        " what was saved stays, and a run started again goes on from there"
    ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON in one move: a reader sees the old file or the new one."""
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  partial.write_text(json.dumps(value, indent=2, allow_nan=True) + "\n")
  partial.replace(path)


def append(path: pathlib.Path, line: Mapping[str, Any]) -> None:
  """Adds a line to a JSON-lines file that no resumed run shortens."""
  with path.open("a") as file:
    file.write(json.dumps(dict(line)) + "\n")


class Journal:
  """The logs of a workdir: metrics.jsonl, records.jsonl, TensorBoard, PNGs.

  Opened at a step, it drops lines from that step on: a run that resumes writes
  them again.
  """

  def __init__(
      self,
      workdir: pathlib.Path,
      *,
      step: int,
      records: bool,
      board: bool = True,
  ):
    self._workdir = workdir
    self._metrics = _reopen(workdir / "metrics.jsonl", step)
    self._records = None
    if records:
      self._records = _reopen(workdir / "records.jsonl", step)
    self._board = _Board(workdir / "tensorboard", step) if board else None

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Logs numbers of one step."""
    self._metrics.write(json.dumps({"step": step} | dict(values)) + "\n")
    self._metrics.flush()
    if self._board:
      # What is not finite has no place on a curve.
      finite = {name: x for name, x in values.items() if math.isfinite(x)}
      self._board.scalars(step, finite)

  def records(self, step: int, records: Mapping[str, list[str]]) -> None:
    """Logs which examples a step consumes, where the config asks for it."""
    if self._records is not None:
      self._records.write(json.dumps({"step": step} | dict(records)) + "\n")
      self._records.flush()

  def picture(
      self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]
  ) -> None:
    """Logs a picture, also as WORKDIR/pictures/NAME.png (the newest)."""
    if self._board:
      self._board.picture(step, name, image)
    save_picture(self._workdir, name, image)

  def close(self) -> None:
    """Flushes all."""
    self._metrics.close()
    if self._records is not None:
      self._records.close()
    if self._board:
      self._board.close()


class Quarantine:
  """The records that were replaced, each named once in quarantine.jsonl.

  `limit` is the share of those drawn that may be; of fewer than 1,000 as of
  1,000. Opened at a step, it drops lines from that step on.
  """

  def __init__(self, workdir: pathlib.Path, *, step: int, limit: float):
    self._path = workdir / "quarantine.jsonl"
    self._file = _reopen(self._path, step)
    self._limit = limit
    self._named: dict[str, dict[str, str]] = {}
    for line in read_lines(self._path):
      self._named.setdefault(line["task"], {})[line["record"]] = line["fault"]
    self._drawn: dict[str, int] = {}
    self._replaced: dict[str, int] = {}

  def add(
      self, step: int, task: str, drawn: int, faults: Sequence[tuple[str, str]]
  ) -> list[tuple[str, str]]:
    """Those of a step's faults, (record, fault), that are new.

    Raises:
      UserError: too many of the records drawn so far had to be replaced.
    """
    named, new = self._named.setdefault(task, {}), []
    for record, fault in faults:
      if record not in named:
        named[record] = fault
        new.append((record, fault))
        line = {"step": step, "task": task, "record": record, "fault": fault}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
    drawn = self._drawn[task] = self._drawn.get(task, 0) + drawn
    replaced = self._replaced[task] = self._replaced.get(task, 0) + len(faults)
    if replaced > self._limit * max(drawn, _FEW_RECORDS):
      raise errors.UserError(
          f"bad_records: expected at most {self._limit:.2%} of {task}'s records"
          f" to be unreadable, got {replaced} of {drawn}; see {self._path}",
          *(
              f"{record}: {fault}"
              for record, fault in [*named.items()][:_NAMED]
          ),
      )
    return new

  def counts(self) -> dict[str, float]:
    """How many records were replaced, by task, since the run began."""
    return {
        f"quarantined/{task}": float(len(named))
        for task, named in self._named.items()
    }

  def close(self) -> None:
    """Flushes all."""
    self._file.close()


class _Board:
  """The event file of TensorBoard.

  Written where it is called: what tensorboardX writes in a thread waits for ever
  once that thread has met a full disk.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    """Opens a new file; earlier files' events from `step` on are dropped."""
    # tensorboardX imports torch where it finds it: seconds, and no use here.
    absent = object()
    torch = sys.modules.get("torch", absent)
    if torch is absent:
      sys.modules["torch"] = None
    try:
      from tensorboardX import record_writer, summary
      from tensorboardX.proto import event_pb2
    finally:
      if torch is absent:
        del sys.modules["torch"]
    self._summary, self._proto = summary, event_pb2
    self._checksum = record_writer.masked_crc32c
    folder.mkdir(exist_ok=True)
    # Two files of one second have two names.
    name = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    path = folder / f"events.out.tfevents.{name}.{next(_files)}"
    self._file = path.open("wb")
    self._add(step, file_version="brain.Event:2")
    if step:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(step, session_log=start)

  def _add(self, step: int, **content: Any) -> None:
    event = self._proto.Event(wall_time=time.time(), step=step, **content)
    data = event.SerializeToString()
    # A record: u64 length, checksum of it, data, checksum of these.
    for part in (struct.pack("<Q", len(data)), data):
      self._file.write(part + struct.pack("<I", self._checksum(part)))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each name."""
    for name, value in values.items():
      self._add(step, summary=self._summary.scalar(name, value))
    self._file.flush()

  def picture(
      self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]
  ) -> None:
    """Adds a picture."""
    image = self._summary.image(name, image, dataformats="HWC")
    self._add(step, summary=image)
    self._file.flush()

  def close(self) -> None:
    """Flushes all."""
    self._file.close()


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The complete lines of a JSON-lines file; a torn last one is left out."""
  if not path.exists():
    return []
  lines = []
  for line in path.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return lines


def _reopen(path: pathlib.Path, step: int):
  kept = [line for line in read_lines(path) if line["step"] < step]
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
  partial.replace(path)
  return path.open("a")
