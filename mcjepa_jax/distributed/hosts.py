"""Several hosts as one run: they find each other, agree, and notice a hang.

Process 0 calls the roll on the coordinator's port before JAX uses it: JAX would
end every process where one is missing, and name none. The connections of the
roll stay open, as the lifeline; facts go through the key-value store of JAX's
own service.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import faulthandler
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from typing import Any
import uuid

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from mcjepa_jax import errors
from mcjepa_jax.distributed import cluster, heartbeat, sharding
from mcjepa_jax.storage import run_folder

_SHOWN = 8  # differences between two hosts
# What of a config may differ: where things are, and how fast they go.
_OWN = ("config.data_root", "config.compilation_cache", "config.workers")
_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "numpy"),
    *("orbax-checkpoint", "tensorstore", "grain"),
)
_LONGEST = 1024  # bytes of a line of the roll call
_LATER = 40  # seconds after which JAX itself misses a host that is silent


def start(
    where: cluster.Place | None,
    *,
    seconds: float = 300.0,
    silence: float = heartbeat.SILENCE,
) -> None:
  """Makes this process one of a run's, once all have answered the roll.

  One that is silent for `silence` seconds then counts as lost.

  Raises:
    UserError: two say that they have the same place.
    Stop: some did not come within `seconds` (77); they are named.
  """
  if where is None:
    return
  # The first process of a container hears no signal that it has no handler for.
  with on_sigterm(leave):
    names, connections = roll_call(where, seconds)
  heartbeat.hold(
      heartbeat.Lifeline(where.index, names, connections, silence=silence)
  )
  if where.index:
    # Read where tqdm is imported: one bar is enough.
    os.environ.setdefault("TQDM_DISABLE", "1")
  jax.distributed.initialize(
      coordinator_address=where.address,
      num_processes=where.count,
      process_id=where.index,
      cluster_detection_method=None if where.cluster else "deactivate",
      initialization_timeout=int(max(seconds, 60)),
      # The lifeline is to notice first: JAX aborts, and names no host.
      heartbeat_timeout_seconds=int(silence) + _LATER,
      # One that ends with an error is not to hold the others up for long.
      shutdown_timeout_seconds=30,
  )


def roll_call(
    where: cluster.Place, seconds: float
) -> tuple[list[str], dict[int, socket.socket]]:
  """The names of all hosts, once they have come, and this one's connections.

  Process 0 has one to each of the others, they have one to process 0.

  Raises:
    UserError: two have the same place.
    Stop: some did not come within `seconds` (77).
  """
  host, _, port = where.address.rpartition(":")
  deadline = time.monotonic() + seconds
  if where.index:
    return _answer(where, host.strip("[]"), int(port), deadline)
  return _call(where, int(port), deadline)


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
    where: cluster.Place, port: int, deadline: float
) -> tuple[list[str], dict[int, socket.socket]]:
  """The roll call of process 0; what is wrong is told to all that came."""
  present = {0: socket.gethostname()}
  fault, waiting = "", []
  began, both = time.monotonic(), socket.has_dualstack_ipv6()
  try:
    server = socket.create_server(
        ("", port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        backlog=where.count,
        dualstack_ipv6=both,
    )
  except OSError as error:
    raise errors.UserError(
        f"--coordinator: cannot listen on port {port}: {error.strerror}"
    ) from error
  with contextlib.ExitStack() as stack:
    stack.enter_context(server)
    while len(present) < where.count and not fault:
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
      if count != where.count or not 0 < index < count:
        fault = (
            f"{name} says it is process {index} of {count}, process 0 expects"
            f" {where.count}"
        )
      elif index in present:
        fault = f"{present[index]} and {name} both say they are process {index}"
      present[index] = name
    absent = [i for i in range(where.count) if i not in present]
    names = [present.get(i, "") for i in range(where.count)]
    answer = f"go {json.dumps(names)}"
    if fault:
      answer = f"fault {fault}"
    elif absent:
      answer = (
          f"absent waited {time.monotonic() - began:.0f} s for"
          f" {where.count} processes; these did not come:"
          f" {', '.join(map(where.name, absent))}"
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
    raise cluster.absent(text)


def _answer(
    where: cluster.Place, host: str, port: int, deadline: float
) -> tuple[list[str], dict[int, socket.socket]]:
  """The roll call of another process than 0."""
  reason = "no answer"
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((host, port), timeout=5) as connection:
        name = socket.gethostname()
        line = f"mcjepa {where.count} {where.index} {name}\n"
        connection.sendall(line.encode())
        # Process 0 may have begun to wait later, by as much as it waits.
        connection.settimeout(max(deadline - time.monotonic(), 0) + 600)
        answer = _line_of(connection, _LONGEST * (where.count + 64))
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
  raise cluster.absent(
      f"{where.name(0)} at {where.address} did not call the roll: {reason}"
  )


def first() -> bool:
  """Whether this host writes what is written once."""
  return jax.process_index() == 0


def exchange(name: str, value: Any, *, seconds: float = 600.0) -> list[Any]:
  """Every host's value, as JSON, by process: a barrier with a time limit.

  Raises:
    Stop: some hosts did not come within `seconds` (77); they are named.
  """
  if jax.process_count() == 1:
    return [value]
  client = distributed.global_state.client
  client.key_value_set(
      f"mcjepa/{name}/{jax.process_index()}", json.dumps(value)
  )
  deadline = time.monotonic() + seconds
  values, absent = [], []
  for index in range(jax.process_count()):
    left = max(int(1000 * (deadline - time.monotonic())), 1)
    try:
      text = client.blocking_key_value_get(f"mcjepa/{name}/{index}", left)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
      absent.append(index)
    else:
      values.append(json.loads(text))
  if absent:
    names = ", ".join(map(heartbeat.name, absent))
    raise cluster.absent(
        f"{name}: waited {seconds:.0f} s for all hosts; these did not come:"
        f" {names}"
    )
  return values


def agree(
    facts: Mapping[str, Any], faults: Sequence[str], *, seconds: float = 1800.0
) -> None:
  """Returns if no host has faults, and facts and code are the same on all.

  Raises:
    UserError: with the faults of all hosts, or with what differs from host 0.
  """
  if jax.process_count() == 1:
    if faults:
      raise errors.UserError(*faults)
    return
  flat = _flat({**facts, "code": code()})
  ours = {
      "name": heartbeat.name(jax.process_index()),
      "faults": list(faults),
      "facts": {k: v for k, v in flat.items() if k not in _OWN},
  }
  theirs = exchange("start", ours, seconds=seconds)
  bad = {fault: other["name"] for other in theirs for fault in other["faults"]}
  if bad:
    raise errors.UserError(*(f"{who}: {fault}" for fault, who in bad.items()))
  ours = theirs[0]["facts"]
  differences = []
  for other in theirs[1:]:
    values = other["facts"]
    keys = [
        key
        for key in sorted(ours.keys() | values.keys())
        if ours.get(key) != values.get(key)
    ]
    differences += [
        f"{key}: {theirs[0]['name']} has {ours.get(key)!r}, {other['name']}"
        f" {values.get(key)!r}"
        for key in keys[:_SHOWN]
    ]
    if len(keys) > _SHOWN:
      differences.append(
          f"{other['name']}: {len(keys) - _SHOWN} more differences"
      )
  if differences:
    raise errors.UserError(*differences)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
  if isinstance(tree, Mapping):
    items = [(f"{path}.{k}" if path else str(k), v) for k, v in tree.items()]
  elif isinstance(tree, list | tuple) and any(
      isinstance(x, Mapping) for x in tree
  ):
    items = [(f"{path}[{i}]", v) for i, v in enumerate(tree)]
  else:
    return {path: tree}
  return {k: v for item in items for k, v in _flat(item[1], item[0]).items()}


def check_shared(folder: run_folder.Folder) -> None:
  """Raises UserError unless all hosts see one folder at this path."""
  if jax.process_count() == 1:
    return
  workdir = folder.address
  if isinstance(workdir, str):  # in a bucket, which all see by its name
    if others := set(exchange("workdir", workdir)) - {workdir}:
      raise errors.UserError(
          f"workdir: expected one for all hosts, got {workdir} and"
          f" {', '.join(sorted(others))}"
      )
    return
  path = workdir / ".shared"
  if first():
    path.write_text(uuid.uuid4().hex)
  mine = path.read_text() if first() else ""
  token, *_ = exchange("workdir", mine)
  try:
    seen = path.read_text()
  except OSError:
    seen = ""
  same = exchange("shared", seen == token)
  apart = [heartbeat.name(i) for i, fits in enumerate(same) if not fits]
  if apart:
    raise errors.UserError(
        f"workdir: expected one folder that all hosts share, got another"
        f" {workdir} on {', '.join(apart)}"
    )


def check_alike(name: str, value: Any) -> None:
  """Returns if all hosts see one thing of what they share.

  Raises:
    Stop: they do not (77): a listing of the share may be late.
  """
  seen = exchange(name, value)
  if any(x != seen[0] for x in seen):
    each = ", ".join(f"{heartbeat.name(i)} {x}" for i, x in enumerate(seen))
    raise cluster.absent(f"{name}: expected one for all hosts, got {each}")


def code() -> dict[str, str]:
  """A digest of this package's source, and versions of what it runs on."""
  root = pathlib.Path(__file__).resolve().parent.parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root)}\0".encode())
    digest.update(path.read_bytes())
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {"mcjepa_jax": digest.hexdigest()[:12]} | versions


