"""Streams of training batches, each a pure function of (seed, batch index).

Neither the number of workers nor the number of hosts changes what batch k
holds, and no label enters a batch of the training:

  motion   {"frames": u8[2b h w 3]}  frame_1, frame_2 of pair 0, of pair 1, ...
  content  {"views": u8[2n h w 3]}   view_1, view_2 of image 0, of image 1, ...

The hosts share the rows out, in order. Where that cuts a pair in two both hosts
read it.

An evaluation that trains on labels reads

  crops    {"crops": u8[n s s 4]}    RGB and, last, the labels of each image

A data set has `__len__`, `__getitem__(i) -> dict` and `record_id(i) -> str`. One
that replaces what it makes an element of tells so in the element's `faults`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
from typing import Any

import grain
import numpy as np

from mcjepa_jax.data.pipeline import geometry, labelled_crops, shared_memory
from mcjepa_jax.data.pipeline.stream import Stream, TaskBatch
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

# Records that are tried in the place of one that cannot be read, and how far one
# lies from the next: damage comes in runs. A prime, so that all are reached.
_ATTEMPTS = 10
_STRIDE = 104_729

# Records of a set, spread over it, whose names are in its fingerprint.
_SPREAD = 256

# First word of what is added to the seed, so that no two streams draw the same
# numbers.
_STREAM = {"motion": 0, "content": 1, "crops": 2}


@dataclasses.dataclass(frozen=True)
class MotionSource:
  """Frame pairs of one set, and the geometry that makes them one size."""

  name: str
  # Its elements hold frame_1 and frame_2, u8[h w 3].
  dataset: Any
  size: tuple[int, int]  # height, width of a training frame
  weight: float = 1.0  # share of the batches, relative to the other sources
  # More options of geometry.pair_geometry.
  geometry: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ContentSource:
  """Images of one set."""

  name: str
  dataset: Any  # its elements hold image, u8[h w 3]
  weight: float = 1.0  # share of the batches, relative to the other sources


def _random(seed: int, spawn_key: tuple[int, ...]) -> np.random.SeedSequence:
  # As a spawn key, since zeros are filled in after a short entropy: (seed, 0)
  # and (seed, 0, 0, 0) are one generator.
  return np.random.SeedSequence(seed, spawn_key=spawn_key)


@dataclasses.dataclass(frozen=True)
class _Source:
  """The images of a data set with their record's name, without its labels."""

  name: str
  dataset: Any
  weight: float
  keys: tuple[str, ...]
  transform: functools.partial

  def __len__(self) -> int:
    return len(self.dataset)

  def read(self, index: int) -> tuple[list[np.ndarray], list[tuple[str, str]]]:
    """Returns the images, and what was replaced within them."""
    element = self.dataset[index]
    faults = element.get("faults", ())
    return [element[key] for key in self.keys], [
        (f"{self.name}/{record}", fault) for record, fault in faults
    ]

  def record(self, index: int) -> str:
    return f"{self.name}/{self.dataset.record_id(index)}"

  def fingerprint(self) -> dict[str, Any]:
    spread = np.linspace(0, len(self) - 1, min(len(self), _SPREAD)).round()
    ids = [self.record(int(index)) for index in spread]
    return {
        "name": self.name,
        "weight": self.weight,
        "length": len(self),
        "ends": [ids[0], ids[-1]],
        "digest": hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16],
    } | {
        # As JSON gives it back.
        k: list(v) if isinstance(v, tuple) else v
        for k, v in self.transform.keywords.items()
    }


@dataclasses.dataclass(frozen=True)
class _Cut:
  """Reads a record and cuts it with the generator of its position in the stream.

  A record that cannot be read or cut is replaced by another of its data set, so
  that all others keep their positions.
  """

  source: _Source
  key: str
  seed: int
  stream_and_source: tuple[int, int]  # their numbers

  def __call__(self, index: int, number: int) -> TaskBatch:
    faults = []
    for attempt in range(min(_ATTEMPTS, len(self.source))):
      other = (number + attempt * _STRIDE) % len(self.source)
      record = self.source.record(other)
      rng = np.random.default_rng(
          _random(self.seed, (*self.stream_and_source, index))
      )
      try:
        images, replaced = self.source.read(other)
        images = self.source.transform(*images, rng)
      except paths.Unreachable:
        raise  # of no other record either, and no fault of this one
      except UserError as error:
        faults.append((record, "; ".join(error.messages)))
      else:
        return TaskBatch({self.key: images}, [record], faults + replaced)
    raise UserError(*(f"{record}: {fault}" for record, fault in faults))


def _stack(parts: Sequence[TaskBatch], *, number: int, count: int) -> TaskBatch:
  """Returns the rows of host `number` of the `count` that read these parts."""
  (key,) = parts[0].arrays
  images = [image for part in parts for image in part.arrays[key]]
  rows = len(images) // count
  images = images[number * rows : (number + 1) * rows]
  batch = shared_memory.empty((len(images), *images[0].shape))
  return TaskBatch(
      # The only copy of what was cut.
      {key: np.stack(images, out=batch)},
      [record for part in parts for record in part.records],
      [fault for part in parts for fault in part.faults],
  )


