"""The eval `davis/SET`, from a config: what it reads, and its run."""

import functools
from typing import Any

from mcjepa_jax.data import sources
from mcjepa_jax.evals import davis, inference
from mcjepa_jax.evals.eval_subject import Results, Subject


def run(subject: Subject, name: str) -> Results:
  """The results, keyed `davis/SET/METRIC`."""
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
  sequences = examples(config, name)
  return davis.run(name, sequences, extractors, batch=batch, **settings)


def examples(config: Any, name: str) -> Any:
  """The sequences of frames and masks of a set."""
  return sources.mask_sequences(
      name, sources.data_root(config.data_root, config.data_cache)
  )