def _same(tree: Any) -> Any:  # one function, which is compiled once
  return tree


def local(tree: Any, mesh: jax.sharding.Mesh) -> tuple[Any, jax.sharding.Mesh]:
  """Arrays whole on this host's own devices, and a mesh of these.

  For work of each host by itself; to get there all hosts call this.
  """
  if jax.process_count() == 1:
    return tree, mesh
  everywhere = sharding.replicated(mesh)
  tree = jax.jit(_same, out_shardings=everywhere)(tree)
  mesh = sharding.mesh_of(jax.local_devices())
  here = sharding.replicated(mesh)

  def own(x):
    by_device = {shard.device: shard.data for shard in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(
        x.shape, here, [by_device[device] for device in mesh.devices.flat]
    )

  return jax.tree.map(own, tree), mesh


def log_folder(workdir: pathlib.Path) -> pathlib.Path:
  """Where this host writes: the workdir for the first, else a folder in it.

  Records and faults of the input are each host's own.
  """
  if first():
    return workdir
  folder = workdir / "hosts" / str(jax.process_index())
  folder.mkdir(parents=True, exist_ok=True)
  return folder


@contextlib.contextmanager
def on_sigterm(
    handler: Callable[..., None], *, alone: bool = False
) -> Iterator[None]:
  """Calls `handler` on SIGTERM inside.

  Of many hosts JAX has its own, which ends all at one step; where each may end
  `alone`, the handler takes its place.
  """
  if jax.distributed.is_initialized() and not alone:
    yield
    return
  before = signal.signal(signal.SIGTERM, handler)
  try:
    yield
  finally:
    # None where JAX's own was there: nothing asks it any more.
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


# How often this process asked whether to stop.
_asked = itertools.count(1)


def stopping(stop: threading.Event) -> bool:
  """Whether to stop before this step, on SIGTERM to any host.

  All hosts ask as often, and all hear it at the same step.
  """
  if jax.process_count() == 1 or stop.is_set():
    return stop.is_set()
  # Of a SIGTERM before the first question JAX makes number 1 the last one, so
  # a resumed run's steps are no numbers to ask by.
  if multihost_utils.reached_preemption_sync_point(next(_asked)):
    stop.set()  # on all: JAX says so once
  return stop.is_set()


@contextlib.contextmanager
def as_one() -> Iterator[None]:
  """Has a fault of this host's disk end all of several, to be started again.

  The others wait for what it does not write.
  """
  try:
    yield
  except errors.UserError as error:
    if jax.process_count() == 1:
      raise
    raise errors.Passing(*error.messages) from error


def leave(*_: Any) -> None:
  """Handles SIGTERM where there is nothing new to save."""
  raise errors.Stop(
      errors.EXIT_PREEMPTED,
      "SIGTERM outside of the steps: what is saved is all there is",
  )


class Watch:
  """Prints all threads' stacks when a step comes late, and again each time.

  A step that hangs does so on every host, and each prints its own to stderr.
  """

  def __init__(self, seconds: float):
    """Watches nothing before the first step, nor at 0 `seconds`."""
    self._seconds = seconds

  def step(self) -> None:
    """Begins a step, which ends the one before."""
    if self._seconds:
      faulthandler.dump_traceback_later(
          self._seconds, repeat=True, file=sys.__stderr__
      )

  def close(self) -> None:
    """Ends the last step."""
    faulthandler.cancel_dump_traceback_later()