def _batches(
    source: _Source,
    key: str,
    *,
    seed: int,
    stream_and_source: tuple[int, int],
    batch_size: int,
    host_index: int,
    host_count: int,
) -> grain.MapDataset:
  """Returns this host's rows of the endless batches of one source."""
  # Grain adds the epoch to the seed: with the config's own seed, epoch 1 of
  # seed 0 would be epoch 0 of seed 1.
  shuffle_seed = int(_random(seed, stream_and_source).generate_state(1)[0])
  # Twice the records are a multiple of the hosts: where they are none, two
  # neighbours read the same and keep half the rows each.
  readers = 2 if batch_size % host_count else 1
  groups = host_count // readers
  return (
      grain.MapDataset.range(len(source))
      .shuffle(seed=shuffle_seed)
      .repeat()
      # After repeat, so that the index, and with it the crop, is new in each
      # epoch.
      .map_with_index(_Cut(source, key, seed, stream_and_source))
      .batch(
          batch_size // groups,
          # Grain's length of the other kind overflows at one row.
          drop_remainder=True,
          batch_fn=functools.partial(
              _stack, number=host_index % readers, count=readers
          ),
      )
      # Part g of batch k is small batch k * groups + g: consecutive rows, so
      # that the hosts' parts in order are the batch of a single host.
      .slice(slice(host_index // readers, None, groups))
  )


def _check(
    kind: str, sources: Sequence[_Source], *, batch_size: int, host_count: int
) -> None:
  """Raises UserError for all that no stream can have."""
  faults = []
  if not sources:
    faults.append(f"the {kind} stream needs at least one source, got none")
  names = [source.name for source in sources]
  for source in sources:
    who = f'{kind} source "{source.name}"'
    if names.count(source.name) > 1:
      faults.append(f"{who} is named twice")
    if not len(source):
      faults.append(f"{who} is empty")
    if source.weight <= 0:
      faults.append(f"{who} needs a positive weight, got {source.weight}")
  if batch_size < 1 or 2 * batch_size % host_count:
    faults.append(
        f"batch size of the {kind} stream must be positive, and its double a "
        f"multiple of the number of hosts, {host_count}, got {batch_size}"
    )
  if faults:
    raise UserError(*dict.fromkeys(faults))


def _stream(
    kind: str,
    key: str,
    sources: Sequence[_Source],
    *,
    batch_size: int,
    seed: int,
    start: int,
    num_workers: int,
    prefetch: int,
    host_index: int,
    host_count: int,
) -> Stream:
  _check(kind, sources, batch_size=batch_size, host_count=host_count)
  parts = [
      _batches(
          source,
          key,
          seed=seed,
          stream_and_source=(_STREAM[kind], number),
          batch_size=batch_size,
          host_index=host_index,
          host_count=host_count,
      )
      for number, source in enumerate(sources)
  ]
  return Stream(
      grain.MapDataset.mix(parts, [source.weight for source in sources]),
      {
          "stream": kind,
          "seed": seed,
          "batch_size": batch_size,
          "sources": [source.fingerprint() for source in sources],
      },
      start=start,
      num_workers=num_workers,
      prefetch=prefetch,
  )


def motion_stream(
    sources: Sequence[MotionSource],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    num_workers: int = 0,
    prefetch: int = 2,
    host_index: int = 0,
    host_count: int = 1,
) -> Stream:
  """Returns the stream of {"frames"}; `batch_size` counts pairs of all hosts.

  Each batch is of one source, the same on every host; sources take turns in the
  proportion of their weights.
  """
  cut = [
      _Source(
          name=source.name,
          dataset=source.dataset,
          weight=source.weight,
          keys=("frame_1", "frame_2"),
          transform=functools.partial(
              geometry.pair_frames, size=source.size, **source.geometry
          ),
      )
      for source in sources
  ]
  return _stream(
      "motion",
      "frames",
      cut,
      batch_size=batch_size,
      seed=seed,
      start=start,
      num_workers=num_workers,
      prefetch=prefetch,
      host_index=host_index,
      host_count=host_count,
  )


def content_stream(
    sources: Sequence[ContentSource],
    *,
    batch_size: int,
    size: int,
    seed: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    start: int = 0,
    num_workers: int = 0,
    prefetch: int = 2,
    host_index: int = 0,
    host_count: int = 1,
) -> Stream:
  """Returns the stream of {"views"}; `batch_size` counts images of all hosts.

  Each image gives two random resized crops of size x size. Batches are mixed
  as those of `motion_stream`.
  """
  cut = functools.partial(
      geometry.two_views, size=size, scale=scale, ratio=ratio, flip=flip
  )
  return _stream(
      "content",
      "views",
      [_Source(s.name, s.dataset, s.weight, ("image",), cut) for s in sources],
      batch_size=batch_size,
      seed=seed,
      start=start,
      num_workers=num_workers,
      prefetch=prefetch,
      host_index=host_index,
      host_count=host_count,
  )


def crop_stream(
    name: str,
    dataset: Any,
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    prefetch: int = 2,
    **options: Any,
) -> Stream:
  """Returns the stream of {"crops"} of a labelled set, the whole batch here.

  `options` are those of labelled_crops.random_crop.
  """
  cut = functools.partial(labelled_crops.random_crop, **options)
  return _stream(
      "crops",
      "crops",
      [_Source(name, dataset, 1.0, ("image", "labels"), cut)],
      batch_size=batch_size,
      seed=seed,
      start=0,
      num_workers=num_workers,
      prefetch=prefetch,
      host_index=0,
      host_count=1,
  )
