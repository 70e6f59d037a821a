"""Takes a run back to an earlier state."""

from collections.abc import Mapping
from typing import Any

import jax
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.distributed import hosts
from mcjepa_jax.step import train_state
from mcjepa_jax.storage import local_files
from mcjepa_jax.training import context
from mcjepa_jax.training.context import RunContext


class RollBack(Exception):
  """Takes a run back to `step` or before; its streams go on from `streams`."""

  def __init__(self, step: int, streams: Mapping[str, Any], reason: str):
    super().__init__(reason)
    self.step = step
    self.streams = streams


def roll_back(run: RunContext, back: RollBack) -> train_state.TrainState:
  """A state of `back.step` or before; the streams go on where they are.

  Raises:
    Stop: this run was rolled back too often.
  """
  count = run.monitor.count("rollback")
  if count > run.config.alarms.rollbacks:
    raise errors.Stop(
        errors.EXIT_ALARM, f"rolled back {count - 1} times before: {back}"
    )
  with run.clock.span("initialise"):
    try:
      with hosts.as_one():
        run.checkpoints.wait_until_finished()
    except errors.UserError as error:  # what it goes back to is an earlier one
      if jax.process_count() > 1:
        raise
      run.monitor.count("checkpoint")
      tqdm.tqdm.write(str(error))
      local_files.append(
          run.workdir / "alarms.jsonl",
          {"step": back.step, "alarm": "checkpoint", "text": str(error)},
      )
    step = run.checkpoints.go_back(back.step)
    if step is None:
      state, seconds = context.first_state(run), run.began
    else:
      state, _, meta = run.checkpoints.restore(step, run.abstract)
      seconds = meta["seconds"]
    run.checkpoints.make_room(state)
    for task, stream in run.streams.items():
      stream.restore(back.streams[task])
  run.clock.lose(seconds)
  run.monitor.forget()
  text = f"Rolled back to step {step or 0}, and past the batch: {back}"
  tqdm.tqdm.write(text)
  local_files.append(
      run.workdir / "alarms.jsonl",
      {"step": step or 0, "alarm": "rollback", "text": text},
  )
  return state
