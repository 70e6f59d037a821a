"""What the loop does about a step that has run: shows it, judges it, acts."""

from collections.abc import Iterator
import contextlib
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.distributed import hosts
from mcjepa_jax.step import diagnostics, train_state
from mcjepa_jax.training import alarms, bad_steps, build, recovery
from mcjepa_jax.training.context import Batch, RunContext
from mcjepa_jax.training.progress import Progress

Streams = dict[str, Any]


@dataclasses.dataclass
class _Pending:
  """A step that was dispatched."""

  number: int
  batch: Batch
  logs: dict[str, jax.Array]


class StepWatcher:
  """Fetches the logs of a step once the next one is dispatched, and acts."""

  def __init__(self, run: RunContext, progress: Progress):
    self._run = run
    self._progress = progress
    self._pending: _Pending | None = None
    self._first = False  # whether no step of this process has run
    self._diagnosis = diagnostics.Diagnosis(
        run.model, build.recipe(run.config), run.mesh
    )

  def before(
      self,
      number: int,
      state: train_state.TrainState,
      batch: Batch,
      following: Batch | None,
  ) -> None:
    """Compiles the step of a batch where it is new; diagnoses now and then.

    What alternates between the tasks is diagnosed on the `following` batch, too.
    """
    run = self._run
    if not run.compiled_steps.is_compiled(batch.kind, batch.arrays):
      self._first = not run.compiled_steps.compiles
      with run.clock.span("compile"):
        run.compiled_steps.compile(batch.kind, state, batch.arrays)
      if (more := run.compiled_steps.beyond(batch.kind)) > 0:
        run.monitor.count("recompilation")
        shapes = {name: x.shape for name, x in batch.arrays.items()}
        self._progress.alarm(
            number,
            "recompilation",
            f"the {batch.kind} step was compiled for {more} more than the"
            f" config needs; the last for {shapes}",
        )
    every = run.config.alarms.diagnose_every
    if every and number and number % every == 0:
      with run.clock.span("evaluate"):
        arrays = batch.arrays
        if run.config.mode == "alternate" and following is not None:
          arrays = following.arrays | arrays
        values = self._diagnosis(state, arrays)
      self._progress.log.scalars(number, values)
      self._act(number, run.monitor.judge(number, values), batch.streams)

  @contextlib.contextmanager
  def writing(self, number: int) -> Iterator[None]:
    """Notes a checkpoint that failed inside; raises at the second in a row.

    Of several hosts at the first.
    """
    try:
      with hosts.as_one():
        yield
    except errors.UserError as error:
      if jax.process_count() > 1 or self._run.checkpoints.failures > 1:
        raise
      self.note(number, error)

  def note(self, number: int, error: errors.UserError) -> None:
    """Shows and counts what could not be saved."""
    self._run.monitor.count("checkpoint")
    self._progress.alarm(
        number, "checkpoint", f"{error}; the next save tries again"
    )

  def dispatched(
      self, number: int, batch: Batch, logs: dict[str, jax.Array]
  ) -> None:
    """Keeps what a step will have logged; waits for the very first."""
    if self._first:
      self._first = False
      with self._run.clock.span("step"):
        jax.block_until_ready(logs)
      since = time.perf_counter() - self._run.clock.started
      self._progress.note(f"First step finished {since:.0f} s after the start.")
    self._pending = _Pending(number, batch, logs)

  def finish_pending(
      self, state: train_state.TrainState, following: Streams
  ) -> tuple[train_state.TrainState, bool]:
    """The state to go on with, and whether the pending update was skipped.

    Args:
      state: after the pending step, or after the one that follows it.
      following: the streams' states from before the batch that follows.

    Raises:
      RollBack, Stop: as the config says of what was noticed.
    """
    pending, self._pending = self._pending, None
    if pending is None:
      return state, False
    with self._run.clock.span("step"):
      logs = jax.device_get(pending.logs)
      values = {name: float(value) for name, value in logs.items()}
      monitor, fired, total = self._run.monitor, [], 0
      if values["skipped"]:
        total = monitor.skip()
      else:
        monitor.skipped_in_a_row = 0
        fired = monitor.judge(pending.number, values)
      self._progress.report(pending.number, values)
      with self.writing(pending.number):
        self._run.checkpoints.check_errors()
    if values["skipped"]:
      self._skipped(pending, values, total, state, following)
      where = self._run.abstract.skipped.sharding
      cleared = jax.device_put(np.zeros((), bool), where)
      return state.replace(skipped=cleared), True
    self._act(pending.number, fired, following)
    return state, False

  def _skipped(
      self,
      pending: _Pending,
      values: dict[str, float],
      total: int,
      state: train_state.TrainState,
      following: Streams,
  ) -> None:
    """Dumps what was skipped; rolls back after a row, stops after too many."""
    run, limits = self._run, self._run.config.alarms
    bad = sorted(name for name, x in values.items() if not np.isfinite(x))
    text = f"update skipped, not finite: {', '.join(bad)}"
    text += self._dumped(pending, values, state)
    self._progress.alarm(
        pending.number, "not_finite", text, records=pending.batch.records
    )
    if total >= limits.skips:
      raise errors.Stop(
          errors.EXIT_ALARM,
          f"step {pending.number}: {total} updates were skipped: {text}",
      )
    if run.monitor.skipped_in_a_row >= limits.skips_in_a_row:
      reason = f"{run.monitor.skipped_in_a_row} updates in a row were skipped"
      raise recovery.RollBack(
          pending.number - run.monitor.skipped_in_a_row + 1, following, reason
      )

  def _dumped(
      self,
      pending: _Pending,
      values: dict[str, float],
      state: train_state.TrainState,
  ) -> str:
    """Keeps a step to look at; how to, for the line that tells of it."""
    run, step = self._run, pending.number
    address, limit = run.folder.address, run.config.alarms.dumps
    try:
      if not bad_steps.has_room(address, step=step, limit=limit):
        return ""
    except errors.UserError as error:
      return f"; not dumped: {'; '.join(error.messages)}"
    with run.clock.span("checkpoint"):
      with self.writing(step):
        run.checkpoints.wait_until_finished()
      try:
        folder = bad_steps.save(
            address,
            state,
            step=step,
            kind=pending.batch.kind,
            arrays=pending.batch.arrays,
            records=pending.batch.records,
            logs=values,
            config=run.config,
        )
      except errors.UserError as error:
        # The others may wait for this one's part.
        if jax.process_count() > 1 and isinstance(error, errors.TransientError):
          raise
        return f"; not dumped: {'; '.join(error.messages)}"
    return f"; python -m mcjepa_jax.replay --dump={folder}"

  def _act(
      self, number: int, fired: list[alarms.Alarm], following: Streams
  ) -> None:
    """Shows the alarms that fired, and does what the config says."""
    for alarm in fired:
      self._progress.alarm(
          number, alarm.rule.name, str(alarm), value=alarm.value
      )
    action = self._run.config.alarms.action
    if not fired or action == "log":
      return
    reason = "; ".join(map(str, fired))
    if action == "stop":
      raise errors.Stop(errors.EXIT_ALARM, f"step {number}: {reason}")
    # Before what was judged.
    lasted = max(alarm.rule.lasts for alarm in fired)
    raise recovery.RollBack(number - lasted, following, reason)
