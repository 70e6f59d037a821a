"""Sets of single images: a folder in ImageNet's layout, or one .npz file.

An example is {image: u8 [h w 3]}, with label: an int32 scalar where the set has
classes. Nothing but names is held in memory, as arrays: a worker that is handed
the set gets some 40 bytes an image.
"""

import os
import pathlib
import struct
import zipfile

import numpy as np

from mcjepa_jax.data import flow_io
from mcjepa_jax.errors import UserError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".ppm", ".bmp")


def _entries(folder: pathlib.Path) -> tuple[list[str], list[str]]:
  """Returns the sorted names of images and of folders; hidden ones are left."""
  images, folders = [], []
  try:
    with os.scandir(folder) as entries:
      for entry in entries:
        if entry.name.startswith("."):
          continue
        if entry.name.lower().endswith(SUFFIXES):
          images.append(entry.name)
        elif entry.is_dir():
          folders.append(entry.name)
  except OSError as error:
    raise UserError(
        f"{folder}: expected a folder of images, came: {error.strerror}"
    ) from error
  return sorted(images), sorted(folders)


class ImageFolder:
  """Images of root/CLASS/*.JPEG, labelled by sorted class, or of a flat folder.

  With `min_side` large JPEGs are decoded smaller, see flow_io.decode_image.
  """

  def __init__(self, root: flow_io.Path, *, min_side: int | None = None):
    self.root = pathlib.Path(root)
    self.min_side = min_side
    names, self.classes = _entries(self.root)
    self._labels = None
    if names and self.classes:
      raise UserError(
          f"{self.root}: expected images or a folder for each class, came "
          f"both ({names[0]} beside {self.classes[0]})"
      )
    if self.classes:
      names, labels = [], []
      for label, folder in enumerate(self.classes):
        images, _ = _entries(self.root / folder)
        # A class without images would leave a label that no image has.
        if not images:
          raise UserError(f"{self.root / folder}: expected images, came none")
        names += [f"{folder}/{image}" for image in images]
        labels += [label] * len(images)
      self._labels = np.array(labels, np.int32)
    if not names:
      raise UserError(f"{self.root}: expected images, came none")
    # One array: a list of a million strings is copied page by page into every
    # forked worker, as reading a string writes its reference count.
    self._names = np.array([os.fsencode(name) for name in names])

  def __len__(self) -> int:
    return len(self._names)

  def record_id(self, index: int) -> str:
    """Returns the path under the root."""
    return os.fsdecode(bytes(self._names[index]))

  def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
    path = self.root / self.record_id(index)
    example = {"image": flow_io.read_image(path, min_side=self.min_side)}
    if self._labels is not None:
      example["label"] = self._labels[index]
    return example


class NpzImages:
  """Encoded images in one .npz, as np.savez (not compressed) writes it.

  data: u8, the files end to end; offsets: int [n + 1]; labels: int [n];
  classes: str [k]. An image is read from the file when it is asked for.
  """

  def __init__(self, path: flow_io.Path):
    self.path = pathlib.Path(path)
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
    with flow_io.opened(self.path, "an .npz file") as (file, _):
      file.seek(self._data + start)
      encoded = file.read(end - start)
    return {
        "image": flow_io.decode_image(encoded, name),
        "label": self._labels[index],
    }


def _summary(values: np.ndarray) -> str:
  if not values.size:
    return "none"
  return f"{values.size} of them, {values.min()} to {values.max()}"


def _npz_members(
    path: pathlib.Path, names: tuple[str, ...]
) -> dict[str, tuple[int, int]]:
  """Returns (offset, size) of each member's .npy bytes within the file.

  Members must be stored as they are: then no member can be larger than the file
  that holds it, and its bytes can be read in place.
  """
  members = {}
  with flow_io.opened(path, "an .npz file") as (file, size):
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
    path: pathlib.Path, member: tuple[int, int]
) -> tuple[int, int, np.dtype]:
  """Returns (offset, length, dtype) of a member's one-dimensional array."""
  start, size = member
  with flow_io.opened(path, "an .npz file") as (file, _):
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


def _npy_place(path: pathlib.Path, member: tuple[int, int]) -> tuple[int, int]:
  """Returns (offset, length) of a member that must be bytes."""
  offset, length, dtype = _npy_header(path, member)
  if dtype != np.uint8:
    raise UserError(f"{path}: expected data as uint8, came {dtype}")
  return offset, length


def _load(
    path: pathlib.Path, member: tuple[int, int], kinds: str, dtype: type
) -> np.ndarray:
  """Returns a member as an array of `dtype`; `kinds` as in np.dtype.kind."""
  offset, length, came = _npy_header(path, member)
  if came.kind not in kinds:
    raise UserError(
        f"{path}: expected an array of {dtype.__name__}, came {came}"
    )
  values = np.fromfile(path, came, length, offset=offset)
  if dtype is np.str_:
    return values
  narrow = values.astype(dtype)
  if not np.array_equal(narrow, values):
    raise UserError(
        f"{path}: expected values that {dtype.__name__} holds, came "
        f"{_summary(values)}"
    )
  return narrow
