"""The heartbeat of the hosts of a run, by which all learn of the end of one.

Process 0 holds a connection to each of the others. All say now and then that
they live, with their time, and at last how they ended. JAX alone would tell no
host's name: by a collective that fails, or that never returns, and an abort.

One that closes its connection without a word is lost, and so is one that is
silent for long: the others end at once with EXIT_LOST. One that ends by itself
with an error ends the others by the same exit code, unless they come to their
own end within a grace.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback

from mcjepa_jax import errors
from mcjepa_jax.runtime import command_line

SILENCE = 60.0  # seconds; twelve words should have come in them
GRACE = 10.0
# Hosts that all stop for the same reason may be saving still.
_GRACE_OF_STOPS = 300.0
# Seconds in which another's end is known after a collective has failed by it.
_CAUSE = 3.0
# Seconds that process 0 waits for the others to be gone: JAX's service is in it,
# and they would abort without.
_LAST = 2.0
CLOCK_SECONDS = 60.0  # seconds between two hosts' clocks that are told

Ending = tuple[int, str]  # exit code and line


class Heartbeat:
  """This process's connections to the others, watched by a thread until `end`."""

  def __init__(
      self,
      index: int,
      names: Sequence[str],
      connections: Mapping[int, socket.socket],
      *,
      silence: float = SILENCE,
      grace: float = GRACE,
      leave: Callable[[int], None] = os._exit,
  ):
    """Begins to watch.

    Args:
      index: of this process.
      names: of all hosts.
      connections: of process 0 to all others, of another to process 0.
      silence: seconds after which a host that says nothing is lost.
      grace: seconds for this one to end by itself once another has failed.
      leave: ends this process by an exit code.
    """
    self.names = [f"process {i} ({name})" for i, name in enumerate(names)]
    self.reason = ""  # why this process ends
    self.index = index
    self._connections = dict(connections)
    self._silence = silence
    self._grace = grace
    self._leave = leave
    self._heard = dict.fromkeys(connections, time.monotonic())
    self._buffers = dict.fromkeys(connections, b"")
    self._ended: dict[int, int] = {}  # exit codes
    self._warned: set[int] = set()
    self._fault: Ending | None = None
    self._deadline = float("inf")  # when another's fault ends this one
    self._code: int | None = None  # of this one, once it is at its end
    # Of sends, and of what is decided by what was heard.
    self._lock = threading.RLock()
    self._news = threading.Condition(self._lock)
    self._leaving = self._closed = False
    for connection in connections.values():
      connection.settimeout(5)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def fault(self, seconds: float) -> Ending | None:
    """The exit code and the line of another host's end, if one is heard of."""
    with self._news:
      self._news.wait_for(lambda: self._fault, seconds)
      if self._fault:
        self._claim(self._fault[0])
      return self._fault

  def _claim(self, code: int) -> None:
    """Makes the main thread the one that ends this process, if it is not late."""
    if self._leaving:
      self._news.wait(2 * _LAST)  # and does not return
    self._code = code

  def end(self, code: int) -> int:
    """The exit code of this process, after all have come to their end.

    One that ends well waits for the others; one that does not, only as long as
    they may take.
    """
    with self._news:
      self._claim(code)
      if code or self.index:
        self._send({"end": [self.index, code, self.reason]})
      limit = None if not code else self._limit(code) + 2 * _LAST
      self._news.wait_for(self._is_over, limit)
      if not code:
        if not self.index:
          self._send({"end": [0, 0, ""]})
        if self._fault:
          code, line = self._fault
          print(line, file=sys.stderr, flush=True)
      if code and not self.index:
        self._news.wait_for(lambda: not self._heard, _LAST)
      self._closed = True
    if not code:
      self._thread.join(5)
    return code

  def _limit(self, code: int) -> float:
    stops = (errors.EXIT_PREEMPTED, errors.EXIT_ALARM)
    return _GRACE_OF_STOPS if code in stops else self._grace

  def _is_over(self) -> bool:
    return all(i in self._ended for i in self._connections)

  def _watch(self) -> None:
    selector = selectors.DefaultSelector()
    for index, connection in self._connections.items():
      selector.register(connection, selectors.EVENT_READ, index)
    beat = 0.0
    while not self._closed:
      before = time.monotonic()
      if before >= beat:
        self._send({"time": time.time()})
        beat = before + self._silence / 12
      for key, _ in selector.select(self._silence / 60):
        if not self._read(key.data, key.fileobj):
          selector.unregister(key.fileobj)
          self._gone(key.data, "its connection was closed")
      for index, heard in list(self._heard.items()):
        # What came while this thread had no turn has been read by now.
        if before - heard > self._silence:
          self._gone(index, f"nothing came from it for {self._silence:.0f} s")
      if time.monotonic() > self._deadline:
        self._go(selector)
    for connection in self._connections.values():
      connection.close()

  def _send(self, message: Mapping[str, object], but: int = -1) -> None:
    data = json.dumps(message).encode() + b"\n"
    with self._lock:
      for index, connection in self._connections.items():
        if index != but:
          with contextlib.suppress(OSError):
            connection.sendall(data)

  def _read(self, index: int, connection: socket.socket) -> bool:
    """Whether the connection is still open, once what came is heard."""
    try:
      data = connection.recv(2**16)
    except OSError:
      data = b""
    *lines, self._buffers[index] = (self._buffers[index] + data).split(b"\n")
    self._heard[index] = time.monotonic()
    for line in lines:
      message = json.loads(line)
      if "time" in message and not self.index:
        self._compare(index, message["time"] - time.time())
      if "end" in message:
        self._hear(*message["end"])
    return bool(data)

  def _compare(self, index: int, ahead: float) -> None:
    """Warns, once a host, of a clock that is not as that of process 0."""
    if abs(ahead) > CLOCK_SECONDS and index not in self._warned:
      self._warned.add(index)
      print(
          f"warning: clock: {self.names[index]} is {abs(ahead):.0f} s"
          f" {'ahead of' if ahead > 0 else 'behind'} {self.names[0]}: times in"
          " logs, and checkpoints kept by the hour, will be off",
          file=sys.stderr,
          flush=True,
      )

  def _hear(
      self, index: int, code: int, reason: str, lost: bool = False
  ) -> None:
    """Keeps how a host ended; process 0 tells the others."""
    with self._news:
      self._ended[index] = code
      if code and not self._fault:
        line = f"{self.names[index]} ended with exit code {code}"
        line = f"{line}: {reason}" if reason else line
        if code == errors.EXIT_USER_ERROR:
          line = f"error: {line}"
        elif code == errors.EXIT_LOST:
          line = f"{reason}; started again, the run goes on"
        self._fault = code, line
        self._deadline = time.monotonic() + (0 if lost else self._limit(code))
        if not self.index:
          self._send({"end": [index, code, reason, lost]}, but=index)
      self._news.notify_all()

  def _gone(self, index: int, why: str) -> None:
    """What a connection means that is closed or silent: lost, or at its end."""
    self._heard.pop(index, None)
    with self._news:
      if index not in self._ended:
        if self._code:  # this one's own end is why
          self._ended[index] = self._code
        else:
          reason = f"{self.names[index]} is lost: {why}"
          self._hear(index, errors.EXIT_LOST, reason, lost=True)
      self._news.notify_all()

  def _go(self, selector: selectors.BaseSelector) -> None:
    """Ends this process for another's fault, unless it is at its end."""
    with self._lock:
      if self._code is not None:
        return
      self._leaving = self._closed = True
    code, line = self._fault
    with contextlib.suppress(Exception):
      sys.stdout.flush()
    # Below the bar.
    print(f"\n{line}", file=sys.__stderr__, flush=True)
    deadline = time.monotonic() + _LAST
    while not self.index and len(selector.get_map()) > 0:
      for key, _ in selector.select(0.1):
        if not self._read(key.data, key.fileobj):
          selector.unregister(key.fileobj)
      if time.monotonic() > deadline:
        break
    self._leave(code)


