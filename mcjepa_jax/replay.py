"""Runs a step again that a run skipped, with checks on.

  python -m mcjepa_jax.replay --dump=WORKDIR/dumps/step_STEP

Says which terms, which monitors and which leaves of the gradient are not
finite, and which line of code the first NaN, or else the first infinity, comes
from. The last line of stdout is a JSON object:

  step, kind, records      of the dump
  terms                    logged values that are not finite
  gradients                leaves of the gradient that are not finite
  operation                where the first such value appears; null if none
  loss, loss_then          now, and as the run logged it

Exit code: 0 if the step is not finite here either, 1 if it is finite, 2 for a
fault of the input.
"""

from collections.abc import Callable, Sequence
import json
import pathlib
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.distributed import sharding
from mcjepa_jax.runtime import command_line
from mcjepa_jax.step import gradients, train_state
from mcjepa_jax.storage import checkpoint_reader, run_folder
from mcjepa_jax.training import bad_steps, build, validation

_PACKAGE = str(pathlib.Path(__file__).resolve().parent)


def _first_bad_operation(function: Callable[[], Any]) -> str | None:
  """The line that makes the first NaN, or infinity, in a jitted call."""
  for flag in (jax.debug_nans, jax.debug_infs):
    try:
      with flag(True):
        jax.block_until_ready(function())
    except FloatingPointError as error:
      frames = traceback.extract_tb(error.__traceback__)
      own = [f for f in frames if f.filename.startswith(_PACKAGE)]
      reason = str(error).splitlines()[0]
      if not own:
        return reason
      last = own[-1]
      name = pathlib.Path(last.filename).relative_to(_PACKAGE)
      return f"{name}:{last.lineno}: {last.line} ({reason})"
  return None


def _not_finite(tree: Any) -> list[str]:
  return [
      jax.tree_util.keystr(path, simple=True, separator="/")
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
      if not np.all(np.isfinite(leaf))
  ]


def replay(folder: pathlib.Path) -> dict[str, Any]:
  """The report on a dump's step, run again.

  Raises:
    UserError: there is no dump, or none that this version reads.
  """
  meta, config = bad_steps.read_meta(folder)
  try:
    with config.unlocked():
      config.data_cache = ""  # its rows are in the dump
      config.mesh.update(devices=1, data=-1, shard=-1)
    faults = validation.faults(config, devices=1)
  except (AttributeError, KeyError, TypeError) as error:
    faults = [f"{type(error).__name__}: {error}"]
  if faults:
    raise errors.UserError(
        *(f"{folder}: its config cannot be used: {fault}" for fault in faults)
    )
  # Of the devices here as many as divide its batch, whatever those of the run.
  fitting = range(len(sharding.all_devices()), 0, -1)
  config.mesh.devices = next(
      n for n in fitting if not validation.faults(config, devices=n)
  )
  kind = meta["kind"]
  arrays = bad_steps.read_arrays(folder, kind, meta["hosts"])
  mesh = build.mesh(config)
  model, recipe = build.model(config), build.recipe(config)
  abstract = build.abstract_state(config, model, build.optimizers(config), mesh)
  params = checkpoint_reader.restore_params(folder, abstract.params)
  batch = sharding.to_global(arrays, mesh)
  state = train_state.TrainState(
      step=jnp.asarray(meta["step"], jnp.int32),
      params=params,
      opt_state={},  # the gradient does not ask for it
      key=jnp.asarray(meta["key"], jnp.uint32),
      skipped=jnp.zeros((), bool),
  )
  gradient = gradients.make_gradient(model, recipe, kind)
  logs, grads = jax.device_get(jax.jit(gradient)(state, batch))
  terms, leaves = _not_finite(logs), _not_finite(grads)
  operation = None
  if terms or leaves:
    operation = _first_bad_operation(lambda: jax.jit(gradient)(state, batch))
  return {
      "step": meta["step"],
      "kind": kind,
      "records": meta["records"],
      "terms": terms,
      "gradients": leaves,
      "operation": operation,
      "loss": float(logs["loss"]),
      "loss_then": meta["logs"].get("loss"),
  }


def main(argv: Sequence[str] | None = None) -> int:
  """The exit code of the command; its report is printed."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    arguments = command_line.split(argv, ("dump",))
    (address,) = command_line.single(
        arguments.flags, remote=("dump",), dump="WORKDIR/dumps/step_STEP"
    )
    with run_folder.fetched(address) as folder:
      report = replay(folder)
    for name in ("terms", "gradients"):
      for entry in report[name]:
        print(f"Not finite: {entry}")
    if report["operation"]:
      print(f"First at {report['operation']}")
    print(json.dumps(report), flush=True)
    if not report["terms"] and not report["gradients"]:
      raise errors.Stop(1, f"Step {report['step']} is finite here.")

  return command_line.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
