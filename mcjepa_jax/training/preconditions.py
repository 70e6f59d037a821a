"""What is looked at before a run trains: config, data, workdir, devices."""

import json
import sys
from typing import Any

import jax

from mcjepa_jax import errors
from mcjepa_jax.distributed import hosts, sharding
from mcjepa_jax.evals import registry
from mcjepa_jax.models import mcjepa
from mcjepa_jax.runtime import config_files
from mcjepa_jax.storage import checkpoint_reader, local_files, run_folder
from mcjepa_jax.training import build, validation


def input_and_mesh(
    config: Any, folder: run_folder.Folder
) -> tuple[dict[str, Any], jax.sharding.Mesh]:
  """The streams and the mesh, after every check that needs no compilation.

  Raises:
    UserError: with all that is wrong with config, data and workdir.
  """
  sharding.all_devices()  # where there are none, nothing below can be told
  mesh, streams = [], {}
  faults = errors.collect(lambda: mesh.append(build.mesh(config)))
  faults += validation.faults(config, devices=mesh[0].size if mesh else None)
  for check in (
      lambda: local_files.check_writable(folder.local, "workdir"),
      lambda: check_resume(config, folder),
      lambda: check_init_checkpoint(config, folder),
      lambda: build.optimizers(config),
      lambda: faults.extend(validation.no_way_back(config)),
      lambda: streams.update(build.streams(config)),
      # The first batches: what of them cannot be decoded or cut is told before
      # anything is compiled.
      lambda: [stream[0] for stream in streams.values()],
      lambda: faults.extend(registry.check(config, folder.local)),
  ):
    try:
      faults.extend(errors.collect(check))
    except Exception:
      if not faults:  # else it stumbled over a value that is already named
        raise
  data = {task: s.state()["fingerprint"] for task, s in streams.items()}
  hosts.agree(
      {"config": config_files.leaves(config), "data": data},
      list(dict.fromkeys(faults)),
  )
  hosts.check_shared(folder)
  hosts.check_alike(
      "newest checkpoint", checkpoint_reader.newest_step(folder.address)
  )
  if hosts.first():
    for line in build.miscounts(config, streams):
      print(f"warning: {line}", file=sys.stderr)
  return streams, mesh[0]


def check_init_checkpoint(config: Any, folder: run_folder.Folder) -> None:
  """Raises UserError if the encoder to start from is not there or another."""
  if not config.init_checkpoint:
    return
  # It has started.
  if checkpoint_reader.newest_step(folder.address) is not None:
    return
  model = build.model(config)
  encoder = jax.eval_shape(lambda: mcjepa.init_params(model, 0))["encoder"]
  checkpoint_reader.check_params(config.init_checkpoint, {"encoder": encoder})


def resumable_config(config: Any) -> dict[str, Any]:
  """The part of a config that a resumed run must share, flat."""
  return {
      key: value
      for key, value in config_files.leaves(config).items()
      if key.split(".")[0] not in validation.OPERATIONAL
  }


def check_resume(config: Any, folder: run_folder.Folder) -> None:
  """Raises UserError if the workdir holds a run of another config."""
  path = folder.local / run_folder.CONFIG
  # A run that ended before it could save left nothing to resume.
  if not path.exists() or not checkpoint_reader.has_checkpoints(folder.address):
    return
  try:
    saved = dict(json.loads(path.read_text()))
  except (OSError, TypeError, ValueError) as error:
    raise errors.UserError(
        f"{path}: expected the config of the run, got: {error}"
    ) from error
  # Through JSON, where a tuple is a list.
  ours = json.loads(json.dumps(resumable_config(config)))
  faults = [
      f"{key}: the run in {folder.address} has {saved.get(key)!r}, this config"
      f" {ours.get(key)!r}; use another workdir"
      for key in sorted(saved.keys() | ours.keys())
      if saved.get(key) != ours.get(key)
  ]
  if faults:
    raise errors.UserError(*faults)
