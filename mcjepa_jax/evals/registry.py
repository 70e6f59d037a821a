"""The evals by name: what each reads, how it is checked and run."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.data import flow_sanity, sources
from mcjepa_jax.evals import (
    davis,
    finetune,
    flow,
    frozen_features,
    inference,
    linear,
    submission,
)
from mcjepa_jax.evals.adapters import segmentation_adapter
from mcjepa_jax.models import mcjepa
from mcjepa_jax.storage import local_files

_SYNTHETIC_PAIRS = 256
_TRAIN_PAIRS = 512
_KNN_BANK = 2000
_KNN_QUERIES = 1000
_DECODED_WHOLE = 100
_SUBMISSIONS = "submissions"  # a folder of the workdir
_JUDGED = 4  # pairs of a set whose true flow is held against the frames

Params = Any
Results = dict[str, float | int]  # by EVAL/SET/METRIC


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is evaluated; `initial` are the parameters before training."""

  config: Any
  model: mcjepa.MCJEPA
  params: Params
  initial: Params
  mesh: jax.sharding.Mesh
  workdir: pathlib.Path
  limit: int = 0  # examples of an eval, spread over its set; 0 is all
  # The features of the last labelled set: several evals read the same.
  held: dict[str, Any] = dataclasses.field(default_factory=dict)


class Eval(NamedTuple):
  """A kind of eval: functions of (config or subject, the set's name)."""

  examples: Callable[[Any, str], Any]  # what it reads; finds all that is wrong
  run: Callable[[Subject, str], Results]
  between_steps: bool = False  # cheap enough to run as a training goes on


def _flow_eval(subject, name):
  config = subject.config
  synthetic = name == "synthetic"
  size = tuple(config.motion.size)
  predictors = {
      "": _predictor(subject, subject.params),
      "random_init": _predictor(subject, subject.initial),
  }
  train_flows = []
  if synthetic:
    train = sources.train_pairs(config.seed, size, _TRAIN_PAIRS)
    train_flows = [train[i]["flow_12"] for i in range(len(train))]
  return flow.run(
      name,
      sources.spread(_flow_pairs(config, name), subject.limit),
      predictors,
      batch_size=config.eval_batch_size,
      max_pixels=config.eval_max_pixels,
      classical=not synthetic,
      train_flows=train_flows,
  )


def _predictor(subject, params):
  return inference.flow_predictor(subject.model, params, mesh=subject.mesh)


def _flow_pairs(config, name):
  return sources.flow_pairs(
      name,
      sources.data_root(config.data_root, config.data_cache),
      seed=sources.held_out_seed(config.eval_seed),
      size=tuple(config.motion.size),
      count=_SYNTHETIC_PAIRS,
  )


def _labelled(config, name):
  return sources.labelled_split(
      name,
      sources.data_root(config.data_root, config.data_cache),
      seed=config.seed,
      eval_seed=sources.held_out_seed(config.eval_seed),
      size=config.content.size,
      counts=(_KNN_BANK, _KNN_QUERIES),
  )


def _davis_eval(subject, name):
  config, model = subject.config, subject.model
  settings = config.davis.to_dict()
  size, stride = settings.pop("size"), settings.pop("stride")
  devices = subject.mesh.devices.size
  batch = -(-settings.pop("batch") // devices) * devices
  extractor = functools.partial(
      inference.dense_extractor,
      model,
      mesh=subject.mesh,
      size=size,
      stride=stride,
  )

  def pixels(frames):
    multiple = model.encoder.strides[-1]
    grid = davis.feature_grid(frames.shape[1:3], size=size, multiple=multiple)
    return davis.pixel_features(frames, grid=grid, stride=stride)

  extractors = {
      "": extractor(subject.params),
      "random_init": extractor(subject.initial),
      "pixels": pixels,
  }
  sequences = _mask_sequences(config, name)
  return davis.run(name, sequences, extractors, batch=batch, **settings)


def _mask_sequences(config, name):
  return sources.mask_sequences(
      name, sources.data_root(config.data_root, config.data_cache)
  )


def _tested(config, name):
  return _labelled(config, name)[1]


def _label_size(config, name):
  return config.content.size if name == "synthetic" else config.knn_size


def _features(subject, name):
  """The training and the test part of a labelled set, as features."""
  config = subject.config
  if name not in subject.held:
    subject.held.clear()
    embedders = {
        suffix: inference.embedder(subject.model, params, mesh=subject.mesh)
        for suffix, params in (
            ("", subject.params),
            ("random_init", subject.initial),
        )
    }
    subject.held[name] = [
        frozen_features.extract(
            sources.spread(part, subject.limit),
            embedders,
            size=_label_size(config, name),
            name=f"features/{name}",
        )
        for part in _labelled(config, name)
    ]
  return subject.held[name]


def _linear_eval(subject, name):
  return linear.run(
      *(name, *_features(subject, name)),
      **subject.config.linear.to_dict(),
      seed=subject.config.seed,
  )


def _finetune_eval(subject, name):
  config = subject.config
  train, test = _labelled(config, name)
  starts = {"": subject.params, "random_init": subject.initial}
  return finetune.run(
      *(name, subject.model, starts, train, test),
      **config.finetune.to_dict(),
      num_classes=len(train.classes),
      size=_label_size(config, name),
      seed=config.seed,
      mesh=subject.mesh,
  )


def _test_frames(config, name):
  """The pairs of a benchmark's test set, by the archive's members."""
  root = sources.data_root(config.data_root, config.data_cache)

  def part(source):
    return sources.motion(source, root, seed=0, size=tuple(config.motion.size))

  # Pairs of a pass of MPI-Sintel, of KITTI 2012 and 2015: data.catalog.
  if name == "sintel":
    return submission.frames(
        {r: part(f"sintel_test_{r}") for r in ("clean", "final")},
        submission.sintel_member,
        count=552,
        scenes=submission.SINTEL_SCENES,
    )
  year, count = sources.choice(
      {"kitti": ("2015", 200), "kitti_2012": ("2012", 195), "sintel": ()},
      name,
      "evals: submit",
  )
  return submission.frames(
      {year: part(f"kitti_{year}_test")}, submission.kitti_member, count=count
  )


def _submit_eval(subject, name):
  folder = subject.workdir / _SUBMISSIONS
  local_files.check_writable(folder, f"submit/{name}")
  config = subject.config
  result = submission.run(
      name,
      _test_frames(config, name),
      _predictor(subject, subject.params),
      folder,
      batch_size=config.eval_batch_size,
      max_pixels=config.eval_max_pixels,
  )
  tqdm.tqdm.write(f"submit/{name}: {folder / f'{name}.zip'}")
  return result


_EVALS = {
    "flow": Eval(_flow_pairs, _flow_eval, between_steps=True),
    "knn": Eval(
        _tested,
        lambda subject, name: frozen_features.run(
            name, *_features(subject, name)
        ),
        between_steps=True,
    ),
    "linear": Eval(_tested, _linear_eval),
    "finetune": Eval(_tested, _finetune_eval),
    "rankme": Eval(
        _tested,
        lambda subject, name: frozen_features.rank(
            name, _features(subject, name)[0]
        ),
        between_steps=True,
    ),
    "submit": Eval(_test_frames, _submit_eval),
    "davis": Eval(_mask_sequences, _davis_eval),
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
          local_files.check_writable, workdir / _SUBMISSIONS, entry
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
