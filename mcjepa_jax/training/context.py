"""The parts of a run, and what the loop begins with: state, batches and steps."""

from collections.abc import Iterator
import dataclasses
import pathlib
import threading
from typing import Any

import jax

from mcjepa_jax.compiled.compiled_steps import CompiledSteps
from mcjepa_jax.distributed import sharding
from mcjepa_jax.models import mcjepa
from mcjepa_jax.runtime import run_clock
from mcjepa_jax.step import task_schedule, train_state, update
from mcjepa_jax.storage import checkpoint, checkpoint_reader, run_folder
from mcjepa_jax.training import alarms, build


@dataclasses.dataclass
class RunContext:
  """What the loop needs; of it only what counts and watches changes."""

  config: Any
  workdir: pathlib.Path  # where this host's logs are
  folder: run_folder.Folder
  model: mcjepa.MCJEPA
  optimizers: dict[str, Any]
  abstract: train_state.TrainState
  mesh: jax.sharding.Mesh
  streams: dict[str, Any]
  checkpoints: checkpoint.Checkpoints
  clock: run_clock.Clock
  monitor: alarms.AlarmMonitor
  compiled_steps: CompiledSteps
  began: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds
  stop: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass
class Batch:
  """One step's input on the devices, and the streams' states from before it."""

  kind: str
  arrays: dict[str, jax.Array]
  records: dict[str, list[str]]
  faults: dict[str, list[tuple[str, str]]]
  streams: dict[str, Any]


def first_state(run: RunContext) -> train_state.TrainState:
  """A new state, made straight into its shardings."""
  config = run.config
  state = sharding.call_once(
      lambda: train_state.init_state(run.model, run.optimizers, config.seed),
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, run.abstract),
  )
  if config.init_checkpoint:
    encoder = checkpoint_reader.restore_params(
        config.init_checkpoint, {"encoder": run.abstract.params["encoder"]}
    )
    state = state.replace(params=state.params | encoder)
  return state


def begin_step(run: RunContext) -> None:
  """Starts on the batch of step 0, and on its program where its size is known."""
  config = run.config
  kind = task_schedule.kind_at(config.mode, 0, config.motion.start_step)
  for task in task_schedule.tasks(kind):
    run.streams[task].start()
  size, *others = build.motion_sizes(config)
  if others and "motion" in task_schedule.tasks(kind):
    return
  shapes = build.batch_shapes(config, kind, size)
  run.compiled_steps.begin(kind, run.abstract, shapes)


def step_batches(run: RunContext, start: int) -> Iterator[Batch]:
  """The batch of each step from `start` on, as its kind reads it."""
  config = run.config
  for number in range(start, config.num_steps):
    kind = task_schedule.kind_at(config.mode, number, config.motion.start_step)
    before = {task: stream.state() for task, stream in run.streams.items()}
    arrays, records, faults = {}, {}, {}
    for task in task_schedule.tasks(kind):
      part = next(run.streams[task])
      arrays |= part.arrays
      records[task], faults[task] = part.records, part.faults
    arrays = sharding.to_global(arrays, run.mesh)
    yield Batch(kind, arrays, records, faults, before)


def compiled_steps(
    config: Any,
    model: mcjepa.MCJEPA,
    optimizers: dict[str, Any],
    abstract: train_state.TrainState,
    mesh: jax.sharding.Mesh,
) -> CompiledSteps:
  """The steps of each kind that a run has; none is compiled yet."""
  recipe = build.recipe(config)
  start = config.motion.start_step
  kinds = {
      task_schedule.kind_at(config.mode, number, start)
      for number in (0, start, start + 1)
      if number < config.num_steps
  }
  sizes = len(build.motion_sizes(config))
  functions = {
      kind: update.jit_train_step(
          update.make_train_step(model, optimizers, recipe, kind),
          abstract,
          mesh,
      )
      for kind in kinds
  }
  return CompiledSteps(
      functions,
      expected={
          kind: sizes if "motion" in task_schedule.tasks(kind) else 1
          for kind in kinds
      },
      devices=mesh.size,
  )
