"""Steps that a run kept to look at: WORKDIR/dumps/step_STEP.

A dump holds the parameters from before the step as a checkpoint, the batch as
NAME.npy, and in the checkpoint's meta the config, the records and what was
logged.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from mcjepa_jax import checkpoint, errors, step as steps

_NAMES = ("frames", "views")
_META = ("step", "kind", "key", "records", "logs")


def save(
    workdir: pathlib.Path,
    state: steps.TrainState,
    *,
    step: int,
    kind: str,
    arrays: Mapping[str, jax.Array],
    records: Mapping[str, list[str]],
    logs: Mapping[str, float],
    config: Any,
    limit: int,
) -> pathlib.Path | None:
  """The folder of the new dump; None where the workdir has `limit` already.

  None too on several hosts, of which none holds the whole batch.
  """
  if jax.process_count() > 1:
    return None
  folder = workdir / "dumps" / f"step_{step}"
  others = [path for path in folder.parent.glob("*") if path != folder]
  if len(others) >= limit or (folder / "checkpoints").exists():
    return None
  folder.mkdir(parents=True, exist_ok=True)
  for name, x in arrays.items():
    np.save(folder / f"{name}.npy", jax.device_get(x), allow_pickle=False)
  with checkpoint.Checkpoints(folder) as kept:
    kept.save(
        step,
        {"params": state.params},
        {},
        {
            "kind": kind,
            "key": jax.device_get(state.key).tolist(),
            "records": dict(records),
            "logs": dict(logs),
            "config": config.to_dict(),
        },
    )
  return folder


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
  meta = checkpoint.read_meta(folder)
  try:
    config = ml_collections.ConfigDict(_tuples(meta["config"])).lock()
    steps.tasks(meta["kind"])
    np.asarray(meta["key"], np.uint32)
    return {k: meta[k] for k in _META}, config
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
        f"{folder}: expected the dump of a step, came a checkpoint with"
        f" {sorted(meta)} ({type(error).__name__}: {error})"
    ) from error


def read_arrays(folder: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
  """The batch of a dump.

  Raises:
    UserError: a file is missing, or is no array of u8[n, h, w, 3].
  """
  arrays = {}
  for task, name in zip(("motion", "content"), _NAMES, strict=True):
    if task not in steps.tasks(kind):
      continue
    path = folder / f"{name}.npy"
    try:
      # Mapped: no more is allocated than the file has.
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
    arrays[name] = np.array(x)
  return arrays
