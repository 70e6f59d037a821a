"""Training: set-up, then the loop, which is the last function."""

from collections import deque
from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import time
from typing import Any

from clu import parameter_overview
import jax
import tqdm

from mcjepa_jax import (
    alarms,
    assembly,
    command,
    errors,
    evaluate,
    goodput,
    hosts,
    journal,
    lives,
    noticing,
    panels,
    set_up,
    sharding,
    step as steps,
    suite,
)
from mcjepa_jax.models import mcjepa
from mcjepa_jax.programs import Programs
from mcjepa_jax.progress import Batch, Progress, Run
from mcjepa_jax.storage import checkpoint, run_folder


def first_state(run: Run) -> steps.TrainState:
  """A new state, made straight into its shardings."""
  config = run.config
  state = sharding.call_once(
      lambda: steps.init_state(run.model, run.optimizers, config.seed),
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, run.abstract),
  )
  if config.init_checkpoint:
    encoder = checkpoint.restore_params(
        config.init_checkpoint, {"encoder": run.abstract.params["encoder"]}
    )
    state = state.replace(params=state.params | encoder)
  return state


def begin_step(run: Run) -> None:
  """Starts on the batch of step 0, and on its program where its size is known."""
  config = run.config
  kind = steps.kind_at(config.mode, 0, config.motion.start_step)
  for task in steps.tasks(kind):
    run.streams[task].start()
  size, *others = assembly.motion_sizes(config)
  if others and "motion" in steps.tasks(kind):
    return
  shapes = assembly.batch_shapes(config, kind, size)
  run.programs.begin(kind, run.abstract, shapes)


def batches(run: Run, start: int) -> Iterator[Batch]:
  """The batch of each step from `start` on, as its kind reads it."""
  config = run.config
  for number in range(start, config.num_steps):
    kind = steps.kind_at(config.mode, number, config.motion.start_step)
    before = {task: stream.state() for task, stream in run.streams.items()}
    arrays, records, faults = {}, {}, {}
    for task in steps.tasks(kind):
      part = next(run.streams[task])
      arrays |= part.arrays
      records[task], faults[task] = part.records, part.faults
    arrays = sharding.to_global(arrays, run.mesh)
    yield Batch(kind, arrays, records, faults, before)


def step_programs(
    config: Any,
    model: mcjepa.MCJEPA,
    optimizers: dict[str, Any],
    abstract: steps.TrainState,
    mesh: jax.sharding.Mesh,
) -> Programs:
  """The steps of each kind that a run has; none is compiled yet."""
  recipe = assembly.recipe(config)
  start = config.motion.start_step
  kinds = {
      steps.kind_at(config.mode, number, start)
      for number in (0, start, start + 1)
      if number < config.num_steps
  }
  sizes = len(assembly.motion_sizes(config))
  functions = {
      kind: steps.jit_train_step(
          steps.make_train_step(model, optimizers, recipe, kind),
          abstract,
          mesh,
      )
      for kind in kinds
  }
  return Programs(
      functions,
      expected={
          kind: sizes if "motion" in steps.tasks(kind) else 1 for kind in kinds
      },
      devices=mesh.size,
  )


def save(
    run: Run,
    state: steps.TrainState,
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
  heard = contextlib.nullcontext() if last else until_sigterm(run)
  if config.keep_best and not hurry:
    # On scenes of their own: what is reported chooses no checkpoint.
    with run.clock.span("evaluate"), heard:
      metrics = evaluations_on_the_way(run, state, config.eval_seed + 1)
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
          "versions": evaluate.versions(),
          "seconds": run.clock.seconds(),
          "time": time.time(),
          "watch": run.watch.state(),
      },
      metrics,
  )
  return refused


def evaluations(
    run: Run,
    state: steps.TrainState,
    *,
    eval_seed: int | None = None,
    between_steps: bool = False,
) -> tuple[suite.Results, list[str]]:
  """The evals of the config for a state, and why one did not end."""
  config = run.config
  if eval_seed is not None:
    config = config.copy_and_resolve_references()
    with config.unlocked():
      config.eval_seed = eval_seed
  initial = sharding.call_once(
      lambda: mcjepa.init_params(run.model, run.config.seed)
  )
  # Each host evaluates the whole set: all know the metrics that a save keeps.
  params, mesh = hosts.local(state.params, run.mesh)
  subject = suite.Subject(
      *(config, run.model, params, initial, mesh, run.workdir),
      limit=config.eval_limit if between_steps else 0,
  )
  return suite.run(subject, between_steps=between_steps)


