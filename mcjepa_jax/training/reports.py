"""The reports of a run: evaluations, pictures and results."""

import json
import os
import pathlib
from typing import Any

import jax
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.distributed import hosts, sharding
from mcjepa_jax.evals import eval_subject, registry, result_table
from mcjepa_jax.models import mcjepa
from mcjepa_jax.runtime import (
    environment,
    goodput,
    log_files,
    process_memory,
    signals,
)
from mcjepa_jax.step import train_state
from mcjepa_jax.storage import local_files
from mcjepa_jax.training import pictures
from mcjepa_jax.training.context import RunContext


def evaluations(
    run: RunContext,
    state: train_state.TrainState,
    *,
    eval_seed: int | None = None,
    between_steps: bool = False,
) -> tuple[eval_subject.Results, list[str]]:
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
  subject = eval_subject.Subject(
      *(config, run.model, params, initial, mesh, run.workdir),
      limit=config.eval_limit if between_steps else 0,
  )
  return registry.run(subject, between_steps=between_steps)


def evaluations_on_the_way(
    run: RunContext, state: train_state.TrainState, eval_seed: int | None = None
) -> eval_subject.Results:
  """The evals between two steps; a note of those that cannot run.

  The training goes on: data that cannot be read end that evaluation alone.
  """
  results, faults = evaluations(
      run, state, eval_seed=eval_seed, between_steps=True
  )
  for fault in faults:
    tqdm.tqdm.write(f"Not evaluated at step {int(state.step)}: {fault}")
  return results


def draw(
    run: RunContext, state: train_state.TrainState, log: log_files.Journal
) -> None:
  """Logs the pictures of a state, on the first batch of each stream."""
  with run.clock.span("pictures"):
    number = int(state.step)
    # Not the loop's own iteration: pictures leave the order of data alone.
    firsts = {
        task: sharding.to_global(stream[0].arrays, run.mesh)
        for task, stream in run.streams.items()
    }
    # Of all hosts' rows: one's own may be the half of a pair.
    firsts = jax.tree.map(lambda x: x[: pictures.ROWS], firsts)
    (params, firsts), mesh = hosts.local((state.params, firsts), run.mesh)
    if not hosts.first():
      return
    firsts = jax.device_get(firsts)
    drawn = pictures.of_state(run.model, params, mesh, firsts)
    for name, picture in drawn.items():
      log.picture(number, name, picture)


def finish(
    run: RunContext, state: train_state.TrainState, peak_gb: float
) -> dict[str, Any]:
  """Evaluates the trained parameters and writes the results.

  `peak_gb` is the memory of training, its workers included.

  Raises:
    UserError: with why an eval did not end, once the others are written. Started
      again, the run evaluates again, if it was so on the first host.
  """
  with run.clock.span("evaluate"):
    results, faults = evaluations(run, state)
  if hosts.first():
    lines = local_files.read_lines(run.workdir / "metrics.jsonl")
    for name, picture in pictures.of_logs(lines).items():
      log_files.save_picture(run.workdir, name, picture)
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
          images=run.compiled_steps.images,
          pairs=run.compiled_steps.pairs,
          flops=run.compiled_steps.flops,
          device_kind=jax.devices()[0].device_kind,
      ),
      "compiles": run.compiled_steps.compiles,
      **run.monitor.counts(),
      "peak_rss_gb": max(peak_gb, process_memory.peak_rss_gb()),
      "meta/config": run.config.name,
      "meta/step": int(state.step),
      "meta/commit": environment.commit(),
      "meta/devices": environment.describe_devices(),
      "meta/versions": environment.versions(),
  }
  if faults:
    results[result_table.NOT_EVALUATED] = "; ".join(faults)
  if hosts.first():
    local_files.write_json(run.workdir / "results.json", results)
  if faults:
    print(result_table.table(results))
    raise errors.UserError(*faults)
  return results


def read_results(workdir: pathlib.Path) -> dict[str, Any]:
  """What `finish` wrote; nothing if it did not, or if an eval is missing."""
  try:
    results = dict(json.loads((workdir / "results.json").read_text()))
  except (OSError, TypeError, ValueError):
    return {}
  return {} if result_table.NOT_EVALUATED in results else results


def report_between_steps(
    run: RunContext,
    state: train_state.TrainState,
    number: int,
    log: log_files.Journal,
) -> None:
  """Logs the evaluation and the pictures that are due before a step."""
  config = run.config
  with signals.until_sigterm(run.stop):
    if run.stop.is_set():  # it came before it would have been heard here
      return
    if config.eval_every and number % config.eval_every == 0:
      with run.clock.span("evaluate"):
        log.scalars(number, evaluations_on_the_way(run, state))
    if config.panel_every and number % config.panel_every == 0:
      draw(run, state, log)
