"""Brings the hosts of a run together: the roll call, then JAX's own start.

Process 0 calls the roll on the coordinator's port before JAX uses it: JAX would
end every process where one is missing, and name none. The connections of the
roll stay open, as the heartbeat's.
"""

import contextlib
import json
import os
import socket
import time

import jax

from mcjepa_jax import errors
from mcjepa_jax.distributed import cluster, heartbeat
from mcjepa_jax.runtime import signals

_LONGEST = 1024  # bytes of a line of the roll call
_LATER = 40  # seconds after which JAX itself misses a host that is silent


def start(
    process: cluster.Process | None,
    *,
    seconds: float = 300.0,
    silence: float = heartbeat.SILENCE,
) -> None:
  """Makes this process one of a run's, once all have answered the roll.

  One that is silent for `silence` seconds then counts as lost.

  Raises:
    UserError: two say that they are the same process.
    Stop: some did not come within `seconds` (77); they are named.
  """
  if process is None:
    return
  # The first process of a container hears no signal that it has no handler for.
  with signals.on_sigterm(signals.stop_unsaved):
    names, connections = roll_call(process, seconds)
  heartbeat.install(
      heartbeat.Heartbeat(process.index, names, connections, silence=silence)
  )
  if process.index:
    # Read where tqdm is imported: one bar is enough.
    os.environ.setdefault("TQDM_DISABLE", "1")
  jax.distributed.initialize(
      coordinator_address=process.address,
      num_processes=process.count,
      process_id=process.index,
      cluster_detection_method=None if process.cluster else "deactivate",
      initialization_timeout=int(max(seconds, 60)),
      # The heartbeat is to notice first: JAX aborts, and names no host.
      heartbeat_timeout_seconds=int(silence) + _LATER,
      # One that ends with an error is not to hold the others up for long.
      shutdown_timeout_seconds=30,
  )


def roll_call(
    process: cluster.Process, seconds: float
) -> tuple[list[str], dict[int, socket.socket]]:
  """The names of all hosts, once they have come, and this one's connections.

  Process 0 has one to each of the others, they have one to process 0.

  Raises:
    UserError: two say that they are the same process.
    Stop: some did not come within `seconds` (77).
  """
  host, _, port = process.address.rpartition(":")
  deadline = time.monotonic() + seconds
  if process.index:
    return _answer(process, host.strip("[]"), int(port), deadline)
  return _call(process, int(port), deadline)


def _line_of(connection: socket.socket, longest: int) -> str:
  """The next line; no byte after it is read."""
  with connection.makefile("rb", buffering=0) as file:
    return file.readline(longest).decode()


def _is_closed(connection: socket.socket) -> bool:
  """Whether the other end has closed it, which said nothing more."""
  before = connection.gettimeout()
  connection.settimeout(0)
  try:
    return not connection.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    connection.settimeout(before)


def _call(
    process: cluster.Process, port: int, deadline: float
) -> tuple[list[str], dict[int, socket.socket]]:
  """The roll call of process 0; what is wrong is told to all that came."""
  present = {0: socket.gethostname()}
  fault, waiting = "", []
  began, both = time.monotonic(), socket.has_dualstack_ipv6()
  try:
    server = socket.create_server(
        ("", port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        backlog=process.count,
        dualstack_ipv6=both,
    )
  except OSError as error:
    raise errors.UserError(
        f"--coordinator: cannot listen on port {port}: {error.strerror}"
    ) from error
  with contextlib.ExitStack() as stack:
    stack.enter_context(server)
    while len(present) < process.count and not fault:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        break
      stack.enter_context(connection)
      connection.settimeout(5)
      try:
        answer = _line_of(connection, _LONGEST)
        word, count, index, name = answer.split()
        count, index = int(count), int(index)
      except (OSError, ValueError):
        continue  # a stranger
      if word != "mcjepa":
        continue
      # One that left, and was started again.
      for left in [x for x in waiting if x[0] == index and _is_closed(x[1])]:
        waiting.remove(left)
        del present[index]
      waiting.append((index, connection))
      if count != process.count or not 0 < index < count:
        fault = (
            f"{name} says it is process {index} of {count}, process 0 expects"
            f" {process.count}"
        )
      elif index in present:
        fault = f"{present[index]} and {name} both say they are process {index}"
      present[index] = name
    absent = [i for i in range(process.count) if i not in present]
    names = [present.get(i, "") for i in range(process.count)]
    answer = f"go {json.dumps(names)}"
    if fault:
      answer = f"fault {fault}"
    elif absent:
      answer = (
          f"absent waited {time.monotonic() - began:.0f} s for"
          f" {process.count} processes; these did not come:"
          f" {', '.join(map(process.name, absent))}"
      )
    for _, connection in waiting:
      with contextlib.suppress(OSError):
        connection.sendall(f"{answer}\n".encode())
    _raise_told(answer)
    # The others are closed here; these stay open.
    return names, {i: connection.dup() for i, connection in waiting}


def _raise_told(answer: str) -> None:
  """Raises what the roll call ended with, unless it is that all go."""
  word, _, text = answer.strip().partition(" ")
  if word == "fault":
    raise errors.UserError(text)
  if word == "absent":
    raise cluster.hosts_missing(text)


def _answer(
    process: cluster.Process, host: str, port: int, deadline: float
) -> tuple[list[str], dict[int, socket.socket]]:
  """The roll call of another process than 0."""
  reason = "no answer"
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((host, port), timeout=5) as connection:
        name = socket.gethostname()
        line = f"mcjepa {process.count} {process.index} {name}\n"
        connection.sendall(line.encode())
        # Process 0 may have begun to wait later, by as much as it waits.
        connection.settimeout(max(deadline - time.monotonic(), 0) + 600)
        answer = _line_of(connection, _LONGEST * (process.count + 64))
        if answer.startswith("go "):
          return json.loads(answer[3:]), {0: connection.dup()}
        _raise_told(answer)
        reason = "the connection was closed"
        if answer:
          reason = "another service answers there"
    except OSError as error:
      reason = error.strerror or str(error)
    except (UnicodeDecodeError, json.JSONDecodeError):
      reason = "another service answers there"
    time.sleep(0.2)
  raise cluster.hosts_missing(
      f"{process.name(0)} at {process.address} did not call the roll: {reason}"
  )
