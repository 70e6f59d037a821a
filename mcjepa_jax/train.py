"""Training: set-up, then the loop, which is the last function."""

from collections import deque
import contextlib
import os
import time
from typing import Any

from clu import parameter_overview
import jax

from mcjepa_jax import errors
from mcjepa_jax.distributed import hosts
from mcjepa_jax.evals import result_table
from mcjepa_jax.runtime import (
    process_lifetimes,
    process_memory,
    run_clock,
    signals,
)
from mcjepa_jax.step import train_state
from mcjepa_jax.storage import checkpoint, local_files, run_folder, workdir_lock
from mcjepa_jax.training import (
    alarms,
    build,
    context,
    preconditions,
    recovery,
    reports,
    saving,
    step_watcher,
)
from mcjepa_jax.training.context import Batch, RunContext
from mcjepa_jax.training.progress import Progress


def train(config: Any, workdir: str | os.PathLike) -> dict[str, Any]:
  """The results of the final evaluation, after training to `num_steps`.

  Resumes what the workdir holds, a folder or gs://BUCKET/FOLDER; a finished one
  is only read.

  Raises:
    UserError: the config, the data or the workdir cannot be used.
    Stop: an alarm ends it (76), SIGTERM came and the state is saved (75), or a
      worker or a bucket failed in the steps (77).
  """
  # In the steps the loop's own handler takes its place.
  with signals.on_sigterm(signals.stop_unsaved):
    try:
      with run_folder.opened(workdir) as folder:
        streams, mesh = preconditions.input_and_mesh(config, folder)
        return _train(config, folder, streams, mesh)
    except errors.TransientError as error:  # no fault of the input
      raise errors.Stop(errors.EXIT_LOST, f"error: {error}") from error


