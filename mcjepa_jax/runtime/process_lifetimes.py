"""How long the processes of a run lived, and so what one that was killed cost.

WORKDIR/lives.json holds of each process when it began and when it was last seen,
in seconds since 1970. It is written over and over while a process lives: one that
is killed says nothing at its end.
"""

from collections.abc import Iterator
import contextlib
import json
import math
import pathlib
import threading
import time

from mcjepa_jax import errors
from mcjepa_jax.storage import paths, run_folder

_FILE = "lives.json"
WRITE_SECONDS = 10.0  # between two writes
_OF_A_BUCKET = 6  # times as long: each is a request

Lifetimes = list[tuple[float, float]]  # (began, seen) of each process


def lost_seconds(earlier: Lifetimes, since: float) -> float:
  """Seconds that earlier processes lived after what is gone on from was saved."""
  return math.fsum(
      max(seen - max(began, since), 0.0) for began, seen in earlier
  )


@contextlib.contextmanager
def record_lifetime(
    folder: run_folder.Folder, started: float, *, first: bool
) -> Iterator[Lifetimes]:
  """Gives the earlier lives; inside, this one is written down.

  `started` is when it began, on the scale of time.perf_counter. What cannot be
  written is left out: it ends no run. Of many hosts the first one's counts.
  """
  if not first:
    yield []
    return
  earlier = _read(folder.local / _FILE)
  path = paths.path(folder.address) / _FILE
  began = time.time() - (time.perf_counter() - started)
  ended = threading.Event()
  pause = (
      WRITE_SECONDS
      if isinstance(path, pathlib.Path)
      else WRITE_SECONDS * _OF_A_BUCKET
  )

  def write():
    while not ended.is_set():
      lives = [*earlier, (began, time.time())]
      with contextlib.suppress(OSError, errors.UserError):
        paths.write(path, json.dumps(lives).encode())
      ended.wait(pause)

  thread = threading.Thread(target=write, daemon=True)
  thread.start()
  try:
    yield earlier
  finally:
    ended.set()
    thread.join(1)  # a bucket may take longer


def _read(path: pathlib.Path) -> Lifetimes:
  """What an earlier process wrote; nothing if it is not that."""
  try:
    lives = [
        (float(began), float(seen))
        for began, seen in json.loads(path.read_text())
    ]
  except (OSError, TypeError, ValueError):
    return []
  return [life for life in lives if all(map(math.isfinite, life))]
