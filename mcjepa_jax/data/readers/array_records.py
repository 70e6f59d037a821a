"""Records in ArrayRecord shards, and the manifest that convert_images writes.

A folder of convert_images holds shards and, written last, manifest.json:

  format    FORMAT, a name with a version
  count     of all records
  classes   names by label, none where the set has no labels
  shards    [{name, records, bytes, sha256}]
  skipped   [{path, fault}] of files that do not decode
  checksum  sha256 of all the rest, as JSON with sorted keys and no spaces

A record is, little-endian,

  magic     4 bytes, b"MCJ1"
  crc32     u32, of all that follows
  label     i32, -1 where the set has no classes
  length    u16, of the path
  path      under the folder that was converted, as its file system spells it
  image     the file as it was: JPEG, PNG, ...

Records are stored uncompressed: encoded images pack no further, and none is
then larger than its shard. (A forged shard can still hold a compressed record,
as those of tfds are: the library alone sees its size before it is read.)
"""

from collections.abc import Sequence
import functools
import hashlib
import json
import os
import struct
from typing import Any
import zlib

from array_record.python import array_record_module
import numpy as np

from mcjepa_jax.data.readers import image_files
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

FORMAT = "mcjepa_jax images 1"
MANIFEST = "manifest.json"
MAX_SHARDS = 4096

_HEADER = struct.Struct("<4sIiH")
_MAGIC = b"MCJ1"
_CRC_START = 8
_MAX_JSON = 2**26
# Of ArrayRecord: without these a reader reads ahead, in threads of its own.
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READ_BUFFER = 2**15
_UNCOMPRESSED = "uncompressed"
WRITE_OPTIONS = f"group_size:1,{_UNCOMPRESSED}"
# ImageNet of tfds has 1024 shards, and a process may often open 1024 files.
_OPEN_FILES = 128


def pack(label: int, path: str, image: bytes) -> bytes:
  """Returns the record of an encoded image."""
  name = os.fsencode(path)
  record = _HEADER.pack(_MAGIC, 0, label, len(name)) + name + image
  crc = zlib.crc32(memoryview(record)[_CRC_START:])
  return _HEADER.pack(_MAGIC, crc, label, len(name)) + record[_HEADER.size :]


def unpack(record: bytes, name: str) -> tuple[int, str, bytes]:
  """Returns (label, path, image) of a record, which `name` names in errors."""
  if len(record) < _HEADER.size or not record.startswith(_MAGIC):
    raise UserError(
        f"{name}: expected a record of convert_images ({_MAGIC!r}), came "
        f"{record[:4]!r} in {len(record)} bytes"
    )
  _, crc, label, length = _HEADER.unpack_from(record)
  if crc != zlib.crc32(memoryview(record)[_CRC_START:]):
    raise UserError(f"{name}: the record fails its checksum")
  start = _HEADER.size + length
  if start > len(record):
    raise UserError(
        f"{name}: expected a path of {length} bytes, came {len(record)} bytes"
    )
  return label, os.fsdecode(record[_HEADER.size : start]), record[start:]


@functools.lru_cache(maxsize=_OPEN_FILES)
def _reader(path: str, size: int, changed: int):
  del size, changed  # with the path the key: a file that changed is another
  return array_record_module.ArrayRecordReader(
      path, options=_READ_OPTIONS, file_reader_buffer_size=_READ_BUFFER
  )


def num_records(path: image_files.Path) -> int:
  """Returns how many records an ArrayRecord file holds."""
  with image_files.opened(path, "records"):
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
  count = reader.num_records()
  if not reader.ok():
    raise UserError(f"{path}: expected an ArrayRecord file, came another")
  return count


def fit_counts(counts: Sequence[Any]) -> bool:
  """Returns whether these can be the numbers of records of files."""
  return all(type(n) is int and 0 <= n < 2**40 for n in counts) and any(counts)


