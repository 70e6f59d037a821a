"""From parameters to numbers: the evals of a config, as flat JSON."""

from collections.abc import Sequence
import os
import pathlib
import time
from typing import Any

from mcjepa_jax import errors, loading
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import eval_subject, inference, registry, result_table
from mcjepa_jax.evals.adapters import segmentation_adapter
from mcjepa_jax.models import mcjepa
from mcjepa_jax.runtime import environment
from mcjepa_jax.storage import local_files, paths, run_folder
from mcjepa_jax.training import build, validation

_RESULTS = "evaluation.json"


def evaluate(config: Any, workdir: str | os.PathLike) -> dict[str, Any]:
  """Restores `config.checkpoint`, runs the evals, writes and returns them.

  The model and the seed of the random-init rows are the checkpoint's own. Evals
  whose data are not there, or not whole, are told first; the others run.

  Raises:
    UserError: with all that is wrong with config, checkpoint and target, before
      anything is loaded; with why an eval did not run, once the others are
      written.
  """
  with run_folder.opened(workdir) as folder:
    return _evaluate(config, folder)


def _evaluate(config: Any, folder: run_folder.Folder) -> dict[str, Any]:
  started = time.perf_counter()
  path = paths.path(config.checkpoint or folder.address)
  target = folder.local / _RESULTS
  if config.results:
    target = pathlib.Path(config.results).expanduser()
  described = []
  unreadable = errors.collect(
      lambda: described.append(loading.model_and_meta(path))
  )
  found = registry.faults(config, folder.local)
  runnable = [entry for entry in config.evals if entry not in found.by_eval]
  missing = [f for faults in found.by_eval.values() for f in faults]
  faults = validation.faults(config) + found.mistakes + unreadable
  for model, _ in described:
    faults += _stride_faults(config, runnable, model.encoder.strides)
  if not runnable:
    faults += missing
  if not config.evals:
    faults.append("evals: expected at least one, got none")
  if target.is_dir():
    faults.append(f"results: expected a file to write, got the folder {target}")
  faults += errors.collect(
      lambda: local_files.check_writable(target.parent, "results")
  )
  if faults:
    raise errors.UserError(*dict.fromkeys(faults))
  for entry, reasons in found.by_eval.items():
    print("\n".join(f"{entry} cannot run: {reason}" for reason in reasons))
  mesh = build.mesh(config)
  model, params, meta = loading.load(path, mesh=mesh)
  with config.unlocked():
    config.seed = meta["seed"]
  initial = sharding.call_once(lambda: mcjepa.init_params(model, config.seed))
  about = {
      "meta/config": meta.get("config", ""),
      "meta/checkpoint": str(path),
      "meta/step": meta["step"],
      "meta/commit": environment.commit(),
      "meta/devices": environment.describe_devices(),
      "meta/versions": environment.versions(),
  }

  def write(results, faults=()):
    about["meta/seconds"] = time.perf_counter() - started
    # Also of what still runs: it may be killed.
    absent = [e for e in config.evals if f"meta/seconds/{e}" not in results]
    about[result_table.NOT_EVALUATED] = "; ".join([*absent, *missing, *faults])
    if not about[result_table.NOT_EVALUATED]:
      del about[result_table.NOT_EVALUATED]
    local_files.write_json(target, results | about)
    folder.push()

  results, faults = registry.run(
      eval_subject.Subject(config, model, params, initial, mesh, folder.local),
      runnable,
      ended=write,
  )
  write(results, faults)
  results |= about
  print(result_table.table(results))
  if missing or faults:
    raise errors.UserError(*dict.fromkeys(missing + faults))
  return results


def _stride_faults(
    config: Any, evals: Sequence[str], strides: tuple[int, ...]
) -> list[str]:
  """What of the config evals cannot do with an encoder of these strides."""
  kinds = {entry.partition("/")[0] for entry in evals}
  found = []
  if "davis" in kinds:
    found += errors.collect(
        lambda: inference.check_stride(config.davis.stride, strides)
    )
  for kind in kinds.intersection(segmentation_adapter.KINDS):
    found += segmentation_adapter.crop_faults(
        kind, config[kind].crop, strides[-1]
    )
  return found
