"""Sets of single images: folders, .npz and binary files, frames of sequences.

An example is {image: u8 [h w 3]}, with label: an int32 scalar where the set has
classes. Nothing but names is held in memory, as arrays, and no file is held
open: a worker that is handed the set gets some 40 bytes an image.
"""

from collections.abc import Sequence
import dataclasses
import os
import struct
import sys
import zipfile

from jaxtyping import Int32
import numpy as np

from mcjepa_jax.data.readers import image_files
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".ppm", ".bmp")

_CIFAR_SIDE = 32
_STL_SIDE = 96
_MAX_META = 2**16  # bytes of a file of class names


class Names:
  """A sequence of paths in two arrays.

  A list of a million strings is copied page by page into every forked worker,
  as reading a string writes its reference count.
  """

  def __init__(self, names: Sequence[str]):
    encoded = [os.fsencode(name) for name in names]
    self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    self._bytes = b"".join(encoded)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> str:
    index = range(len(self))[index]
    start = self._ends[index - 1] if index else 0
    return os.fsdecode(self._bytes[start : self._ends[index]])


@dataclasses.dataclass(frozen=True)
class Listing:
  """The images below a folder."""

  names: Names  # paths under the folder
  labels: Int32[np.ndarray, " n"] | None
  classes: list[str]
  links: list[str]  # symbolic links that were followed


def find_images(root: image_files.Path) -> Listing:
  """Returns all images below a folder, a folder's own first, sorted by name.

  Files are images by their suffix, see SUFFIXES.
  Where all lie in root/CLASS, the sorted classes are their labels; of any other
  tree the images have none. Hidden files and folders are left out.
  """
  root = paths.listed(paths.path(root))
  names, links, seen, top = [], [], set(), None
  waiting = [""]
  while waiting:
    folder = waiting.pop()
    images, folders, linked = _entries(root / folder, seen)
    top = folders if top is None else top
    names += [f"{folder}{name}" for name in images]
    links += [f"{folder}{name}" for name in linked]
    waiting += [f"{folder}{name}/" for name in reversed(folders)]
  if top and all(name.count("/") == 1 for name in names):
    label = {name: number for number, name in enumerate(top)}
    labels = np.array([label[n.partition("/")[0]] for n in names], np.int32)
    # A class without images would leave a label that no image has.
    for number in np.setdiff1d(np.arange(len(top)), labels):
      raise UserError(f"{root / top[number]}: expected images, came none")
    return Listing(Names(names), labels, top, links)
  if not names:
    raise UserError(f"{root}: expected images, came none")
  return Listing(Names(names), None, [], links)


