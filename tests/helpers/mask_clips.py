"""Clips of textured squares that move, as arrays and as files of either set."""

import dataclasses
import json

import numpy as np
from PIL import Image

# As many colours as labels: of fewer, Pillow writes as few bits a pixel.
_PALETTE = [value for i in range(256) for value in (i, 255 - i, 7 * i % 256)]


def clip(*, shape=(48, 64), length=6, shift=2, side=16, objects=1, seed=0):
  """(frames u8 [t h w 3], labels u8 [t h w]): squares on a still background.

  Each object has a colour of its own, with noise, and moves `shift` pixels to
  the right a frame.
  """
  rng = np.random.default_rng(seed)
  h, w = shape
  frames = np.zeros((length, h, w, 3), np.uint8)
  labels = np.zeros((length, h, w), np.uint8)
  frames[:] = rng.integers(0, 60, (h, w, 3))
  for label in range(1, objects + 1):
    square = rng.integers(0, 60, (side, side, 3))
    square[..., label - 1] += 195
    y = 4 + (label - 1) * (side + 4)
    for t in range(length):
      x = 4 + shift * t
      frames[t, y : y + side, x : x + side] = square
      labels[t, y : y + side, x : x + side] = label
  return frames, labels


@dataclasses.dataclass
class Sequence:
  """A data.sets.mask_sets.MaskSequence of arrays; a mask is None or labels."""

  frames: np.ndarray
  masks: list
  objects: tuple = (1,)

  @property
  def size(self):
    return self.frames[0].shape[:2]

  def __len__(self):
    return len(self.frames)

  def frame(self, index):
    return self.frames[index]

  def labels(self, index):
    return self.masks[index]


class Sequences:
  """A set of them."""

  def __init__(self, **sequences):
    self._sequences = sequences

  def __len__(self):
    return len(self._sequences)

  def record_id(self, index):
    return list(self._sequences)[index]

  def length(self, index):
    return len(self.sequence(index))

  def sequence(self, index):
    return list(self._sequences.values())[index]


def save_labels(path, labels, *, palette=True):
  """Writes a png of labels; without a palette it is a grey picture."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(labels)
  if palette:
    image.putpalette(_PALETTE)
  image.save(path)


def save(root, name, frames, labels, resolution="480p", numbers=None):
  """Writes a sequence; a mask that is None is left out."""
  for t, (frame, mask) in enumerate(zip(frames, labels, strict=True)):
    stem = f"{t if numbers is None else numbers[t]:05d}"
    path = root / "JPEGImages" / resolution / name / f"{stem}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(path, quality=95)
    if mask is not None:
      place = root / "Annotations" / resolution / name
      save_labels(place / f"{stem}.png", mask)


def davis(root, *, listed=("walk",), **changes):
  """Writes DAVIS: `run`, an object, and `walk`, two; a list names the split."""
  save(root, "run", *clip(objects=1, **changes))
  save(root, "walk", *clip(objects=2, **changes))
  for year in ("2016", "2017"):
    path = root / "ImageSets" / year / "val.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in listed))


def youtube_vos(root, *, begins=2, **changes):
  """Writes one video whose second object, label 3, begins later."""
  frames, labels = clip(objects=2, **changes)
  labels[labels == 2] = 3
  for t in range(begins):
    labels[t][labels[t] == 3] = 0
  numbers = [5 * t for t in range(len(frames))]
  save(root, "0043f083b5", frames, labels, "", numbers)
  objects = {"1": {"category": "dog"}, "3": {"category": "cat"}}
  meta = {"videos": {"0043f083b5": {"objects": objects}}}
  (root / "meta.json").write_text(json.dumps(meta))
