"""The clock of a run: seconds by what they were spent on."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import time

import psutil


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
