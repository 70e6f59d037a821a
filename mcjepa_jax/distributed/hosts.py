"""Lets the hosts of a run agree, share and act as one.

Facts go through the key-value store of JAX's own service.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import time
from typing import Any
import uuid

import jax
from jax._src import distributed

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
    raise cluster.hosts_missing(
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
    raise cluster.hosts_missing(
        f"{name}: expected one for all hosts, got {each}"
    )


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
def as_one() -> Iterator[None]:
  """Has a fault of this host's disk end all of several, to be started again.

  The others wait for what it does not write.
  """
  try:
    yield
  except errors.UserError as error:
    if jax.process_count() == 1:
      raise
    raise errors.TransientError(*error.messages) from error
