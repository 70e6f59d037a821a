"""Training: set-up, then the loop, which is the last function."""

from collections import deque
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import threading
import time
from typing import Any

from clu import parameter_overview
import jax
import numpy as np
import tqdm

from mcjepa_jax import (
    assembly,
    checkpoint,
    command,
    errors,
    evaluate,
    hosts,
    journal,
    panels,
    sharding,
    step as steps,
    suite,
    validation,
)
from mcjepa_jax.models import mcjepa

_RATED_STEPS = 20  # after which the input's rate is told
# What a file system without locks answers: then nothing keeps two runs apart.
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@dataclasses.dataclass
class Run:
  """What the loop needs and does not change."""

  config: Any
  workdir: pathlib.Path
  model: mcjepa.MCJEPA
  optimizers: dict[str, Any]
  abstract: steps.TrainState
  mesh: jax.sharding.Mesh
  streams: dict[str, Any]
  checkpoints: checkpoint.Checkpoints
  clock: journal.Clock


@dataclasses.dataclass
class Batch:
  """One step's input on the devices, and the streams' states from before it."""

  kind: str
  arrays: dict[str, jax.Array]
  records: dict[str, list[str]]
  faults: dict[str, list[tuple[str, str]]]
  streams: dict[str, Any]


def set_up_input(
    config: Any, workdir: pathlib.Path
) -> tuple[dict[str, Any], jax.sharding.Mesh]:
  """The streams and the mesh, after every check that needs no compilation.

  Raises:
    UserError: with all that is wrong with config, data and workdir.
  """
  faults = validation.faults(config, devices=validation.device_count(config))
  streams = {}
  for check in (
      lambda: journal.check_writable(workdir, "workdir"),
      lambda: check_resume(config, workdir),
      lambda: check_init_checkpoint(config),
      lambda: assembly.optimizers(config),
      lambda: streams.update(assembly.streams(config)),
      # The first batches: what of them cannot be decoded or cut is told before
      # anything is compiled.
      lambda: [stream[0] for stream in streams.values()],
      lambda: faults.extend(suite.check(config)),
  ):
    try:
      faults.extend(errors.collect(check))
    except Exception:
      if not faults:  # else it stumbled over a value that is already named
        raise
  data = {task: s.state()["fingerprint"] for task, s in streams.items()}
  hosts.agree(
      {"config": command.leaves(config), "data": data},
      list(dict.fromkeys(faults)),
  )
  hosts.check_shared(workdir)
  return streams, sharding.make_mesh(config.mesh.devices)