class Records:
  """The records of ArrayRecord files as one sequence of bytes.

  Files are opened as they are read and shared by the process, so that nothing
  but names is held here.
  """

  def __init__(
      self,
      image_paths: Sequence[image_files.Path],
      counts: Sequence[int],
      *,
      uncompressed: bool = False,
  ):
    """Describes files that hold as many records each; none is opened.

    A remote one is copied when a record of it is first read.

    With `uncompressed` a file that names other options is refused.
    """
    self._files = [
        path if isinstance(path, paths.Remote) else os.fspath(path)
        for path in image_paths
    ]
    self._counts = list(counts)
    self._ends = np.cumsum(self._counts, dtype=np.int64)
    self._uncompressed = uncompressed

  def __len__(self) -> int:
    return int(self._ends[-1])

  def name(self, index: int) -> str:
    """Returns what a fault calls a record."""
    file, number = self._place(index)
    return f"{self._files[file]}, record {number}"

  def _place(self, index: int) -> tuple[int, int]:
    index = range(len(self))[index]
    file = int(np.searchsorted(self._ends, index, side="right"))
    return file, index - int(self._ends[file]) + self._counts[file]

  def __getitem__(self, index: int) -> bytes:
    file, number = self._place(index)
    path, count = self._files[file], self._counts[file]
    # Only a regular file is opened: a pipe would block.
    with image_files.opened(path, "records", again=True) as (opened, size):
      changed = os.fstat(opened.fileno()).st_mtime_ns
    # The library's C++ raises whatever its own parser ran into.
    try:
      reader = _reader(os.fspath(paths.local(path)), size, changed)
      came = reader.num_records()
      options = reader.writer_options_string() or ""
      fits = not self._uncompressed or _UNCOMPRESSED in options.split(",")
      if came == count and fits:
        return reader.read([number])[0]
    except (RuntimeError, ValueError, LookupError, ArithmeticError) as error:
      raise UserError(
          f"{path}, record {number}: expected a record, came: {error}"
      ) from error
    kind = f"{_UNCOMPRESSED} records" if self._uncompressed else "records"
    raise UserError(
        f"{path}: expected {count} {kind}, came {came} "
        f"({options or 'of no ArrayRecord file'})"
    )


def _canonical(value: Any) -> bytes:
  return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
  """Returns the sha256 of a value as JSON."""
  return hashlib.sha256(_canonical(value)).hexdigest()


def write_json(path: paths.Location, value: dict[str, Any]) -> None:
  """Writes JSON that stands under its name whole or not at all."""
  try:
    paths.write(path, json.dumps(value, indent=1).encode())
  except OSError as error:
    raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def read_json(path: image_files.Path) -> Any:
  """Returns what a JSON file of at most 64 MiB holds."""
  with image_files.opened(path, "a JSON file") as (file, size):
    if size > _MAX_JSON:
      raise UserError(
          f"{path}: expected at most {_MAX_JSON} bytes of JSON, came {size}"
      )
    data = file.read(size)
  return parse_json(path, data)


def parse_json(path: image_files.Path, data: str | bytes) -> Any:
  """Returns what the JSON text of a file says.

  Raises:
    UserError: it is no JSON, or too deep to be read.
  """
  try:
    return json.loads(data)
  # Hostile JSON is nested too deeply, holds too long a number or no UTF-8.
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path}: expected JSON, came: {error}") from error


def shard_name(number: int, count: int) -> str:
  """Returns the file name of a shard of `count`."""
  return f"images-{number:05d}-of-{count:05d}.array_record"


def write_manifest(folder: paths.Location, manifest: dict[str, Any]) -> None:
  """Writes the manifest, with format and checksum, of whole shards."""
  manifest = {"format": FORMAT, **manifest}
  manifest["checksum"] = digest(manifest)
  write_json(folder / MANIFEST, manifest)


def read_manifest(folder: image_files.Path) -> dict[str, Any]:
  """Returns the manifest of a folder, checked, its shards of the right size."""
  folder = paths.path(folder)
  path = folder / MANIFEST
  if folder.is_dir() and not path.exists():
    raise UserError(
        f"{folder}: expected a folder that convert_images has finished, came one "
        f"without {MANIFEST}"
    )
  manifest = read_json(path)
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    came = manifest.get("format") if isinstance(manifest, dict) else "no object"
    raise UserError(f"{path}: expected the format {FORMAT!r}, came {came!r}")
  checksum = manifest.pop("checksum", None)
  if checksum != digest(manifest):
    raise UserError(f"{path}: the manifest fails its checksum")
  if not _fits(manifest):
    raise UserError(
        f"{path}: expected classes, and shards whose records add up to count, "
        "came others"
    )
  for shard in manifest["shards"]:
    size = image_files.file_size(folder / shard["name"], "a shard")
    if size != shard.get("bytes"):
      raise UserError(
          f"{folder / shard['name']}: expected {shard.get('bytes')} bytes, as "
          f"{MANIFEST} says, came {size}"
      )
  return manifest


def _fits(manifest: dict[str, Any]) -> bool:
  shards, classes = manifest.get("shards"), manifest.get("classes")
  if not isinstance(shards, list) or not 0 < len(shards) <= MAX_SHARDS:
    return False
  if not isinstance(classes, list) or not all(
      isinstance(name, str) for name in classes
  ):
    return False
  # Names are never taken as they come: one could lead out of the folder.
  for number, shard in enumerate(shards):
    if not isinstance(shard, dict):
      return False
    if shard.get("name") != shard_name(number, len(shards)):
      return False
  counts = [shard.get("records") for shard in shards]
  return fit_counts(counts) and manifest.get("count") == sum(counts)