_heartbeat: Heartbeat | None = None


def install(heartbeat: Heartbeat) -> None:
  """Makes a heartbeat the one of this process."""
  global _heartbeat
  _heartbeat = heartbeat


def name(index: int) -> str:
  """How messages call a process."""
  return _heartbeat.names[index] if _heartbeat else f"process {index}"


@contextlib.contextmanager
def report_failures() -> Iterator[None]:
  """Keeps why the body ended, for the others; theirs is raised if it is why.

  Raises:
    Stop: another host ended or is lost, and what was raised comes of it; or
      for what is no fault of the input, once its traceback is shown.
  """
  try:
    yield
  except (errors.UserError, errors.Stop) as error:
    if _heartbeat:
      _heartbeat.reason = "; ".join(str(error).splitlines())
      if getattr(error, "code", None) == errors.EXIT_LOST:
        _heartbeat.reason = (
            f"{_heartbeat.names[_heartbeat.index]}: {_heartbeat.reason}"
        )
    raise
  except Exception as error:
    if not _heartbeat:
      raise
    if fault := _heartbeat.fault(_CAUSE):
      raise errors.Stop(*fault) from error
    traceback.print_exc()
    _heartbeat.reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise errors.Stop(errors.EXIT_CRASHED, _heartbeat.reason) from error


def end(code: int) -> int:
  """The exit code of a process that has done its part; it may end in here.

  JAX, at exit, would wait for all hosts and abort where they do not come.
  """
  global _heartbeat
  if not _heartbeat:
    return code
  ending, _heartbeat = _heartbeat, None
  code = ending.end(code)
  if code:
    command_line.leave(code)
  return code