@contextlib.contextmanager
def sole_owner(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir: a second run in it would delete the first one's saves.

  Raises:
    UserError: another process holds it.
  """
  with (workdir / ".lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise errors.UserError(
          f"workdir: another run is using {workdir}; wait for it or use another"
      ) from error
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise errors.UserError(
            f"workdir: cannot lock {workdir}: {error.strerror}"
        ) from error
    yield


def check_init_checkpoint(config: Any) -> None:
  """Raises UserError if the encoder to start from is not there or another."""
  if not config.init_checkpoint:
    return
  model = assembly.model(config)
  encoder = jax.eval_shape(lambda: mcjepa.init_params(model, 0))["encoder"]
  checkpoint.check_params(config.init_checkpoint, {"encoder": encoder})


def resumable_config(config: Any) -> dict[str, Any]:
  """The part of a config that a resumed run must share, flat."""
  return {
      key: value
      for key, value in command.leaves(config).items()
      if key.split(".")[0] not in validation.OPERATIONAL
  }


def check_resume(config: Any, workdir: pathlib.Path) -> None:
  """Raises UserError if the workdir holds a run of another config."""
  path = workdir / "config.json"
  # A run that ended before its first checkpoint left nothing to resume.
  if not path.exists() or not (workdir / "checkpoints").exists():
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
      f"{key}: the run in {workdir} has {saved.get(key)!r}, this config"
      f" {ours.get(key)!r}; use another workdir"
      for key in sorted(saved.keys() | ours.keys())
      if saved.get(key) != ours.get(key)
  ]
  if faults:
    raise errors.UserError(*faults)


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


def compiled_steps(run: Run) -> dict[str, Callable[..., Any]]:
  """The jitted step of each kind that this run has."""
  config = run.config
  start = config.motion.start_step
  kinds = {
      steps.kind_at(config.mode, number, start)
      for number in (0, start, start + 1)
      if number < config.num_steps
  }
  recipe = assembly.recipe(config)
  return {
      kind: steps.jit_train_step(
          steps.make_train_step(run.model, run.optimizers, recipe, kind),
          run.abstract,
          run.mesh,
      )
      for kind in kinds
  }


def check_finite(number: int, logs: dict[str, float]) -> None:
  """Stops with all that is not finite.

  Called for a step before its state is saved: the newest checkpoint is finite.
  """
  bad = sorted(name for name, x in logs.items() if not np.isfinite(x))
  if bad:
    raise command.Stop(
        command.EXIT_ALARM, f"step {number}: not finite: {', '.join(bad)}"
    )


def save(
    run: Run,
    state: steps.TrainState,
    streams: dict[str, Any],
    *,
    hurry: bool = False,
) -> None:
  """Starts an asynchronous checkpoint of the state and the streams.

  In a `hurry` it is not evaluated, and is never the best.
  """
  config = run.config
  metrics = {}
  if config.keep_best and not hurry:
    # On scenes of their own: what is reported chooses no checkpoint.
    with run.clock.span("evaluate"):
      metrics = evaluations_on_the_way(run, state, config.eval_seed + 1)
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
      },
      metrics,
  )


def evaluations(
    run: Run,
    state: steps.TrainState,
    *,
    eval_seed: int | None = None,
    between_steps: bool = False,
) -> tuple[dict[str, float], list[str]]:
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
) -> dict[str, float]:
  """The evals between two steps; a note of those that cannot run.

  The training goes on: data that cannot be read end that evaluation alone.
  """
  results, faults = evaluations(
      run, state, eval_seed=eval_seed, between_steps=True
  )
  for fault in faults:
    tqdm.tqdm.write(f"Not evaluated at step {int(state.step)}: {fault}")
  return results


class Progress:
  """The bar and the logs; numbers are those of the step before."""

  def __init__(self, run: Run, start: int):
    config = run.config
    self._run = run
    self._bar = tqdm.tqdm(
        total=config.num_steps, initial=start, unit="step", smoothing=0.1
    )
    self._examples = sum(
        config[task].batch_size for task in steps.tasks_of_mode(config.mode)
    )
    self.log = journal.Journal(
        run.workdir,
        step=start,
        records=config.log_records,
        board=hosts.first(),
    )
    self._quarantine = journal.Quarantine(
        run.workdir, step=start, limit=config.bad_records
    )
    self._steps = 0
    self._reports = {"content": 0, "motion": 0}  # steps that trained each
    self._before: dict[str, float] = {}  # seconds of steps before the first

  def report(self, number: int, logs: dict[str, jax.Array]) -> None:
    """Fetches what a step logged, checks and shows it."""
    values = {k: float(v) for k, v in jax.device_get(logs).items()}
    check_finite(number, values)
    config = self._run.config
    self._bar.update()
    rate = (self._bar.format_dict["rate"] or 0.0) * self._examples
    losses = [f"loss {values['loss']:.3f}"]
    for task in steps.tasks_of_mode(config.mode):
      if f"loss/{task}" in values:
        self._reports[task] += 1
        self._before.setdefault(task, self._run.clock.seconds()["step"])
        losses.append(f"{task} {values[f'loss/{task}']:.3f}")
    self._bar.set_postfix_str(f"{', '.join(losses)}, {rate:.0f} examples/s")
    if number % config.log_every == 0 or number + 1 == config.num_steps:
      seconds = {
          f"seconds/{name}": value
          for name, value in self._run.clock.seconds().items()
      }
      rate = {"examples_per_second": rate}
      replaced = self._quarantine.counts()
      feeds = {
          f"{kind}/{unit}": value
          for unit, rates in self._feeds().items()
          for kind, value in zip(("feed", "step"), rates, strict=True)
      }
      self.log.scalars(number, values | rate | seconds | replaced | feeds)
    self._steps += 1
    if self._steps == _RATED_STEPS:
      self._note_feeds()

  def _feeds(self) -> dict[str, tuple[float, float]]:
    """By unit: what this host's workers make a second, what its steps take."""
    spent, feeds = self._run.clock.seconds().get("step", 0.0), {}
    for task, stream in self._run.streams.items():
      rows = self._run.config[task].batch_size / jax.process_count()
      unit = {"content": "images", "motion": "pairs"}[task]
      if self._reports[task] > 1:
        seconds = max(spent - self._before[task], 1e-9)
        taken = (self._reports[task] - 1) / seconds
        feeds[unit] = (rows * stream.rate(), rows * taken)
    return feeds

  def _note_feeds(self) -> None:
    feeds = self._feeds()
    made, taken = (
        ", ".join(f"{rates[i]:.0f} {unit}/s" for unit, rates in feeds.items())
        for i in range(2)
    )
    limits = any(made < taken for made, taken in feeds.values())
    self.note(
        f"This host feeds {made}; the steps take {taken}: the input is"
        f"{'' if limits else ' not'} the limit."
    )

  def quarantine(self, number: int, batch: Batch) -> None:
    """Shows the records of a batch that were replaced."""
    for task, faults in batch.faults.items():
      for record, fault in self._quarantine.add(
          number, task, len(batch.records[task]), faults
      ):
        self.note(f"Replaced {record}: {fault}")

  def note(self, text: str) -> None:
    """Prints a line above the bar."""
    self._bar.write(text)

  def close(self) -> None:
    """Ends the bar and the logs."""
    self._bar.close()
    self._quarantine.close()
    self.log.close()


def draw(run: Run, state: steps.TrainState, log: journal.Journal) -> None:
  """Logs the pictures of a state, on the first batch of each stream."""
  with run.clock.span("pictures"):
    number = int(state.step)
    # Not the loop's own iteration: pictures leave the order of data alone.
    firsts = {task: stream[0].arrays for task, stream in run.streams.items()}
    params, mesh = hosts.local(state.params, run.mesh)
    if not hosts.first():
      return
    pictures = panels.of_state(run.model, params, mesh, firsts)
    for name, picture in pictures.items():
      log.picture(number, name, picture)


def finish(run: Run, state: steps.TrainState, peak_gb: float) -> dict[str, Any]:
  """Evaluates the trained parameters and writes the results.

  `peak_gb` is the memory of training, its workers included.
  """
  with run.clock.span("evaluate"):
    results, faults = evaluations(run, state)
  if faults:  # started again, the run evaluates again
    raise errors.UserError(*faults)
  if hosts.first():
    lines = journal.read_lines(run.workdir / "metrics.jsonl")
    for name, picture in panels.of_logs(lines).items():
      journal.save_picture(run.workdir, name, picture)
  spent = run.clock.seconds()
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
      "peak_rss_gb": max(peak_gb, journal.peak_rss_gb()),
      "meta/config": run.config.name,
      "meta/step": int(state.step),
      "meta/commit": evaluate.commit(),
      "meta/devices": evaluate.describe_devices(),
      "meta/versions": evaluate.versions(),
  }
  if hosts.first():
    journal.write_json(run.workdir / "results.json", results)
  return results


