"""Training: set-up, then the loop, which is the last function."""

from collections import deque
from collections.abc import Callable, Iterator
import dataclasses
import json
import os
import pathlib
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import tqdm

from mcjepa_jax import (
    assembly,
    checkpoint,
    errors,
    evaluate,
    journal,
    objective,
    sharding,
    step as steps,
    validation,
    visualize,
)
from mcjepa_jax.models import mcjepa

EXIT_PREEMPTED = 75
EXIT_ALARM = 76
_PANELS = 4  # pairs in a picture


class Alarm(RuntimeError):
  """Training cannot go on: the loss or a gradient is not finite."""


class Preempted(RuntimeError):
  """A SIGTERM came; the state is saved."""


@dataclasses.dataclass
class Batch:
  """One step's input on the devices, and the streams' states from before it."""

  kind: str
  arrays: dict[str, jax.Array]
  records: dict[str, list[str]]
  streams: dict[str, Any]


def batches(
    config: Any, streams: dict[str, Any], mesh: jax.sharding.Mesh, start: int
) -> Iterator[Batch]:
  """The batch of each step from `start` on, as its kind reads it."""
  for number in range(start, config.num_steps):
    kind = steps.kind_at(config.mode, number, config.motion.start_step)
    before = {task: stream.state() for task, stream in streams.items()}
    arrays, records = {}, {}
    for task in steps.tasks(kind):
      new_arrays, records[task] = next(streams[task])
      arrays |= new_arrays
    yield Batch(kind, sharding.to_global(arrays, mesh), records, before)


def panels(
    config: Any,
    model: mcjepa.MCJEPA,
    params: Any,
    mesh: jax.sharding.Mesh,
    frames: np.ndarray,
) -> dict[str, np.ndarray]:
  """Pictures of interleaved u8 frames: flow panels and feature PCA."""
  frames = frames[: 2 * _PANELS]
  count = len(frames) // 2
  predict = evaluate.flow_predictor(model, params, mesh)
  both = np.stack([frames.reshape(count, 2, *frames.shape[1:])] * 2)
  both[1] = both[1][:, ::-1]
  flows = predict(both.reshape(-1, *frames.shape[1:]))
  visible = objective.motion_mask(
      jnp.stack([flows[:count], flows[count:]], 1).reshape(
          -1, *flows.shape[1:]
      ),
      occlusion="forward_backward",
      out_of_frame=True,
  )
  visible = np.asarray(visible)[::2]
  rows = [
      visualize.flow_panel(
          frames[2 * i], frames[2 * i + 1], flows[i], visible=visible[i]
      )
      for i in range(count)
  ]
  return {"flow": visualize.grid(rows, columns=1)}


def check_finite(step: int, logs: dict[str, float]) -> None:
  """Raises Alarm if anything logged is not finite, with all that is not."""
  bad = [name for name, value in logs.items() if not np.isfinite(value)]
  if bad:
    raise Alarm(f"step {step}: not finite: {', '.join(sorted(bad))}")


def peak_rss_gb() -> float:
  """Peak resident memory of this process and its live children, in GB.

  A sum of peaks: at least what the tree ever held at once.
  """
  total = 0
  for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    try:
      status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
      continue
    for line in status.splitlines():
      if line.startswith("VmHWM:"):
        total += 1024 * int(line.split()[1])
  return total / 1e9


def compiled_steps(
    config: Any,
    model: mcjepa.MCJEPA,
    optimizers: dict[str, Any],
    abstract: steps.TrainState,
    mesh: jax.sharding.Mesh,
) -> dict[str, Callable[..., Any]]:
  """The jitted step of each kind that this run has."""
  recipe = assembly.recipe(config)
  starts = config.motion.start_step
  kinds = {
      steps.kind_at(config.mode, number, starts)
      for number in (0, starts, starts + 1)
      if number < config.num_steps
  }
  return {
      kind: steps.jit_train_step(
          steps.make_train_step(model, optimizers, recipe, kind), abstract, mesh
      )
      for kind in kinds
  }


