"""Sequences of frames with masks of their objects, in the official layouts.

An annotated frame has a label for each pixel: 0 is no object, 255 does not count
as one (github.com/davisvideochallenge/davis2017-evaluation, davis2017/davis.py).
Where a set is looked for stands in `data/catalog`. Nothing but names is held
in memory.
"""

from collections.abc import Mapping
import dataclasses
import io
import json
import re
from typing import Any

from jaxtyping import UInt8
import numpy as np
from PIL import Image

from mcjepa_jax.data.readers import image_files
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

_VOID = 255
_MAX_FAULTS = 10  # of one sequence that are told
_MAX_LIST = 2**22  # bytes of a split's list, or 40,000 lines of DAVIS 2016's
_MAX_META = 2**26  # bytes of meta.json, 19,000 for each of 3,471 videos
# What a 2016 archive's list holds in place of a name; the mask's path follows.
_LISTED_FRAME = re.compile(r"/?JPEGImages/480p/([^/\s]+)/[^/\s]+\s+\S+")
_DAVIS_LISTS = {
    "2016": ("ImageSets/2016/val.txt", "ImageSets/480p/val.txt"),
    "2017": ("ImageSets/2017/val.txt",),
}


@dataclasses.dataclass(frozen=True)
class MaskSequence:
  """One sequence: its files, and the objects that are followed in it."""

  name: str
  frames: tuple[paths.Location, ...]
  masks: tuple[paths.Location | None, ...]  # None: the frame is not annotated
  size: tuple[int, int]  # (h, w) of every frame and mask
  objects: tuple[int, ...] = ()  # labels, each of which may begin at any frame
  merged: bool = False  # all objects are one, with label 1
  stated: bool = False  # by meta.json: no mask may show another

  def __len__(self) -> int:
    return len(self.frames)

  def frame(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns one frame."""
    frame = image_files.read_image(self.frames[index])
    self._expect_size(self.frames[index], frame.shape[:2])
    return frame

  def labels(self, index: int) -> UInt8[np.ndarray, "h w"] | None:
    """Returns the labels of one frame, None where it is not annotated."""
    path = self.masks[index]
    if path is None:
      return None
    labels = read_labels(path)
    self._expect_size(path, labels.shape)
    labels[labels == _VOID] = 0
    if self.stated:
      found = np.flatnonzero(np.bincount(labels.ravel())).tolist()
      if unknown := sorted(set(found) - {0, *self.objects}):
        known = ", ".join(map(str, self.objects)) or "none"
        raise UserError(
            f"{path}: expected the labels that meta.json has for {self.name},"
            f" {known}, came {', '.join(map(str, unknown))}"
        )
    return (labels > 0).astype(np.uint8) if self.merged else labels

  def _expect_size(self, path: paths.Location, came: tuple[int, int]) -> None:
    if came != self.size:
      raise UserError(
          f"{path}: expected {self.size[1]}x{self.size[0]}, the size of"
          f" {self.frames[0]}, came {came[1]}x{came[0]}"
      )

  def check(self) -> None:
    """Raises UserError for files whose heads are of another size or kind."""
    faults = []
    heads = [(path, _frame_size) for path in self.frames]
    heads += [(path, _mask_size) for path in self.masks if path is not None]
    for path, size in heads:
      try:
        self._expect_size(path, size(path))
      except UserError as error:
        faults += error.messages
      if len(faults) >= _MAX_FAULTS:
        break
    if faults:
      raise UserError(*faults)


class MaskSequences:
  """Sequences below two folders, opened when asked for.

  `objects` are each sequence's labels; None where its first mask has them all,
  and every frame must have a mask.
  """

  def __init__(
      self,
      folder: paths.Location,
      resolution: str,
      objects: Mapping[str, tuple[int, ...] | None],
      *,
      merged: bool = False,
  ):
    self._frames = folder / "JPEGImages" / resolution
    self._masks = folder / "Annotations" / resolution
    self._objects = dict(objects)
    self._names = tuple(objects)
    self._merged = merged

  def __len__(self) -> int:
    return len(self._names)

  def record_id(self, index: int) -> str:
    """Returns the sequence's name."""
    return self._names[index]

  def length(self, index: int) -> int:
    """Returns how many frames a sequence has, of which none is read."""
    return len(_frames(self._frames / self._names[index]))

  def sequence(self, index: int) -> MaskSequence:
    """Returns one sequence.

    Raises:
      UserError: frames or masks are missing, or the first mask is empty.
    """
    name = self._names[index]
    objects = self._objects[name]
    frames = _frames(self._frames / name)
    masks = _files(self._masks / name, (".png",), "masks")
    faults = [
        f"{path}: expected a frame {stem} for it in {self._frames / name}"
        for stem, path in masks.items()
        if stem not in frames
    ]
    if objects is None:
      faults += [
          f"{self._masks / name / stem}.png: not found; expected a mask for"
          f" {path}"
          for stem, path in frames.items()
          if stem not in masks
      ]
    if faults:
      raise UserError(*faults[:_MAX_FAULTS])
    sequence = MaskSequence(
        name,
        tuple(frames.values()),
        tuple(masks.get(stem) for stem in frames),
        _frame_size(next(iter(frames.values()))),
        objects or (),
        self._merged,
        stated=objects is not None,
    )
    if objects is not None:
      return sequence
    found = np.unique(sequence.labels(0))
    objects = tuple(found[found > 0].tolist())
    if not objects:
      raise UserError(
          f"{sequence.masks[0]}: expected an object in the first mask, came none"
      )
    return dataclasses.replace(sequence, objects=objects)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns the first annotated frame with its labels, all files checked.

    Only heads are read of the others. Raises UserError for what is wrong.
    """
    sequence = self.sequence(index)
    sequence.check()
    annotated = [i for i, mask in enumerate(sequence.masks) if mask is not None]
    # Between what is given and the last frame, which does not count.
    if len(annotated) < 3:
      raise UserError(
          f"{self._masks / sequence.name}: expected masks of at least three"
          f" frames, came {len(annotated)}: nothing would be measured"
      )
    first = annotated[0]
    return {"image": sequence.frame(first), "mask": sequence.labels(first)}


def davis(root: image_files.Path, year: str) -> MaskSequences:
  """Returns the validation part of DAVIS at 480p; all, where it has no lists.

  In 2016 all the objects of a frame are one foreground.
  """
  folder = paths.find(root, ("DAVIS", ""), "JPEGImages/480p")
  if (folder / "ImageSets").is_dir():
    lists = [folder / name for name in _DAVIS_LISTS[year]]
    found = [path for path in lists if path.is_file()]
    if not found:
      raise UserError(
          f"{lists[0]}: not found; expected the list of validation sequences"
          + "".join(f", or {other}" for other in lists[1:])
      )
    names = _listed(found[0])
  else:
    names = _subfolders(folder / "JPEGImages" / "480p")
  return MaskSequences(
      folder, "480p", dict.fromkeys(names), merged=year == "2016"
  )


def youtube_vos(root: image_files.Path) -> MaskSequences:
  """Returns the training part of YouTube-VOS, the one with published truth.

  Sequences and objects are those of meta.json; an object may begin later than
  its sequence (github.com/ychfan/youtube-vos.org, _pages/dataset/vos.md).
  """
  folder = paths.find(root, ("youtube_vos/train", "train", ""), "meta.json")
  objects = _meta(folder / "meta.json")
  # One listing tells now what else the last of thousands would tell.
  there = set(paths.visible(folder / "JPEGImages", "videos"))
  missing = [name for name in objects if name not in there]
  if missing:
    raise UserError(
        f"{folder / 'JPEGImages' / missing[0]}: not found; meta.json names"
        f" {len(objects)} videos, of which {len(missing)} are missing"
    )
  return MaskSequences(folder, "", objects)


def read_labels(path: image_files.Path) -> UInt8[np.ndarray, "h w"]:
  """Returns the labels of a png: a palette's indices, or black and white.

  White, in a png without a palette, is label 1; other greys could be labels or
  colours, and are refused.
  """
  data = image_files.read_encoded(path)
  image = _head(path, io.BytesIO(data), "PNG")
  _expect_labels(path, image, len(data))
  try:
    labels = np.array(image)
  # Pillow answers a damaged file with whatever its parser ran into.
  except Exception as error:
    raise UserError(f"{path}: expected a png, came: {error}") from error
  if image.mode == "P":
    return labels
  greys = np.unique(labels)
  if image.mode == "L" and not {0, 255}.issuperset(greys.tolist()):
    raise UserError(
        f"{path}: expected a palette's indices, or 0 and 255 alone, came greys"
        f" {greys[:9].tolist()} without a palette"
    )
  return (labels > 0).astype(np.uint8)


def _head(
    path: image_files.Path, file: io.BufferedIOBase, *formats: str
) -> Image.Image:
  """Returns an image of which no more than the head is read."""
  try:
    return Image.open(file, formats=formats)
  # Pillow answers a hostile file with whatever its parser ran into.
  except Exception as error:
    raise UserError(
        f"{path}: expected {' or '.join(formats)}, came a file of no such format"
    ) from error


def _expect_labels(
    path: image_files.Path, image: Image.Image, size: int
) -> None:
  """Raises UserError for a png that can hold no labels."""
  most = min(image_files.MAX_PIXELS, 8 * image_files.DEFLATE_RATIO * size)
  if image.width * image.height > most:
    raise UserError(
        f"{path}: expected at most {most} pixels, came"
        f" {image.width}x{image.height}"
    )
  lacks = image.mode == "P" and image.palette is None
  if image.mode not in ("P", "L", "1") or lacks:
    raise UserError(
        f"{path}: expected a png with a palette, or black and white, came"
        f" {'a palette png without its palette' if lacks else image.mode}"
    )


def _frame_size(path: paths.Location) -> tuple[int, int]:
  """Returns (h, w) as a frame's head has it."""
  with image_files.opened(path, "a frame") as (file, _):
    return _head(path, file, "JPEG").size[::-1]


def _mask_size(path: paths.Location) -> tuple[int, int]:
  """Returns (h, w) as a mask's head has it."""
  with image_files.opened(path, "a mask") as (file, size):
    image = _head(path, file, "PNG")
    _expect_labels(path, image, size)
    return image.size[::-1]


def _frames(folder: paths.Location) -> dict[str, paths.Location]:
  return _files(folder, (".jpg", ".jpeg"), "frames")


def _files(
    folder: paths.Location, suffixes: tuple[str, ...], wanted: str
) -> dict[str, paths.Location]:
  """Returns the files of a folder by their names without suffix, in order."""
  listed = [folder / name for name in paths.visible(folder, wanted)]
  found = {p.stem: p for p in listed if p.suffix.lower() in suffixes}
  if not found:
    raise UserError(
        f"{folder}: expected {wanted} ({', '.join(suffixes)}), came none"
    )
  return found


def _subfolders(folder: paths.Location) -> list[str]:
  names = paths.visible(folder, "sequences")
  names = [name for name in names if (folder / name).is_dir()]
  if not names:
    raise UserError(f"{folder}: expected folders of frames, came none")
  return names


def _expect_name(path: paths.Location, name: str) -> str:
  """Returns the name of a sequence, which can lead nowhere but into a folder."""
  if not name or name.startswith(".") or set(name) & set("/\\\0"):
    raise UserError(
        f"{path}: expected names of sequences, which are plain folders, came"
        f" {name[:80]!r}"
    )
  return name


def _listed(path: paths.Location) -> list[str]:
  """Returns the sequences of a split's list, each once."""
  wanted = "a list of sequences"
  with image_files.opened(path, wanted) as (file, size):
    if size > _MAX_LIST:
      raise UserError(
          f"{path}: expected at most {_MAX_LIST} bytes, came {size}"
      )
    text = file.read(size).decode("utf-8", "replace")
  names = []
  for line in filter(None, map(str.strip, text.splitlines())):
    frame = _LISTED_FRAME.fullmatch(line)
    names.append(_expect_name(path, frame[1] if frame else line))
  if not names:
    raise UserError(f"{path}: expected {wanted}, came none")
  return list(dict.fromkeys(names))


def _meta(path: paths.Location) -> dict[str, tuple[int, ...]]:
  """Returns the labels of each sequence of YouTube-VOS's meta.json."""
  with image_files.opened(path, "YouTube-VOS's meta.json") as (file, size):
    if size > _MAX_META:
      raise UserError(
          f"{path}: expected at most {_MAX_META} bytes, came {size}"
      )
    data = file.read(size)
  try:
    videos = json.loads(data)["videos"]
    objects = {
        name: tuple(sorted({_label(label) for label in video["objects"]}))
        for name, video in videos.items()
    }
  except (
      AttributeError,
      KeyError,
      RecursionError,
      TypeError,
      ValueError,
  ) as error:
    raise UserError(
        f"{path}: expected {{'videos': {{NAME: {{'objects': {{LABEL: ...}}}}}}}},"
        f" labels from 1 to {_VOID - 1}, came: {type(error).__name__}: {error}"
    ) from error
  if not objects:
    raise UserError(f"{path}: expected videos, came none")
  for name in objects:
    _expect_name(path, name)
  return objects


def _label(text: Any) -> int:
  label = int(text)
  if not 0 < label < _VOID:
    raise ValueError(f"the label {text!r}")
  return label
