"""Saves the checkpoints of a run, and says when one is due."""

import contextlib
import time
from typing import Any

from mcjepa_jax import errors
from mcjepa_jax.runtime import environment, signals
from mcjepa_jax.step import task_schedule, train_state
from mcjepa_jax.training import reports
from mcjepa_jax.training.context import RunContext


def save(
    run: RunContext,
    state: train_state.TrainState,
    streams: dict[str, Any],
    *,
    hurry: bool = False,
) -> errors.UserError | None:
  """Starts an asynchronous checkpoint of the state and the streams.

  Returns why the logs could not be copied to their bucket before it, if so.
  In a `hurry`, or where SIGTERM ends that, it is not evaluated, and is never
  the best; the last step always is evaluated.
  """
  config = run.config
  metrics = {}
  last = int(state.step) == config.num_steps
  heard = contextlib.nullcontext() if last else signals.until_sigterm(run.stop)
  if config.keep_best and not hurry:
    # On scenes of their own: what is reported chooses no checkpoint.
    with run.clock.span("evaluate"), heard:
      metrics = reports.evaluations_on_the_way(run, state, config.eval_seed + 1)
  refused = None
  try:
    run.folder.push()  # before: what goes on from here finds its logs
  except errors.UserError as error:
    refused = error
  # Also then: of many hosts each has its own logs, and all save together.
  run.checkpoints.save(
      int(state.step),
      state,
      streams,
      {
          "config": config.name,
          "model": config.model.to_dict(),
          "content_size": config.content.size,
          "motion_size": list(config.motion.size),
          "seed": config.seed,
          "versions": environment.versions(),
          "seconds": run.clock.seconds(),
          "time": time.time(),
          # By the name that earlier checkpoints have.
          "watch": run.monitor.state(),
      },
      metrics,
  )
  return refused


def is_save_step(config: Any, number: int) -> bool:
  """Whether the state is saved before a step."""
  # The first step with flow is compiled, which takes minutes.
  return number % config.save_every == 0 or task_schedule.is_first_with_flow(
      config.mode, number, config.motion.start_step
  )