def evaluations_on_the_way(
    run: Run, state: steps.TrainState, eval_seed: int | None = None
) -> suite.Results:
  """The evals between two steps; a note of those that cannot run.

  The training goes on: data that cannot be read end that evaluation alone.
  """
  results, faults = evaluations(
      run, state, eval_seed=eval_seed, between_steps=True
  )
  for fault in faults:
    tqdm.tqdm.write(f"Not evaluated at step {int(state.step)}: {fault}")
  return results


def draw(run: Run, state: steps.TrainState, log: journal.Journal) -> None:
  """Logs the pictures of a state, on the first batch of each stream."""
  with run.clock.span("pictures"):
    number = int(state.step)
    # Not the loop's own iteration: pictures leave the order of data alone.
    firsts = {
        task: sharding.to_global(stream[0].arrays, run.mesh)
        for task, stream in run.streams.items()
    }
    # Of all hosts' rows: one's own may be the half of a pair.
    firsts = jax.tree.map(lambda x: x[: panels.ROWS], firsts)
    (params, firsts), mesh = hosts.local((state.params, firsts), run.mesh)
    if not hosts.first():
      return
    firsts = jax.device_get(firsts)
    pictures = panels.of_state(run.model, params, mesh, firsts)
    for name, picture in pictures.items():
      log.picture(number, name, picture)


def finish(run: Run, state: steps.TrainState, peak_gb: float) -> dict[str, Any]:
  """Evaluates the trained parameters and writes the results.

  `peak_gb` is the memory of training, its workers included.

  Raises:
    UserError: with why an eval did not end, once the others are written. Started
      again, the run evaluates again, if it was so on the first host.
  """
  with run.clock.span("evaluate"):
    results, faults = evaluations(run, state)
  if hosts.first():
    lines = journal.read_lines(run.workdir / "metrics.jsonl")
    for name, picture in panels.of_logs(lines).items():
      journal.save_picture(run.workdir, name, picture)
  spent = run.clock.seconds()
  looped = sum(
      spent.get(part, 0.0) - run.began.get(part, 0.0)
      for part in ("step", "input", "lost")
  )
  install = float(os.environ.get("MCJEPA_INSTALL_SECONDS", 0.0))
  results |= {
      "seconds/install": install,
      "seconds/compile": spent.get("compile", 0.0),
      "seconds/train": sum(
          spent.get(part, 0.0) for part in ("step", "input", "checkpoint")
      ),
      "seconds/evaluate": spent.get("evaluate", 0.0)
      + spent.get("pictures", 0.0),
      "seconds/total": spent["total"] + install,
      **goodput.shares(spent),
      **goodput.rates(
          seconds=looped,
          images=run.programs.images,
          pairs=run.programs.pairs,
          flops=run.programs.flops,
          device_kind=jax.devices()[0].device_kind,
      ),
      "compiles": run.programs.compiles,
      **run.watch.counts(),
      "peak_rss_gb": max(peak_gb, journal.peak_rss_gb()),
      "meta/config": run.config.name,
      "meta/step": int(state.step),
      "meta/commit": evaluate.commit(),
      "meta/devices": evaluate.describe_devices(),
      "meta/versions": evaluate.versions(),
  }
  if faults:
    results[evaluate.NOT_EVALUATED] = "; ".join(faults)
  if hosts.first():
    journal.write_json(run.workdir / "results.json", results)
  if faults:
    print(evaluate.table(results))
    raise errors.UserError(*faults)
  return results


def read_results(workdir: pathlib.Path) -> dict[str, Any]:
  """What `finish` wrote; nothing if it did not, or if an eval is missing."""
  try:
    results = dict(json.loads((workdir / "results.json").read_text()))
  except (OSError, TypeError, ValueError):
    return {}
  return {} if evaluate.NOT_EVALUATED in results else results


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
  with hosts.on_sigterm(hosts.leave):
    try:
      with run_folder.opened(workdir) as folder:
        streams, mesh = set_up.input_and_mesh(config, folder)
        return _train(config, folder, streams, mesh)
    except errors.Passing as error:  # no fault of the input
      raise command.Stop(command.EXIT_LOST, f"error: {error}") from error


