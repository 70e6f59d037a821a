"""The eval `flow/SET`, from a config: what it reads, and its run."""

from typing import Any

from mcjepa_jax.data import sources
from mcjepa_jax.evals import flow, inference, tiling
from mcjepa_jax.evals.eval_subject import Params, Results, Subject

_SYNTHETIC_PAIRS = 256
_TRAIN_PAIRS = 512


def run(subject: Subject, name: str) -> Results:
  """The results, keyed `flow/SET/METRIC`."""
  config = subject.config
  synthetic = name == "synthetic"
  size = tuple(config.motion.size)
  predictors = {
      "": predictor(subject, subject.params),
      "random_init": predictor(subject, subject.initial),
  }
  train_flows = []
  if synthetic:
    train = sources.train_pairs(config.seed, size, _TRAIN_PAIRS)
    train_flows = [train[i]["flow_12"] for i in range(len(train))]
  return flow.run(
      name,
      sources.evenly_spaced(examples(config, name), subject.limit),
      predictors,
      batch_size=config.eval_batch_size,
      max_pixels=config.eval_max_pixels,
      classical=not synthetic,
      train_flows=train_flows,
  )


def predictor(subject: Subject, params: Params) -> tiling.Predictor:
  """The flow of pairs of frames by these parameters."""
  return inference.flow_predictor(subject.model, params, mesh=subject.mesh)


def examples(config: Any, name: str) -> Any:
  """The pairs of a set, with their true flow."""
  return sources.flow_pairs(
      name,
      sources.data_root(config.data_root, config.data_cache),
      seed=sources.held_out_seed(config.eval_seed),
      size=tuple(config.motion.size),
      count=_SYNTHETIC_PAIRS,
  )
