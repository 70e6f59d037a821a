"""The evals of segmentation, from a config: what they read, and their run.

`segmentation/SET` trains a linear head on the frozen encoder, on the untrained
one and on raw pixels; `upernet/SET` trains the encoder with its head, and the
untrained one the same way.
"""

from collections.abc import Iterator
import math
from typing import Any

import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.data import sources
from mcjepa_jax.data.pipeline import batches, labelled_crops
from mcjepa_jax.data.sets import segmentation_sets
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import segmentation
from mcjepa_jax.models import segmentation_heads
from mcjepa_jax.storage import paths

KINDS = ("segmentation", "upernet")


class _Both:
  """Examples of the two parts in turn, so that the first few are of both."""

  def __init__(self, parts: segmentation_sets.Parts):
    self._parts = parts

  def __len__(self) -> int:
    return 2 * max(len(part) for part in self._parts)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    part = self._parts[index % 2]
    return part[index // 2 % len(part)]


def examples(kind: str, config: Any, name: str) -> _Both:
  """What an eval of a kind reads.

  Raises:
    UserError: with all that is wrong with the kind's settings, or the layout.
  """
  faults = []
  options = config[kind]

  def expect(key, holds, expected):
    value = options[key]
    if not holds(value):
      faults.append(f"{kind}.{key}: expected {expected}, got {value!r}")

  def positive(*keys):
    for key in keys:
      expect(key, lambda x: 0 < x < math.inf, "a positive number")

  def share(*keys):
    for key in keys:
      expect(key, lambda x: 0 <= x < 1, "0 to below 1")

  positive("crop", "stride", "batch_size", "learning_rate", "max_share")
  expect("stride", lambda x: x <= options.crop, f"up to crop, {options.crop}")
  expect("weight_decay", lambda x: 0 <= x < math.inf, "0 or more")
  expect(
      "scale",
      lambda x: len(x) == 2 and 0 < x[0] <= x[1] < math.inf,
      "(least, most), above 0",
  )
  if kind == "upernet":
    positive("channels", "auxiliary_channels", "layer_decay")
    share("dropout", "drop_path")
    expect("auxiliary_weight", lambda x: 0 <= x < math.inf, "0 or more")
    expect(
        "pool_scales",
        lambda x: len(x) and all(type(s) is int and s > 0 for s in x),
        "positive integers",
    )
  if config.task == "train":  # an evaluation's model is the checkpoint's
    coarsest = 4 * 2 ** (len(config.model.encoder.depths) - 1)
    faults += crop_faults(kind, options.crop, coarsest)
  own = sources.choice(dict(options.sets), name, f"evals: {kind}")
  if own.num_steps < 1 or not 0 <= options.warmup_steps <= own.num_steps:
    faults.append(
        f"{kind}.warmup_steps: expected 0 to {kind}.sets.{name}.num_steps, at"
        f" least 1; got {options.warmup_steps} and {own.num_steps}"
    )
  if own.short_side < 0:
    faults.append(
        f"{kind}.sets.{name}.short_side: expected 0 or more, got"
        f" {own.short_side}"
    )
  if faults:
    raise errors.UserError(*faults)
  parts = _parts(config, name)
  faults = _size_faults(parts.test, own.short_side, config.eval_max_pixels)
  if faults:
    raise errors.UserError(*faults)
  return _Both(parts)


def _parts(config: Any, name: str) -> segmentation_sets.Parts:
  root = sources.data_root(config.data_root, config.data_cache)
  return sources.segmentation(name, root)


def _size_faults(
    part: segmentation_sets.SegmentationSet,
    short_side: int,
    max_pixels: int,
) -> list[str]:
  """The largest image whose logits have no room, as the heads have its size.

  Nothing is read where no image can be so large, nor of a remote set, of which
  each head would cost the whole file: there the test itself finds it.
  """
  remote = isinstance(part.root, paths.Remote)
  if remote or labelled_crops.most_pixels(short_side) <= max_pixels:
    return []
  larger = []
  for i in range(len(part)):
    try:
      size = labelled_crops.fitted_size(part.size(i), short_side)
    except errors.UserError:
      continue  # told where images are decoded
    if math.prod(size) > max_pixels:
      larger.append((math.prod(size), size, i))
  if not larger:
    return []
  _, (height, width), i = max(larger)
  return [
      f"{part.root / part.record_id(i)}: expected an image of at most"
      f" {max_pixels} pixels (eval_max_pixels) at its size for the test, got"
      f" {width}x{height}, the largest of {len(larger)} such images"
  ]


def crop_faults(kind: str, crop: int, coarsest: int) -> list[str]:
  """What is wrong with a crop for an encoder of a coarsest stride."""
  if crop % coarsest == 0:
    return []
  return [
      f"{kind}.crop: expected a multiple of {coarsest}, the encoder's coarsest"
      f" stride, got {crop}"
  ]


def run(kind: str, subject: Any, name: str) -> dict[str, float]:
  """The results of an eval of a kind, keyed `KIND/SET/METRIC`."""
  options = subject.config[kind]
  faults = crop_faults(kind, options.crop, subject.model.encoder.strides[-1])
  if faults:
    raise errors.UserError(*faults)
  parts = _parts(subject.config, name)
  label = f"{kind}/{name}"
  matrices = {}
  # One at a time: of fine-tuning each is a training state of its own.
  for suffix, network in _networks(kind, subject, len(parts.test.classes)):
    matrices |= {
        suffix or key: matrix
        for key, matrix in _measured(
            f"{label} {suffix}".strip(), network, parts, subject, options, name
        ).items()
    }
  found = segmentation.results(label, parts.test.classes, matrices)
  return found | {f"{label}/count": len(parts.test)}


def _networks(
    kind: str, subject: Any, classes: int
) -> Iterator[tuple[str, segmentation.Network]]:
  """The networks to train, and the suffix of their metrics."""
  options = subject.config[kind]
  encoder = subject.model.encoder
  encoders = {
      "": subject.params["encoder"],
      "random_init": subject.initial["encoder"],
  }
  shared = dict(size=options.crop, seed=subject.config.seed)
  if kind == "segmentation":
    head = segmentation_heads.LinearHead(classes)
    yield "", segmentation.linear_network(encoder, encoders, head, **shared)
    return
  head = segmentation_heads.UperHead(
      classes,
      channels=options.channels,
      pool_scales=tuple(options.pool_scales),
      auxiliary_channels=options.auxiliary_channels,
      dropout=options.dropout,
      dtype=encoder.dtype,
  )
  encoder = encoder.clone(drop_path=options.drop_path)
  for suffix, params in encoders.items():
    yield suffix, segmentation.tuned_network(
        encoder, params, head, layer_decay=options.layer_decay, **shared
    )


def _measured(label, network, parts, subject, options, name):
  """The confusion matrices of a network, once it is trained.

  The devices used are as many as divide the batch.
  """
  own = options.sets[name]
  mesh = sharding.dividing(subject.mesh, options.batch_size)
  stream = batches.crop_stream(
      name,
      parts.train,
      batch_size=options.batch_size,
      seed=subject.config.seed,
      num_workers=subject.config.workers,
      size=options.crop,
      short_side=own.short_side,
      scale=tuple(options.scale),
      max_share=options.max_share,
  )
  with stream:
    network = segmentation.fit(
        network,
        _crops(stream),
        mesh,
        name=label,
        num_steps=own.num_steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        auxiliary_weight=options.get("auxiliary_weight", 0.0),
        seed=subject.config.seed,
    )
  return segmentation.confusion_matrices(
      parts.test,
      segmentation.predictor(network, mesh),
      name=label,
      short_side=own.short_side,
      window=options.crop,
      stride=options.stride,
      batch_size=options.batch_size,
      max_pixels=subject.config.eval_max_pixels,
  )


def _crops(stream: batches.Stream) -> Iterator[np.ndarray]:
  """The batches; a record that was replaced ends an evaluation."""
  for part in stream:
    if part.faults:
      raise errors.UserError(*(fault for _, fault in part.faults))
    yield part.arrays["crops"]
