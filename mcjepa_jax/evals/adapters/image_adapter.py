"""The evals of labelled images, from a config: what they read, and their run."""

from typing import Any

from mcjepa_jax.data import sources
from mcjepa_jax.evals import finetune, frozen_features, inference, linear
from mcjepa_jax.evals.eval_subject import Results, Subject

_KNN_BANK = 2000
_KNN_QUERIES = 1000


def _labelled(config, name):
  return sources.labelled_split(
      name,
      sources.data_root(config.data_root, config.data_cache),
      seed=config.seed,
      eval_seed=sources.held_out_seed(config.eval_seed),
      size=config.content.size,
      counts=(_KNN_BANK, _KNN_QUERIES),
  )


def examples(config: Any, name: str) -> Any:
  """The images of a set's test part."""
  return _labelled(config, name)[1]


def _label_size(config, name):
  return config.content.size if name == "synthetic" else config.knn_size


def features(subject: Subject, name: str) -> list[frozen_features.FeatureSet]:
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
            sources.evenly_spaced(part, subject.limit),
            embedders,
            size=_label_size(config, name),
            name=f"features/{name}",
        )
        for part in _labelled(config, name)
    ]
  return subject.held[name]


def run_linear(subject: Subject, name: str) -> Results:
  """The results, keyed `linear/SET/METRIC`."""
  return linear.run(
      *(name, *features(subject, name)),
      **subject.config.linear.to_dict(),
      seed=subject.config.seed,
  )


def run_finetune(subject: Subject, name: str) -> Results:
  """The results, keyed `finetune/SET/METRIC`."""
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