def resumable_config(config: Any) -> dict[str, Any]:
  """The part of a config that a resumed run must share, flat."""
  flat = validation.flatten(config)
  return {
      key: value
      for key, value in flat.items()
      if key.split(".")[0] not in validation.OPERATIONAL
  }


def check_resume(config: Any, workdir: pathlib.Path) -> None:
  """Raises UserError if the workdir holds a run of another config."""
  path = workdir / "config.json"
  if not path.exists():
    return
  saved = json.loads(path.read_text())
  ours = json.loads(json.dumps(resumable_config(config)))
  faults = [
      f"{key}: the run in {workdir} has {saved.get(key)!r}, this config"
      f" {ours.get(key)!r}; use another workdir"
      for key in sorted(saved.keys() | ours.keys())
      if saved.get(key) != ours.get(key)
  ]
  if faults:
    raise errors.UserError(*faults)


def prepare_workdir(workdir: pathlib.Path) -> None:
  """Makes the folder and makes sure that it can be written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".write_test.{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise errors.UserError(
        f"workdir: cannot write {workdir}: {error.strerror}"
    ) from error


def finish(
    config: Any,
    workdir: pathlib.Path,
    model: mcjepa.MCJEPA,
    state: steps.TrainState,
    mesh: jax.sharding.Mesh,
    clock: journal.Clock,
) -> dict[str, Any]:
  """Evaluates the trained parameters and writes the results."""
  with clock.span("evaluate"):
    initial = jax.jit(lambda: mcjepa.init_params(model, config.seed))()
    results = evaluate.run_evals(config, model, state.params, initial, mesh)
  seconds = clock.seconds()
  install = os.environ.get("MCJEPA_INSTALL_SECONDS")
  if install:
    results["seconds/install"] = float(install)
  results |= {f"seconds/{name}": value for name, value in seconds.items()}
  # The step's time is what training is; the budget's name for it.
  results["seconds/train"] = seconds.get("step", 0.0) + seconds.get("input", 0.0)
  results["peak_rss_gb"] = peak_rss_gb()
  results |= {
      "meta/config": config.name,
      "meta/step": int(state.step),
      "meta/commit": evaluate.commit(),
      "meta/devices": evaluate.describe_devices(),
      "meta/versions": evaluate.versions(),
  }
  journal.write_json(workdir / "results.json", results)
  return results


def train(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains to `config.num_steps`, resuming what the workdir holds.

  Returns the results of the final evaluation, which WORKDIR/results.json
  holds too.

  Raises:
    UserError: the config, the data or the workdir cannot be used.
    Alarm: something is not finite; the newest checkpoint is from before.
    Preempted: SIGTERM came; the state is saved.
  """
  clock = journal.Clock()
  streams, mesh = set_up_input(config, workdir)
  model, optimizers = assembly.model(config), assembly.optimizers(config)
  abstract = steps.abstract_state(
      model,
      optimizers,
      mesh,
      min_bytes=int(config.mesh.shard_min_mib * 2**20),
      seed=config.seed,
  )
  meta = {
      "config": config.name,
      "model": config.model.to_dict(),
      "seed": config.seed,
      "versions": evaluate.versions(),
  }
  with checkpoint.Checkpoints(
      workdir / "checkpoints",
      keep_last=config.keep_last,
      keep_best=config.keep_best,
      best_mode=config.keep_best_mode,
  ) as checkpoints:
    newest = checkpoints.latest_step()
    if newest == config.num_steps and (workdir / "results.json").exists():
      results = json.loads((workdir / "results.json").read_text())
      print(f"Finished at step {newest}; to train again, use another workdir.")
      print(evaluate.table(results))
      return results
    with clock.span("restore" if newest is not None else "initialise"):
      state = first_state(config, model, optimizers, abstract, mesh)
      if newest is not None:
        state, saved = checkpoints.restore(newest, abstract)
        for task, stream in streams.items():
          stream.restore(saved[task])
    state = run_loop(
        config, workdir, model, optimizers, abstract, mesh, state, streams,
        checkpoints, meta, clock,
    )  # fmt: skip
    results = finish(config, workdir, model, state, mesh, clock)
  print(evaluate.table(results))
  return results
