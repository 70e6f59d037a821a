"""The evals by name: what each reads, how it is checked and run."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from mcjepa_jax import dense_evals, errors, inference
from mcjepa_jax.data import flow_faults, sources
from mcjepa_jax.evals import davis, flow, probe
from mcjepa_jax.models import mcjepa

_SYNTHETIC_PAIRS = 256
_TRAIN_PAIRS = 512
_KNN_BANK = 2000
_KNN_QUERIES = 1000
_DECODED_WHOLE = 100
_JUDGED = 4  # pairs of a set whose true flow is held against the frames
_CIFAR_STRIDE = 5  # every fifth image is a query: its labels are sorted

Params = Any


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is evaluated; `initial` are the parameters before training."""

  config: Any
  model: mcjepa.MCJEPA
  params: Params
  initial: Params
  mesh: jax.sharding.Mesh


class Eval(NamedTuple):
  """A kind of eval: functions of (config or subject, the set's name)."""

  examples: Callable[[Any, str], Any]  # what it reads; finds all that is wrong
  run: Callable[[Subject, str], dict[str, float]]


def _flow_eval(subject, name):
  config = subject.config
  synthetic = name == "synthetic"
  size = tuple(config.motion.size)
  predictor = functools.partial(
      inference.flow_predictor, subject.model, mesh=subject.mesh
  )
  predictors = {"": predictor(subject.params)}
  train_flows = []
  if synthetic:
    predictors["random_init"] = predictor(subject.initial)
    train = sources.train_pairs(config.seed, size, _TRAIN_PAIRS)
    train_flows = [train[i]["flow_12"] for i in range(len(train))]
  return flow.run(
      name,
      _flow_pairs(config, name),
      predictors,
      batch_size=config.eval_batch_size,
      max_pixels=config.eval_max_pixels,
      classical=not synthetic,
      train_flows=train_flows,
  )


def _flow_pairs(config, name):
  return sources.flow_pairs(
      name,
      sources.data_root(config.data_root, config.data_cache),
      seed=sources.held_out_seed(config.eval_seed),
      size=tuple(config.motion.size),
      count=_SYNTHETIC_PAIRS,
  )


def _knn_eval(subject, name):
  config = subject.config
  load = functools.partial(probe.load, name=f"knn/{name}", progress=True)
  queries = _labelled(config, name)
  if name == "synthetic":
    size = config.content.size
    bank = sources.train_images(config.seed, size, _KNN_BANK)
    parts = (
        load(bank, np.arange(len(bank)), size=size),
        load(queries, np.arange(len(queries)), size=size),
    )
  else:
    index = np.arange(len(queries))
    query = index % _CIFAR_STRIDE == 0
    size = config.knn_size
    parts = (
        load(queries, index[~query], size=size),
        load(queries, index[query], size=size),
    )
  embedder = functools.partial(
      inference.embedder, subject.model, mesh=subject.mesh
  )
  embedders = {
      "": embedder(subject.params),
      "random_init": embedder(subject.initial),
  }
  return probe.run(name, *parts, embedders)


def _labelled(config, name):
  return sources.labelled(
      name,
      sources.data_root(config.data_root, config.data_cache),
      seed=sources.held_out_seed(config.eval_seed),
      size=config.content.size,
      count=_KNN_QUERIES,
  )


def _davis_eval(subject, name):
  config, model = subject.config, subject.model
  settings = config.davis.to_dict()
  size, stride = settings.pop("size"), settings.pop("stride")
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
  batch = subject.mesh.devices.size
  return davis.run(name, sequences, extractors, batch=batch, **settings)


def _mask_sequences(config, name):
  return sources.mask_sequences(name, config.data_root)


_EVALS = {
    "davis": Eval(_mask_sequences, _davis_eval),
    "flow": Eval(_flow_pairs, _flow_eval),
    "knn": Eval(_labelled, _knn_eval),
    **{
        kind: Eval(
            functools.partial(dense_evals.examples, kind),
            functools.partial(dense_evals.run, kind),
        )
        for kind in dense_evals.KINDS
    },
}


def check(config: Any) -> list[str]:
  """What is wrong with the evals of a config and the data they need."""
  faults = []
  for entry in config.evals:
    kind, _, name = str(entry).partition("/")
    if kind not in _EVALS or not name:
      known = " or ".join(f"{kind}/SET" for kind in _EVALS)
      faults.append(f"evals: expected {known}, got {entry!r}")
      continue
    faults += errors.collect(
        functools.partial(_check_examples, config, kind, name)
    )
  return faults


def _check_examples(config, kind, name):
  """Raises UserError for examples that cannot be decoded.

  Small sets are decoded whole, of large ones an example: a fault is told now
  and not after the training. So is flow that the first examples contradict.
  """
  examples = _EVALS[kind].examples(config, name)
  few = len(examples) <= _DECODED_WHOLE
  count = len(examples) if few else min(len(examples), _JUDGED)
  judge = flow_faults.Judge()

  def look(i):
    example = examples[i]
    if kind == "flow" and i < _JUDGED:
      judge.add(example)

  faults = errors.collect(*(functools.partial(look, i) for i in range(count)))
  faults += [f"flow/{name}: {f}" for f in judge.misreadings(certain=True)]
  if faults:
    raise errors.UserError(*faults)


def run(subject: Subject) -> dict[str, float]:
  """The results of the config's evals, keyed `EVAL/SET/METRIC`."""
  results = {}
  for entry in subject.config.evals:
    kind, _, name = entry.partition("/")
    results |= _EVALS[kind].run(subject, name)
  return results