def read_results(workdir: pathlib.Path) -> dict[str, Any]:
  """What `finish` wrote; nothing if it did not."""
  try:
    return dict(json.loads((workdir / "results.json").read_text()))
  except (OSError, TypeError, ValueError):
    return {}


def train(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
  """The results of the final evaluation, after training to `num_steps`.

  Resumes what the workdir holds; a finished one is only read.

  Raises:
    UserError: the config, the data or the workdir cannot be used.
    Stop: something is not finite (76), or SIGTERM came and the state is saved
      (75).
  """
  clock = journal.Clock(journal.process_start())
  streams, mesh = set_up_input(config, workdir)
  model, optimizers = assembly.model(config), assembly.optimizers(config)
  abstract = steps.abstract_state(
      model,
      optimizers,
      mesh,
      min_bytes=int(config.mesh.shard_min_mib * 2**20),
      seed=config.seed,
  )
  with (
      sole_owner(workdir) if hosts.first() else contextlib.nullcontext(),
      checkpoint.Checkpoints(
          workdir,
          keep_last=config.keep_last,
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
    workdir = hosts.log_folder(workdir)
    journal.write_json(workdir / "config.json", resumable_config(config))
    (workdir / "parameters.txt").write_text(
        parameter_overview.get_parameter_overview(
            abstract.params, include_stats=False
        )
    )
    run = Run(config, workdir, model, optimizers, abstract, mesh, streams,
              checkpoints, clock)  # fmt: skip
    with clock.span("initialise"):
      if newest is None:
        state = first_state(run)
      else:
        state, saved, meta = checkpoints.restore(newest, abstract)
        clock.add(meta.get("seconds", {}))
        for task, stream in streams.items():
          stream.restore(saved[task])
        print(f"Resumed at step {newest} of {config.num_steps}.")
    try:
      state = run_loop(run, state)
      peak_gb = journal.peak_rss_gb()  # while the workers live
    finally:
      for stream in streams.values():
        stream.close()
    results = finish(run, state, peak_gb)
  print(evaluate.table(results))
  print(f"Pictures and curves: {workdir / 'pictures'}")
  return results


def run_loop(run: Run, state: steps.TrainState) -> steps.TrainState:
  """The trained state: evaluate, save, next batch, dispatch, report.

  A report is of the step BEFORE the one dispatched, so that the host never
  waits. A checkpoint holds the streams as of the next batch to be consumed:
  the queue runs ahead, so each queued batch carries its streams' states.
  """
  config, clock = run.config, run.clock
  start = int(state.step)
  for stream in run.streams.values():
    stream.start()  # the workers fill their queues while the step compiles
  compiled, source = compiled_steps(run), batches(run, start)
  queue: deque[Batch] = deque()
  progress = Progress(run, start)
  stop = threading.Event()
  handler = hosts.on_sigterm(lambda *_: stop.set())
  pending, warm = None, set()
  watch = hosts.Watch(config.hang_seconds)
  try:
    for number in range(start, config.num_steps):
      watch.step()
      if number > start:
        stopping = hosts.stopping(stop, number)
        if config.eval_every and number % config.eval_every == 0:
          with clock.span("evaluate"):
            progress.log.scalars(number, evaluations_on_the_way(run, state))
        if config.panel_every and number % config.panel_every == 0:
          draw(run, state, progress.log)
        if stopping or number % config.save_every == 0:
          if pending:
            with clock.span("step"):
              progress.report(*pending)
            pending = None
          with clock.span("checkpoint"):
            save(run, state, queue[0].streams, hurry=stopping)
        if stopping:
          run.checkpoints.wait_until_finished()
          raise command.Stop(
              command.EXIT_PREEMPTED, f"SIGTERM: saved at step {number}"
          )
      with clock.span("input"):
        while len(queue) <= config.prefetch and (batch := next(source, None)):
          queue.append(batch)
        batch = queue.popleft()
        progress.log.records(number, batch.records)
        progress.quarantine(number, batch)
      # Each kind of step is compiled for each size of its sources.
      program = (batch.kind, *(x.shape for x in batch.arrays.values()))
      with clock.span("step" if program in warm else "compile"):
        state, logs = compiled[batch.kind](state, batch.arrays)
        if program not in warm:
          jax.block_until_ready(logs)
      if not warm:
        since = time.perf_counter() - clock.started
        progress.note(f"First step finished {since:.0f} s after the start.")
      warm.add(program)
      with clock.span("step"):
        if pending:
          progress.report(*pending)
      pending = (number, logs)
    if pending:
      with clock.span("step"):
        progress.report(*pending)
    if start < config.num_steps:
      with clock.span("checkpoint"):
        states = {task: stream.state() for task, stream in run.streams.items()}
        save(run, state, states)
        run.checkpoints.wait_until_finished()
    draw(run, state, progress.log)
  finally:
    watch.close()
    progress.close()
    hosts.on_sigterm(handler)
  return state