def _entries(
    folder: paths.Location, seen: set[tuple[int, int]]
) -> tuple[list[str], list[str], list[str]]:
  """Returns the sorted names of images, of folders, and of links among them."""
  if isinstance(folder, paths.Remote):
    _, folders, images = next(folder.walk())
    images = [name for name in images if name.lower().endswith(SUFFIXES)]
    folders, images = (
        sorted(name for name in found if not name.startswith("."))
        for found in (folders, images)
    )
    return images, folders, []
  images, folders, links = [], [], []
  try:
    stamp = os.stat(folder)
    if (stamp.st_dev, stamp.st_ino) in seen:
      raise UserError(
          f"{folder}: expected each folder once, came one again by a link"
      )
    seen.add((stamp.st_dev, stamp.st_ino))
    with os.scandir(folder) as entries:
      for entry in entries:
        if entry.name.startswith("."):
          continue
        if entry.is_dir():
          folders.append(entry.name)
        elif entry.name.lower().endswith(SUFFIXES):
          images.append(entry.name)
        else:
          continue
        if entry.is_symlink():
          links.append(entry.name)
  except (OSError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    reason = getattr(error, "strerror", None) or error
    raise UserError(
        f"{folder}: expected a folder of images, came: {reason}"
    ) from error
  return sorted(images), sorted(folders), sorted(links)


class ImageFolder:
  """Images of root/CLASS/*.JPEG, labelled by sorted class, or of any folder.

  With `min_side` large JPEGs are decoded smaller, see image_files.decode_image.
  """

  def __init__(self, root: image_files.Path, *, min_side: int | None = None):
    self.root = paths.path(root)
    self.min_side = min_side
    listing = find_images(self.root)
    self.classes = listing.classes
    self._names, self._labels = listing.names, listing.labels

  def __len__(self) -> int:
    return len(self._names)

  def record_id(self, index: int) -> str:
    """Returns the path under the root."""
    return self._names[index]

  def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
    path = self.root / self.record_id(index)
    example = {"image": image_files.read_image(path, min_side=self.min_side)}
    if self._labels is not None:
      example["label"] = self._labels[index]
    return example


class SequenceFrames:
  """The frames of sequences (see data.video) as single images, in order."""

  def __init__(self, sequences: Sequence):
    self.sequences = list(sequences)
    self._ends = np.cumsum([len(s) for s in self.sequences], dtype=np.int64)
    self.classes = []

  def __len__(self) -> int:
    return int(self._ends[-1])

  def record_id(self, index: int) -> str:
    """Returns the sequence's name and the frame's."""
    sequence, frame = _place(self._ends, index)
    return self.sequences[sequence].frame_id(frame)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    sequence, frame = _place(self._ends, index)
    return {"image": self.sequences[sequence].frame(frame)}


def _place(ends: np.ndarray, index: int) -> tuple[int, int]:
  """Returns (part, index in it) where parts end at `ends`."""
  index = range(int(ends[-1]))[index]
  part = int(np.searchsorted(ends, index, side="right"))
  return part, index - (int(ends[part - 1]) if part else 0)


class BinaryImages:
  """Images of side x side x 3 bytes, channel by channel, end to end in files.

  A row of a file is an image, its label's byte before it where `labels` is
  None and there are classes. With `by_column` a channel is stored column after
  column. An image is read from its file when it is asked for.
  """

  def __init__(
      self,
      image_paths: Sequence[image_files.Path],
      *,
      side: int,
      by_column: bool = False,
      classes: Sequence[str] = (),
      labels: Int32[np.ndarray, " n"] | None = None,
  ):
    self.files = [paths.path(path) for path in image_paths]
    self.classes = list(classes)
    self._side = side
    self._by_column = by_column
    self._labels = labels
    self._head = int(bool(classes) and labels is None)
    self._row = self._head + 3 * side * side
    counts = []
    for path in self.files:
      size = image_files.file_size(path, "images")
      counts.append(size // self._row)
      if not size or size % self._row:
        raise UserError(
            f"{path}: expected images of {self._row} bytes each, came {size} "
            "bytes"
        )
    self._ends = np.cumsum(counts, dtype=np.int64)
    if labels is not None and len(labels) != len(self):
      raise UserError(
          f"{self.files[0]}: expected {len(labels)} images, as many as labels, "
          f"came {len(self)}"
      )

  def __len__(self) -> int:
    return int(self._ends[-1])

  def record_id(self, index: int) -> str:
    """Returns the file's name and the image's number in it."""
    file, number = _place(self._ends, index)
    return f"{self.files[file].stem}/{number:06d}"

  def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
    file, number = _place(self._ends, index)
    path = self.files[file]
    with image_files.opened(path, "images", again=True) as (opened, _):
      opened.seek(number * self._row)
      row = opened.read(self._row)
    if len(row) != self._row:
      raise UserError(f"{path}: expected an image {number}, came a cut file")
    pixels = np.frombuffer(row, np.uint8, offset=self._head)
    pixels = pixels.reshape(3, self._side, self._side)
    axes = (2, 1, 0) if self._by_column else (1, 2, 0)
    example = {"image": np.ascontiguousarray(pixels.transpose(axes))}
    if self.classes:
      label = row[0] if self._head else self._labels[index]
      if label >= len(self.classes):
        raise UserError(
            f"{path}, image {number}: expected a label below "
            f"{len(self.classes)}, came {label}"
        )
      example["label"] = np.int32(label)
    return example


def cifar10_binary(folder: image_files.Path, split: str) -> BinaryImages:
  """Returns the `train` or `test` images of cifar-10-batches-bin.

  The labels are not sorted (cs.toronto.edu/~kriz/cifar.html, binary version).
  """
  folder = paths.path(folder)
  names = {
      "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
      "test": ["test_batch.bin"],
  }[split]
  return BinaryImages(
      [folder / name for name in names],
      side=_CIFAR_SIDE,
      classes=_class_names(folder / "batches.meta.txt"),
  )


def stl10_binary(folder: image_files.Path, split: str) -> BinaryImages:
  """Returns the `train`, `test` or `unlabeled` images of stl10_binary.

  Columns come first, labels run from 1 (cs.stanford.edu/~acoates/stl10).
  """
  folder = paths.path(folder)
  classes, labels = [], None
  if split != "unlabeled":
    classes = _class_names(folder / "class_names.txt")
    path = folder / f"{split}_y.bin"
    with image_files.opened(path, "labels") as (file, size):
      # As many labels as images, each of which is larger.
      labels = np.frombuffer(file.read(size), np.uint8).astype(np.int32) - 1
    if not size or labels.min() < 0 or labels.max() >= len(classes):
      raise UserError(
          f"{path}: expected labels from 1 to {len(classes)}, came "
          f"{_summary(labels + 1)}"
      )
  return BinaryImages(
      [folder / f"{split}_X.bin"],
      side=_STL_SIDE,
      by_column=True,
      classes=classes,
      labels=labels,
  )


def _class_names(path: paths.Location) -> list[str]:
  """Returns the lines of a text file that are not empty."""
  with image_files.opened(path, "a name of a class on each line") as (
      file,
      size,
  ):
    text = file.read(_MAX_META).decode("utf-8", "replace")
  names = [line.strip() for line in text.splitlines() if line.strip()]
  if size > _MAX_META or not 0 < len(names) <= 256:
    raise UserError(
        f"{path}: expected a name of a class on each line, at most 256, came "
        f"{len(names)} in {size} bytes"
    )
  return names


class NpzImages:
  """Encoded images in one .npz, as np.savez (not compressed) writes it.

  data: u8, the files end to end; offsets: int [n + 1]; labels: int [n];
  classes: str [k]. An image is read from the file when it is asked for.
  """

  def __init__(self, path: image_files.Path):
    self.path = paths.path(path)
    members = _npz_members(self.path, ("data", "offsets", "labels", "classes"))
    self._data, data_size = _npy_place(self.path, members["data"])
    self._offsets = _load(self.path, members["offsets"], "iu", np.int64)
    self._labels = _load(self.path, members["labels"], "iu", np.int32)
    self.classes = _load(self.path, members["classes"], "U", np.str_).tolist()
    steps = np.diff(self._offsets)
    if (
        len(self._offsets) < 2
        or self._offsets[0] != 0
        or self._offsets[-1] != data_size
        or (steps <= 0).any()
    ):
      raise UserError(
          f"{self.path}: expected offsets that rise from 0 to {data_size}, the "
          f"bytes of data, came {_summary(self._offsets)}"
      )
    if len(self._labels) != len(steps):
      raise UserError(
          f"{self.path}: expected {len(steps)} labels, as many as images, came "
          f"{len(self._labels)}"
      )
    if self._labels.min() < 0 or self._labels.max() >= len(self.classes):
      raise UserError(
          f"{self.path}: expected labels below {len(self.classes)}, the number "
          f"of classes, came {_summary(self._labels)}"
      )

  def __len__(self) -> int:
    return len(self._labels)

  def record_id(self, index: int) -> str:
    """Returns the image's number in the file."""
    return f"{range(len(self))[index]:06d}"

  def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
    index = range(len(self))[index]
    start, end = self._offsets[index : index + 2].tolist()
    name = f"{self.path}, image {index}"
    with _opened_npz(self.path) as (file, _):
      file.seek(self._data + start)
      encoded = file.read(end - start)
    return {
        "image": image_files.decode_image(encoded, name),
        "label": self._labels[index],
    }


def _summary(values: np.ndarray) -> str:
  if not values.size:
    return "none"
  return f"{values.size} of them, {values.min()} to {values.max()}"


def _opened_npz(path: paths.Location):
  return image_files.opened(path, "an .npz file", again=True)


def _npz_members(
    path: paths.Location, names: tuple[str, ...]
) -> dict[str, tuple[int, int]]:
  """Returns (offset, size) of each member's .npy bytes within the file.

  Members must be stored as they are: then no member can be larger than the file
  that holds it, and its bytes can be read in place.
  """
  members = {}
  with _opened_npz(path) as (file, size):
    try:
      with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
      raise UserError(
          f"{path}: expected an .npz file, came: {error}"
      ) from error
    for name in names:
      entry = entries.get(f"{name}.npy")
      if entry is None:
        raise UserError(
            f"{path}: expected an array {name!r}, came {sorted(entries)[:9]}"
        )
      stored = entry.compress_type == zipfile.ZIP_STORED
      if not stored or entry.file_size != entry.compress_size:
        raise UserError(
            f"{path}: expected {name!r} as np.savez stores it, came compressed"
        )
      file.seek(max(entry.header_offset, 0))
      header = file.read(30)
      # The index may point before the file's beginning.
      if (
          entry.header_offset < 0
          or len(header) < 30
          or header[:4] != b"PK\x03\x04"
      ):
        raise UserError(f"{path}: {name!r} does not lie where its index says")
      start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
      if start + entry.file_size > size:
        raise UserError(f"{path}: {name!r} runs past the end of the file")
      members[name] = (start, entry.file_size)
  return members


def _npy_header(
    path: paths.Location, member: tuple[int, int]
) -> tuple[int, int, np.dtype]:
  """Returns (offset, length, dtype) of a member's one-dimensional array."""
  start, size = member
  with _opened_npz(path) as (file, _):
    file.seek(start)
    try:
      version = np.lib.format.read_magic(file)
      read = {
          (1, 0): np.lib.format.read_array_header_1_0,
          (2, 0): np.lib.format.read_array_header_2_0,
      }[version]
      shape, _, dtype = read(file)
    # A hostile header raises whatever Python's own parser raises.
    except Exception as error:
      raise UserError(f"{path}: expected .npy arrays, came: {error}") from error
    offset = file.tell()
  if len(shape) != 1 or shape[0] < 0 or dtype.hasobject or not dtype.itemsize:
    raise UserError(
        f"{path}: expected arrays of one axis and no objects, came {shape} "
        f"{dtype}"
    )
  if offset - start + shape[0] * dtype.itemsize != size:
    raise UserError(
        f"{path}: expected {size} bytes for an array, its header says {shape} "
        f"{dtype}"
    )
  return offset, shape[0], dtype


def _npy_place(
    path: paths.Location, member: tuple[int, int]
) -> tuple[int, int]:
  """Returns (offset, length) of a member that must be bytes."""
  offset, length, dtype = _npy_header(path, member)
  if dtype != np.uint8:
    raise UserError(f"{path}: expected data as uint8, came {dtype}")
  return offset, length


def _load(
    path: paths.Location, member: tuple[int, int], kinds: str, dtype: type
) -> np.ndarray:
  """Returns a member as an array of `dtype`; `kinds` as in np.dtype.kind."""
  offset, length, came = _npy_header(path, member)
  if came.kind not in kinds:
    raise UserError(
        f"{path}: expected an array of {dtype.__name__}, came {came}"
    )
  with _opened_npz(path) as (file, _):
    values = np.fromfile(file, came, length, offset=offset)
  if dtype is np.str_:
    # NumPy hands whatever the file holds to Python, as characters.
    code = np.dtype("u4").newbyteorder(came.byteorder)
    if (np.frombuffer(values.tobytes(), code) > sys.maxunicode).any():
      raise UserError(f"{path}: expected text, came characters that are none")
    return values
  narrow = values.astype(dtype)
  if not np.array_equal(narrow, values):
    raise UserError(
        f"{path}: expected values that {dtype.__name__} holds, came "
        f"{_summary(values)}"
    )
  return narrow
