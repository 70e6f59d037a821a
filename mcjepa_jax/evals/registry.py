"""The evals by name: what each reads, how it is checked and run."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

from mcjepa_jax import errors
from mcjepa_jax.data import flow_sanity, sources
from mcjepa_jax.evals import knn, rank_me
from mcjepa_jax.evals.adapters import (
    davis_adapter,
    flow_adapter,
    image_adapter,
    segmentation_adapter,
    submission_adapter,
)
from mcjepa_jax.evals.eval_subject import Results, Subject
from mcjepa_jax.storage import local_files

_DECODED_WHOLE = 100
_JUDGED = 4  # pairs of a set whose true flow is held against the frames


class Eval(NamedTuple):
  """A kind of eval: functions of (config or subject, the set's name)."""

  examples: Callable[[Any, str], Any]  # what it reads; finds all that is wrong
  run: Callable[[Subject, str], Results]
  between_steps: bool = False  # cheap enough to run as a training goes on


_EVALS = {
    "flow": Eval(flow_adapter.examples, flow_adapter.run, between_steps=True),
    "knn": Eval(
        image_adapter.examples,
        lambda subject, name: knn.run(
            name, *image_adapter.features(subject, name)
        ),
        between_steps=True,
    ),
    "linear": Eval(image_adapter.examples, image_adapter.run_linear),
    "finetune": Eval(image_adapter.examples, image_adapter.run_finetune),
    "rankme": Eval(
        image_adapter.examples,
        lambda subject, name: rank_me.run(
            name, image_adapter.features(subject, name)[0]
        ),
        between_steps=True,
    ),
    "submit": Eval(submission_adapter.examples, submission_adapter.run),
    "davis": Eval(davis_adapter.examples, davis_adapter.run),
    **{
        kind: Eval(
            functools.partial(segmentation_adapter.examples, kind),
            functools.partial(segmentation_adapter.run, kind),
        )
        for kind in segmentation_adapter.KINDS
    },
}


@dataclasses.dataclass
class Faults:
  """What is wrong with the evals of a config."""

  mistakes: list[str]  # of the config: nothing should run
  by_eval: dict[str, list[str]]  # why an eval cannot run; the others can


def faults(config: Any, workdir: pathlib.Path | None = None) -> Faults:
  """What is wrong with the evals of a config, their data and what they write."""
  found, seen = Faults([], {}), {}
  for entry in config.evals:
    kind, _, name = str(entry).partition("/")
    if kind not in _EVALS or not name:
      known = " or ".join(f"{kind}/SET" for kind in _EVALS)
      found.mistakes.append(f"evals: expected {known}, got {entry!r}")
      continue
    # Several kinds read the same: a large set is listed once.
    reads = (_EVALS[kind].examples, name)
    if reads not in seen:
      seen[reads] = None
      try:
        _check_examples(config, kind, name)
      except errors.UserError as error:
        seen[reads] = error
    error = seen[reads]
    if isinstance(error, sources.UnknownName):
      found.mistakes.extend(error.messages)
    elif error:
      found.by_eval[entry] = list(error.messages)
    elif kind == "submit" and workdir:
      writable = functools.partial(
          local_files.check_writable, workdir / submission_adapter.FOLDER, entry
      )
      if refused := errors.collect(writable):
        found.by_eval[entry] = refused
  metric = config.best_metric.partition("/")[0]
  if config.keep_best and metric in _EVALS:
    if not _EVALS[metric].between_steps:
      known = ", ".join(k for k, e in _EVALS.items() if e.between_steps)
      found.mistakes.append(
          f"best_metric: expected one of {known}, which run between steps, got"
          f" {config.best_metric!r}"
      )
  return found


def check(config: Any, workdir: pathlib.Path | None = None) -> list[str]:
  """All of `faults` in one list."""
  found = faults(config, workdir)
  return [*found.mistakes, *(f for v in found.by_eval.values() for f in v)]


def _check_examples(config, kind, name):
  """Raises UserError for examples that cannot be decoded.

  Small sets are decoded whole, of large ones an example: a fault is told now
  and not after the training. So is flow that the first examples contradict.
  """
  examples = _EVALS[kind].examples(config, name)
  few = len(examples) <= _DECODED_WHOLE
  count = len(examples) if few else min(len(examples), _JUDGED)
  judge = flow_sanity.Judge()

  def look(i):
    example = examples[i]
    if kind == "flow" and i < _JUDGED:
      judge.add(example)

  found = errors.collect(*(functools.partial(look, i) for i in range(count)))
  found += [f"flow/{name}: {f}" for f in judge.misreadings(certain=True)]
  if found:
    raise errors.UserError(*found)


def run(
    subject: Subject,
    evals: Sequence[str] | None = None,
    *,
    between_steps: bool = False,
    ended: Callable[[Results], None] = lambda results: None,
) -> tuple[Results, list[str]]:
  """Results, keyed `EVAL/SET/METRIC`, and why an eval did not end.

  Of `evals`, or all of the config's; with `between_steps` of the cheap kinds
  alone. `meta/seconds/EVAL` is the wall time of each. `ended` gets all results
  so far as each ends: what comes after it may be killed.
  """
  results, found = {}, []
  for entry in subject.config.evals if evals is None else evals:
    kind, _, name = entry.partition("/")
    if between_steps and not _EVALS[kind].between_steps:
      continue
    started = time.perf_counter()
    try:
      results |= _EVALS[kind].run(subject, name)
    except errors.UserError as error:
      found.extend(error.messages)
      continue
    results[f"meta/seconds/{entry}"] = time.perf_counter() - started
    ended(results)
  return results, found
