"""Finds and reads checkpoints: their steps, their meta and their parameters.

A PATH is a workdir, its checkpoints folder, or one step in it; the first two
mean the newest complete step.
"""

import os
from typing import Any

from etils import epath
import jax
from jax import numpy as jnp
import orbax.checkpoint as ocp

from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

FOLDER = "checkpoints"
_SHOWN = 4
# What damaged or missing files raise: tensorstore has no error class.
STORAGE_ERRORS = (OSError, ValueError, KeyError)


def absolute(path: str | os.PathLike) -> epath.Path:
  """Returns the whole path of a folder; of one in a bucket, its address."""
  text = os.fspath(path)
  if "://" in text:
    paths.prepare(text)
    return epath.Path(text)
  return epath.Path(os.path.abspath(text))


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def on_devices(abstract: Any) -> Any:
  """Returns the shapes, each with a sharding: its own, or one device."""
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=x.sharding or one
      ),
      abstract,
  )


def complete_steps(folder: epath.Path) -> list[int]:
  """Returns the complete steps in a checkpoints folder, in order."""
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def has_checkpoints(workdir: str | os.PathLike) -> bool:
  """Returns whether a run has come to the point where it may save."""
  return (absolute(workdir) / FOLDER).exists()


def newest_step(workdir: str | os.PathLike) -> int | None:
  """Returns the newest step of which a workdir has a complete checkpoint."""
  return max(complete_steps(absolute(workdir) / FOLDER), default=None)


def locate(path: str | os.PathLike) -> epath.Path:
  """Returns the folder of one complete step.

  Raises:
    UserError: there is none at the path.
  """
  folder = absolute(path)
  if not folder.exists():
    raise UserError(f"checkpoint {folder} does not exist")
  if folder.name.isdigit() and int(folder.name) in complete_steps(
      folder.parent
  ):
    return folder
  if (folder / FOLDER).is_dir():
    folder = folder / FOLDER
  steps = complete_steps(folder)
  if not steps:
    raise UserError(
        f"{folder} holds no complete checkpoint: expected a workdir, its "
        f"{FOLDER} folder or one step in it"
    )
  return folder / str(steps[-1])


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
  """Returns what was saved as `meta`, and its "step"."""
  return _read(
      locate(path),
      "meta",
      ocp.JsonCheckpointHandler(),
      ocp.args.JsonRestore(),
  )


def restore_params(path: str | os.PathLike, abstract_params: Any) -> Any:
  """Returns the parameters alone, whatever the optimizer was.

  Args:
    path: a workdir, its checkpoints folder, or one step in it.
    abstract_params: shapes, with shardings or for one device; may leave out
      whole entries of the saved tree's first level.

  Raises:
    UserError: no checkpoint, or one of another architecture.
  """
  step = locate(path)
  check_params(step, abstract_params)
  abstract = {"params": on_devices(abstract_params)}
  return _read(
      step,
      "state",
      ocp.PyTreeCheckpointHandler(),
      ocp.args.PyTreeRestore(
          abstract,
          restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
          partial_restore=True,
      ),
  )["params"]


def check_params(path: str | os.PathLike, abstract_params: Any) -> None:
  """Raises what `restore_params` would of a checkpoint that has not these."""
  check_architecture(
      locate(path),
      {"params": abstract_params},
      within=tuple(f"params/{group}" for group in abstract_params),
  )


def check_finite(path: str | os.PathLike, params: Any) -> None:
  """Raises UserError where parameters are NaN or infinite: none is measurable."""
  whole = jax.jit(
      lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)
  )
  bad = [
      _name(at)
      for at, finite in jax.tree_util.tree_flatten_with_path(whole(params))[0]
      if not finite
  ]
  if bad:
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise UserError(
        f"checkpoint {path}: expected finite parameters, got NaN or infinity in"
        f" {', '.join(bad[:_SHOWN])}{more}"
    )


def _read(step: epath.Path, item: str, handler: Any, args: Any) -> Any:
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      return checkpointer.restore(step / item, args=args)
  except STORAGE_ERRORS as error:
    raise unreadable(step, error) from error


def unreadable(step: epath.Path, error: Exception) -> UserError:
  """Returns the fault of a step that cannot be read; an earlier one is named."""
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  reason = reason.split(" [tensorstore_spec")[0]
  *_, before, newest = [None, None, *complete_steps(step.parent)]
  if before is not None and step.name == str(newest):
    reason += f"; without its folder step {before} is the newest"
  return UserError(f"checkpoint {step} cannot be read: {reason}")


def _describe(leaf: Any) -> str:
  if leaf is None:
    return "nothing"
  return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def check_architecture(
    step: epath.Path, abstract: Any, *, within: tuple[str, ...] = ("",)
) -> None:
  """Raises UserError if the checkpoint's arrays are not those of `abstract`."""
  try:
    saved = ocp.PyTreeCheckpointHandler().metadata(step / "state").tree
  except STORAGE_ERRORS as error:
    raise unreadable(step, error) from error
  found = {
      _name(path): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(saved)[0]
      if any(_name(path[: w.count("/") + 1]) == w or not w for w in within)
  }
  expected = {
      _name(path): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
  }
  differences = [
      f"{name} is {_describe(found.get(name))}, "
      f"expected {_describe(expected.get(name))}"
      # Parameters before the optimizer's copies of them.
      for name in sorted(
          found.keys() | expected.keys(),
          key=lambda name: (not name.startswith("params/"), name),
      )
      if _describe(found.get(name)) != _describe(expected.get(name))
  ]
  if differences:
    more = len(differences) - _SHOWN
    raise UserError(
        f"checkpoint {step} is of another architecture: "
        + "; ".join(differences[:_SHOWN])
        + (f"; and {more} more" if more > 0 else "")
    )
