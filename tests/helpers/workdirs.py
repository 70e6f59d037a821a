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
  # As numpy: the devices that wrote it need not be here.
  tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
  kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    state = checkpointer.restore(
        folder / "state", args=ocp.args.PyTreeRestore(restore_args=kinds)
    )
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

  def bits(x):
    return x.dtype, x.shape, x.tobytes()

  return [key for key in a if bits(a[key]) != bits(b[key])]


def cut(workdir: pathlib.Path, step: int, copy: pathlib.Path) -> pathlib.Path:
  """A copy of the workdir of a finished run, as it was at the save of a step."""
  shutil.copytree(workdir, copy)
  for newer in (copy / "checkpoints").iterdir():
    if int(newer.name) > step:
      shutil.rmtree(newer)
  (copy / "results.json").unlink()
  return copy


def keep_shards(folder: pathlib.Path, state: Any) -> None:
  """Writes what this process holds of a state, each part of it once."""
  folder.mkdir(parents=True, exist_ok=True)
  parts = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for shard in leaf.addressable_shards:
      if shard.replica_id == 0:
        starts = [index.start or 0 for index in shard.index]
        parts[f"{name} {json.dumps(starts)}"] = np.asarray(shard.data)
  np.savez(folder / f"{jax.process_index()}.npz", **parts)


def from_shards(
    folder: pathlib.Path, like: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The arrays by path whose parts all processes have written."""
  whole = {name: np.zeros_like(x) for name, x in like.items()}
  filled = dict.fromkeys(like, 0)
  for file in folder.glob("*.npz"):
    with np.load(file) as parts:
      for key in parts.files:
        name, _, starts = key.partition(" ")
        part = parts[key]
        place = tuple(
            slice(start, start + size)
            for start, size in zip(json.loads(starts), part.shape, strict=True)
        )
        whole[name][place] = part
        filled[name] += part.size
  assert filled == {name: x.size for name, x in like.items()}
  return whole