def _train(
    config: Any,
    folder: run_folder.Folder,
    streams: dict[str, Any],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  clock = journal.Clock(journal.process_start())
  workdir = folder.local
  model, optimizers = assembly.model(config), assembly.optimizers(config)
  abstract = assembly.abstract_state(config, model, optimizers, mesh)
  with (
      journal.refusal_told(workdir),
      set_up.sole_owner(workdir) if hosts.first() else contextlib.nullcontext(),
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
    results = read_results(workdir)
    if newest == config.num_steps and results.get("meta/step") == newest:
      print(f"Finished at step {newest}; to train again, use another workdir.")
      print(evaluate.table(results))
      return results
    earlier = stack.enter_context(
        lives.kept(folder, clock.started, first=hosts.first())
    )
    workdir = hosts.log_folder(workdir)
    journal.write_json(
        workdir / run_folder.CONFIG, set_up.resumable_config(config)
    )
    (workdir / "parameters.txt").write_text(
        parameter_overview.get_parameter_overview(
            abstract.params, include_stats=False
        )
    )
    run = Run(
        config, workdir, folder, model, optimizers, abstract, mesh,
        streams, checkpoints, clock, alarms.Watch(config),
        step_programs(config, model, optimizers, abstract, mesh),
    )  # fmt: skip
    try:
      with clock.span("initialise"):
        if newest is None:
          begin_step(run)
          state = first_state(run)
          lost = lives.lost(earlier, 0.0)
        else:
          state, saved, meta = checkpoints.restore(newest, abstract)
          clock.add(meta["seconds"])
          lost = lives.lost(earlier, meta.get("time", time.time()))
          run.watch.restore(meta["watch"])
          for task, stream in streams.items():
            stream.restore(saved[task])
          print(f"Resumed at step {newest} of {config.num_steps}.")
        clock.add({"lost": lost, "total": lost})
        checkpoints.make_room(state)
      run.began = clock.seconds()
      state = run_loop(run, state)
      if run.stop.is_set():  # after the last step was saved
        hosts.leave()
      peak_gb = journal.peak_rss_gb()  # while the workers live
    finally:
      for stream in streams.values():
        stream.close()
    # All is saved: of many hosts, too, one that has to go asks no other.
    with hosts.on_sigterm(hosts.leave, alone=True):
      results = finish(run, state, peak_gb)
  print(evaluate.table(results))
  print(f"Pictures and curves: {workdir / 'pictures'}")
  return results


def roll_back(run: Run, back: alarms.RollBack) -> steps.TrainState:
  """A state of `back.step` or before; the streams go on where they are.

  Raises:
    Stop: this run was rolled back too often.
  """
  count = run.watch.count("rollback")
  if count > run.config.alarms.rollbacks:
    raise command.Stop(
        command.EXIT_ALARM, f"rolled back {count - 1} times before: {back}"
    )
  with run.clock.span("initialise"):
    try:
      with hosts.as_one():
        run.checkpoints.wait_until_finished()
    except errors.UserError as error:  # what it goes back to is an earlier one
      if jax.process_count() > 1:
        raise
      run.watch.count("checkpoint")
      tqdm.tqdm.write(str(error))
      journal.append(
          run.workdir / "alarms.jsonl",
          {"step": back.step, "alarm": "checkpoint", "text": str(error)},
      )
    step = run.checkpoints.go_back(back.step)
    if step is None:
      state, seconds = first_state(run), run.began
    else:
      state, _, meta = run.checkpoints.restore(step, run.abstract)
      seconds = meta["seconds"]
    run.checkpoints.make_room(state)
    for task, stream in run.streams.items():
      stream.restore(back.streams[task])
  run.clock.lose(seconds)
  run.watch.forget()
  text = f"Rolled back to step {step or 0}, and past the batch: {back}"
  tqdm.tqdm.write(text)
  journal.append(
      run.workdir / "alarms.jsonl",
      {"step": step or 0, "alarm": "rollback", "text": text},
  )
  return state


class _Interrupted(BaseException):
  """SIGTERM, where it ends what is done: no fault of a file or of an eval."""


@contextlib.contextmanager
def until_sigterm(run: Run) -> Iterator[None]:
  """Has SIGTERM end what is done inside; `run.stop` is set then.

  Of many hosts, which have to end at one step, it ends nothing inside.
  """

  def interrupt(*_):
    run.stop.set()
    raise _Interrupted

  with contextlib.suppress(_Interrupted), hosts.on_sigterm(interrupt):
    yield


def saves_at(config: Any, number: int) -> bool:
  """Whether the state is saved before a step."""
  # The first step with flow is compiled, which takes minutes.
  return number % config.save_every == 0 or steps.is_first_with_flow(
      config.mode, number, config.motion.start_step
  )


def looks_at(config: Any, number: int) -> bool:
  """Whether something is evaluated or drawn before a step."""
  every = config.eval_every, config.panel_every
  return number > 0 and any(n and number % n == 0 for n in every)


def look(
    run: Run, state: steps.TrainState, number: int, log: journal.Journal
) -> None:
  """Logs the evaluation and the pictures that are due before a step."""
  config = run.config
  with until_sigterm(run):
    if run.stop.is_set():  # it came before it would have been heard here
      return
    if config.eval_every and number % config.eval_every == 0:
      with run.clock.span("evaluate"):
        log.scalars(number, evaluations_on_the_way(run, state))
    if config.panel_every and number % config.panel_every == 0:
      draw(run, state, log)


def run_loop(run: Run, state: steps.TrainState) -> steps.TrainState:
  """The trained state, by as many ways back as the alarms allow."""
  rolled_back = False
  with hosts.on_sigterm(lambda *_: run.stop.set()):
    while True:
      try:
        return run_steps(run, state, rolled_back)
      except alarms.RollBack as back:
        state, rolled_back = roll_back(run, back), True


def run_steps(
    run: Run, state: steps.TrainState, rolled_back: bool
) -> steps.TrainState:
  """The trained state: save, evaluate, next batch, dispatch, settle.

  What is settled is the step BEFORE the one dispatched, so that the host never
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
  source = batches(run, start)
  queue: deque[Batch] = deque()
  progress = Progress(run, start)
  watcher = noticing.Watcher(run, progress)
  watch = hosts.Watch(config.hang_seconds)
  kept = start  # the step from which a run that ends now would go on

  def following():
    if queue:
      return queue[0].streams
    return {task: stream.state() for task, stream in run.streams.items()}

  def keep(state, number, *, hurry):
    nonlocal kept
    refused = None
    state, _ = watcher.settle(state, following())
    # In a row of skipped updates what was saved before it stays newest.
    if hurry or not run.watch.row:
      with clock.span("checkpoint"), watcher.writing(number):
        refused = save(run, state, following(), hurry=hurry)
        kept = number
      if refused:
        watcher.note(number, refused)
    return state

  try:
    for number in range(start, config.num_steps):
      watch.step()
      stopping = number > start and hosts.stopping(run.stop)
      first = rolled_back and number == start + 1
      periodic = number > start and saves_at(config, number)
      if not stopping and (first or periodic):
        state = keep(state, number, hurry=False)
      # What stops has seconds left, and nothing to lose but its state.
      if not stopping and looks_at(config, number):
        state, _ = watcher.settle(state, following())
        look(run, state, number, progress.log)
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
        raise command.Stop(
            command.EXIT_PREEMPTED, f"SIGTERM: saved at step {number}"
        )
      with clock.span("input"):
        while len(queue) <= config.prefetch and (batch := next(source, None)):
          queue.append(batch)
        batch = queue.popleft()
        progress.log.records(number, batch.records)
        progress.quarantine(number, batch)
      # Compiling takes minutes, in which SIGTERM is not to be lost.
      at_once = number == kept and not rolled_back
      with (
          hosts.on_sigterm(hosts.leave) if at_once else contextlib.nullcontext()
      ):
        if at_once and run.stop.is_set():  # while the batch was awaited
          hosts.leave()
        watcher.before(number, state, batch, queue[0] if queue else None)
      state, logs = run.programs.run(batch.kind, state, batch.arrays)
      state, skipped = watcher.settle(state, batch.streams)
      if skipped:  # then the step just dispatched has changed nothing
        state, logs = run.programs.run(
            batch.kind, state, batch.arrays, again=True
        )
      watcher.dispatched(number, batch, logs)
    state, _ = watcher.settle(state, following())
    if start < config.num_steps:
      with clock.span("checkpoint"):
        with watcher.writing(config.num_steps):
          run.checkpoints.wait_until_finished()  # for the one before
        with hosts.as_one():
          save(run, state, following())
          run.checkpoints.wait_until_finished()
      if hosts.stopping(run.stop):
        raise command.Stop(
            command.EXIT_PREEMPTED, f"SIGTERM: saved at step {config.num_steps}"
        )
    draw(run, state, progress.log)
  finally:
    watch.close()
    progress.close()
  return state
