"""What a run left in its workdir, to be compared with another's."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a file of JSON lines; none if it is not there."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def saved(workdir: pathlib.Path, step: int) -> tuple[Any, Any]:
  """The state and the streams of a step, whatever devices wrote them."""
  folder = workdir / "checkpoints" / str(step)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    state = checkpointer.restore(folder / "state")
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    streams = checkpointer.restore(
        folder / "streams", args=ocp.args.JsonRestore()
    )
  return state, streams


def flat(tree: Any) -> dict[str, np.ndarray]:
  """The arrays of a tree by their path, as a checkpoint names them."""
  return {
      jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def differences(a: Any, b: Any) -> list[str]:
  """The paths at which two trees are not equal bit for bit."""
  a, b = flat(a), flat(b)
  assert a.keys() == b.keys()
  return [key for key in a if not np.array_equal(a[key], b[key])]


def cut(workdir: pathlib.Path, step: int, copy: pathlib.Path) -> pathlib.Path:
  """A copy of the workdir of a finished run, as it was at the save of a step."""
  shutil.copytree(workdir, copy)
  for newer in (copy / "checkpoints").iterdir():
    if int(newer.name) > step:
      shutil.rmtree(newer)
  (copy / "results.json").unlink()
  return copy