def _train(
    config: Any,
    folder: run_folder.Folder,
    streams: dict[str, Any],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  clock = run_clock.Clock(run_clock.process_start())
  workdir = folder.local
  model, optimizers = build.model(config), build.optimizers(config)
  abstract = build.abstract_state(config, model, optimizers, mesh)
  with (
      local_files.refusal_told(workdir),
      workdir_lock.sole_owner(workdir)
      if hosts.first()
      else contextlib.nullcontext(),
      contextlib.ExitStack() as stack,
      checkpoint.Checkpoints(
          folder.address,
          keep_last=config.keep_last,
          keep_hours=config.keep_hours,
          keep_best=config.keep_best,
          metric=config.best_metric,
          larger_is_better=config.best_is_larger,
      ) as checkpoints,
  ):
    newest = checkpoints.latest_step()
    results = reports.read_results(workdir)
    if newest == config.num_steps and results.get("meta/step") == newest:
      print(f"Finished at step {newest}; to train again, use another workdir.")
      print(result_table.table(results))
      return results
    earlier = stack.enter_context(
        process_lifetimes.record_lifetime(
            folder, clock.started, first=hosts.first()
        )
    )
    workdir = hosts.log_folder(workdir)
    local_files.write_json(
        workdir / run_folder.CONFIG, preconditions.resumable_config(config)
    )
    (workdir / "parameters.txt").write_text(
        parameter_overview.get_parameter_overview(
            abstract.params, include_stats=False
        )
    )
    run = RunContext(
        config, workdir, folder, model, optimizers, abstract, mesh,
        streams, checkpoints, clock, alarms.AlarmMonitor(config),
        context.compiled_steps(config, model, optimizers, abstract, mesh),
    )  # fmt: skip
    try:
      with clock.span("initialise"):
        if newest is None:
          context.begin_step(run)
          state = context.first_state(run)
          lost = process_lifetimes.lost_seconds(earlier, 0.0)
        else:
          state, saved, meta = checkpoints.restore(newest, abstract)
          clock.add(meta["seconds"])
          lost = process_lifetimes.lost_seconds(
              earlier, meta.get("time", time.time())
          )
          run.monitor.restore(meta["watch"])
          for task, stream in streams.items():
            stream.restore(saved[task])
          print(f"Resumed at step {newest} of {config.num_steps}.")
        clock.add({"lost": lost, "total": lost})
        checkpoints.make_room(state)
      run.began = clock.seconds()
      state = run_loop(run, state)
      if run.stop.is_set():  # after the last step was saved
        signals.stop_unsaved()
      peak_gb = process_memory.peak_rss_gb()  # while the workers live
    finally:
      for stream in streams.values():
        stream.close()
    # All is saved: of many hosts, too, one that has to go asks no other.
    with signals.on_sigterm(signals.stop_unsaved, alone=True):
      results = reports.finish(run, state, peak_gb)
  print(result_table.table(results))
  print(f"Pictures and curves: {workdir / 'pictures'}")
  return results


def is_report_step(config: Any, number: int) -> bool:
  """Whether something is evaluated or drawn before a step."""
  every = config.eval_every, config.panel_every
  return number > 0 and any(n and number % n == 0 for n in every)


def run_loop(
    run: RunContext, state: train_state.TrainState
) -> train_state.TrainState:
  """The trained state, by as many ways back as the alarms allow."""
  rolled_back = False
  with signals.stop_on_sigterm(run.stop):
    while True:
      try:
        return run_steps(run, state, rolled_back)
      except recovery.RollBack as back:
        state, rolled_back = recovery.roll_back(run, back), True


def run_steps(
    run: RunContext, state: train_state.TrainState, rolled_back: bool
) -> train_state.TrainState:
  """The trained state: save, evaluate, next batch, dispatch, finish the step before.

  What is finished is the step BEFORE the one dispatched, so that the host never
  waits. A checkpoint holds the streams as of the next batch to be consumed:
  the queue runs ahead, so each queued batch carries its streams' states.

  It is saved before it is evaluated for the logs. A run that goes on from a step
  evaluates there again: its lines from that step on were dropped.

  Raises:
    RollBack: to an earlier state. The first step from there is saved, so that
      no resumed run meets the batches that were passed over.
  """
  config, clock = run.config, run.clock
  start = int(state.step)
  for stream in run.streams.values():
    stream.start()  # the workers fill their queues while the step compiles
  source = context.step_batches(run, start)
  queue: deque[Batch] = deque()
  progress = Progress(run, start)
  watcher = step_watcher.StepWatcher(run, progress)
  hang_timer = signals.HangTimer(config.hang_seconds)
  kept = start  # the step from which a run that ends now would go on

  def following():
    if queue:
      return queue[0].streams
    return {task: stream.state() for task, stream in run.streams.items()}

  def keep(state, number, *, hurry):
    nonlocal kept
    refused = None
    state, _ = watcher.finish_pending(state, following())
    # In a row of skipped updates what was saved before it stays newest.
    if hurry or not run.monitor.skipped_in_a_row:
      with clock.span("checkpoint"), watcher.writing(number):
        refused = saving.save(run, state, following(), hurry=hurry)
        kept = number
      if refused:
        watcher.note(number, refused)
    return state

  try:
    for number in range(start, config.num_steps):
      hang_timer.step()
      stopping = number > start and signals.stopping(run.stop)
      first = rolled_back and number == start + 1
      periodic = number > start and saving.is_save_step(config, number)
      if not stopping and (first or periodic):
        state = keep(state, number, hurry=False)
      # What stops has seconds left, and nothing to lose but its state.
      if not stopping and is_report_step(config, number):
        state, _ = watcher.finish_pending(state, following())
        reports.report_between_steps(run, state, number, progress.log)
      # SIGTERM meanwhile, to one host. What a run is rolled back to is saved with
      # the batches that it is to pass over: that takes one step more.
      if number > 0 and not (rolled_back and number == start):
        stopping |= run.stop.is_set()
      if stopping:
        state = keep(state, number, hurry=True)
        with watcher.writing(number):
          run.checkpoints.wait_until_finished()
        if run.checkpoints.latest_step() != number:
          raise run.folder.refusal(f"SIGTERM: step {number} could not be saved")
        raise signals.stopped(number)
      with clock.span("input"):
        while len(queue) <= config.prefetch and (batch := next(source, None)):
          queue.append(batch)
        batch = queue.popleft()
        progress.log.records(number, batch.records)
        progress.quarantine(number, batch)
      # Compiling takes minutes, in which SIGTERM is not to be lost.
      at_once = number == kept and not rolled_back
      with (
          signals.on_sigterm(signals.stop_unsaved)
          if at_once
          else contextlib.nullcontext()
      ):
        if at_once and run.stop.is_set():  # while the batch was awaited
          signals.stop_unsaved()
        watcher.before(number, state, batch, queue[0] if queue else None)
      state, logs = run.compiled_steps.run(batch.kind, state, batch.arrays)
      state, skipped = watcher.finish_pending(state, batch.streams)
      if skipped:  # then the step just dispatched has changed nothing
        state, logs = run.compiled_steps.run(
            batch.kind, state, batch.arrays, again=True
        )
      watcher.dispatched(number, batch, logs)
    state, _ = watcher.finish_pending(state, following())
    if start < config.num_steps:
      with clock.span("checkpoint"):
        with watcher.writing(config.num_steps):
          run.checkpoints.wait_until_finished()  # for the one before
        with hosts.as_one():
          saving.save(run, state, following())
          run.checkpoints.wait_until_finished()
      if signals.stopping(run.stop):
        raise signals.stopped(config.num_steps)
    reports.draw(run, state, progress.log)
  finally:
    hang_timer.close()
    progress.close()
  return state
