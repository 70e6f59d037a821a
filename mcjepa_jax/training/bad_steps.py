"""Steps that a run kept to look at: WORKDIR/dumps/step_STEP.

A dump holds the parameters from before the step as a checkpoint, the batch as
NAME.HOST.npy with each host's rows, and in the checkpoint's meta the config, the
records of all hosts and what was logged.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import io
import itertools
import os
import pathlib
import shutil
from typing import Any

import jax
import ml_collections
import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.distributed import heartbeat, hosts
from mcjepa_jax.step import task_schedule, train_state
from mcjepa_jax.storage import checkpoint, checkpoint_reader, paths, run_folder

_NAMES = ("frames", "views")
_META = ("step", "kind", "key", "records", "logs", "hosts")
# Of what the hosts tell each other, the same on all.
_numbers = itertools.count()


def _own_rows(x: jax.Array) -> np.ndarray:
  """This host's rows of a batch; they lie together."""
  rows = {
      shard.index[0].start or 0: shard.data for shard in x.addressable_shards
  }
  return np.concatenate([jax.device_get(rows[start]) for start in sorted(rows)])


def has_room(workdir: str | os.PathLike, *, step: int, limit: int) -> bool:
  """Whether there are fewer than `limit` whole dumps, and none of this step.

  All hosts of a run ask together.

  Raises:
    UserError: on all, where the first cannot look.
  """
  location = paths.path(workdir) / run_folder.DUMPS

  def room():
    if not hosts.first():
      return False
    paths.forget_below(location)
    listed = paths.names(location) if location.is_dir() else []
    names = {name for name in listed if name.startswith("step_")}
    whole = {
        name
        for name in names
        if checkpoint_reader.newest_step(location / name) is not None
    }
    if isinstance(location, pathlib.Path):
      for name in names - whole:  # of a run that was killed, or a full disk
        shutil.rmtree(location / name, ignore_errors=True)
    return len(whole) < limit and f"step_{step}" not in whole

  # What the first found: the others may ask when it writes already.
  return _everywhere(location, room)[0]


def save(
    workdir: str | os.PathLike,
    state: train_state.TrainState,
    *,
    step: int,
    kind: str,
    arrays: Mapping[str, jax.Array],
    records: Mapping[str, list[str]],
    logs: Mapping[str, float],
    config: Any,
) -> paths.Location:
  """The folder of the new dump.

  All hosts of a run call this, with the workdir that they share. No checkpoint may
  be under way: Orbax would take the two for one, and write before there are folders.

  Raises:
    UserError: one cannot be written, and nothing is kept of it.
    TransientError: of several hosts one cannot write its part of the parameters.
  """
  folder = paths.path(workdir) / run_folder.DUMPS / f"step_{step}"
  own = {
      folder / f"{name}.{jax.process_index()}.npy": x
      for name, x in arrays.items()
  }

  def write():
    if isinstance(folder, pathlib.Path):
      folder.mkdir(parents=True, exist_ok=True)
    for path, x in own.items():
      buffer = io.BytesIO()
      np.save(buffer, _own_rows(x), allow_pickle=False)
      paths.write(path, buffer.getvalue())
    return dict(records)

  try:
    told = _everywhere(folder, write)
    meta = {
        "kind": kind,
        "key": jax.device_get(state.key).tolist(),
        # As the rows of the batch: host after host.
        "records": {
            task: sum((rows[task] for rows in told), []) for task in records
        },
        "hosts": len(told),
        "logs": dict(logs),
        "config": config.to_dict(),
    }
    with (
        hosts.as_one(),
        _refusals(folder),
        checkpoint.Checkpoints(folder) as kept,
    ):
      kept.save(step, {"params": state.params}, {}, meta)
  except errors.UserError:
    _remove(folder, own)
    raise
  return folder


@contextlib.contextmanager
def _refusals(location: paths.Location) -> Iterator[None]:
  """Raises UserError for what a disk or a bucket raises inside."""
  # What a bucket's clients raise has no class in common.
  kinds = OSError if isinstance(location, pathlib.Path) else Exception
  try:
    yield
  except errors.UserError:
    raise
  except kinds as error:
    raise errors.UserError(str(error) or type(error).__name__) from error


def _everywhere(
    location: paths.Location, function: Callable[[], Any]
) -> list[Any]:
  """What a function that uses a location returns on each host.

  Raises:
    UserError: on all, where it fails on one.
  """
  found, fault = None, ""
  try:
    with _refusals(location):
      found = function()
  except errors.UserError as error:
    fault = str(error)
    if jax.process_count() > 1:
      fault = f"{heartbeat.name(jax.process_index())}: {fault}"
  told = hosts.exchange(f"dump {next(_numbers)}", [found, fault])
  if faults := [fault for _, fault in told if fault]:
    raise errors.UserError(*faults)
  return [found for found, _ in told]


def _remove(folder: paths.Location, rows: Iterable[paths.Location]) -> None:
  """Takes away what a host has written of a dump, as far as it can.

  What of the parameters did not fail may be written still: `has_room` finds it.
  """
  if isinstance(folder, pathlib.Path) and jax.process_count() == 1:
    shutil.rmtree(folder, ignore_errors=True)
    return
  for path in rows:
    with contextlib.suppress(Exception):
      paths.remove(path)


def _tuples(value: Any) -> Any:
  """JSON's lists as the tuples that a config has."""
  if isinstance(value, dict):
    return {key: _tuples(x) for key, x in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read_meta(folder: pathlib.Path) -> tuple[dict[str, Any], Any]:
  """What was saved beside the arrays, and the config of the run.

  Raises:
    UserError: there is no dump.
  """
  meta = checkpoint_reader.read_meta(folder)
  try:
    config = ml_collections.ConfigDict(_tuples(meta["config"])).lock()
    task_schedule.tasks(meta["kind"])
    if type(meta["hosts"]) is not int or meta["hosts"] < 1:
      raise ValueError(f"hosts: {meta['hosts']}")
    if not 0 <= int(meta["step"]) < 2**31:
      raise ValueError(f"step: {meta['step']}")
    dict(meta["logs"]), dict(meta["records"])
    np.asarray(meta["key"], np.uint32)
    return {k: meta[k] for k in _META}, config
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
        f"{folder}: expected the dump of a step, came a checkpoint with"
        f" {sorted(meta)} ({type(error).__name__}: {error})"
    ) from error


def read_arrays(
    folder: pathlib.Path, kind: str, host_count: int = 1
) -> dict[str, np.ndarray]:
  """The batch of a dump, of all hosts.

  Raises:
    UserError: a file is missing, or is no array of u8[n, h, w, 3].
  """
  arrays = {}
  for task, name in zip(("motion", "content"), _NAMES, strict=True):
    if task not in task_schedule.tasks(kind):
      continue
    parts = [
        _read(folder / f"{name}.{host}.npy", name) for host in range(host_count)
    ]
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
      raise errors.UserError(
          f"{folder}: expected {name} of one size from all hosts, came"
          f" {sorted(shapes)}"
      )
    arrays[name] = np.concatenate(parts)
  return arrays


def _read(path: pathlib.Path, name: str) -> np.ndarray:
  """The rows of one host, mapped: no more is allocated than the file has."""
  try:
    x = np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError, EOFError, SyntaxError) as error:
    raise errors.UserError(
        f"{path}: expected the {name} of a dump, came: {error}"
    ) from error
  if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3:
    raise errors.UserError(
        f"{path}: expected u8 with 4 axes, the last of 3, came {x.dtype}"
        f" {x.shape}"
    )
  return x
