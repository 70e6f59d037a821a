"""Paths of data: on local disks, or in the buckets of gs:// and s3://.

`path` makes either of a user's text; a `Remote` answers to what readers ask of
a pathlib.Path. Bytes always come from a local disk: `copied` and `local` copy
a remote file into the cache, or where there is none into a temporary folder.
`put`, `write` and `remove` are the other way, into folders and gs://.

What is remote is known by listings: of a set one, with all that is below its
folder, kept by the process. A copy in the cache is another's, and deleted, if
its size is not the listed one or it was made before the file last changed. A
worker, which gets its paths from the process that listed, takes what is there.
"""

import atexit
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
import time
from typing import IO, Any, NamedTuple

from mcjepa_jax.errors import TransientError, UserError

# What a user does where a store does not answer as it should.
_HINTS = {
    "gs": "the bucket's name, the network and the credentials: gcloud auth"
    " application-default login, or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "the bucket's name, the network and the credentials: aws configure, or"
    " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
# gcsfs would ask for the size first, with two requests.
_ONE_REQUEST = {"gs": {"concurrency": 1}, "s3": {}}
# Times in a store are cut to seconds, and its clock is not ours.
_CLOCKS = 2.0
_GONE = "no such file or bucket"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Unreachable(UserError):
  """A store cannot be read, or copied from: no fault of a file."""

  final = True


class Silent(Unreachable, TransientError):
  """A store does not answer, or not to us."""


class Stat(NamedTuple):
  """What a listing says of a file, as os.stat names it."""

  st_size: int
  st_mtime_ns: int


# The names in a folder; a folder among them is None.
_Names = dict[str, Stat | None]
_listings: dict["Remote", _Names] = {}
_listed_below: set["Remote"] = set()


@dataclasses.dataclass(frozen=True, order=True)
class Remote:
  """A path in a bucket."""

  scheme: str
  key: pathlib.PurePosixPath  # BUCKET/NAME
  folder: str  # on a local disk, for copies
  keeps: bool  # whether that is the cache, and keeps all that was read
  # Whether the process that sent this path has looked after its copy.
  sent: bool = dataclasses.field(default=False, compare=False)

  def __str__(self) -> str:
    return f"{self.scheme}://{self.key}"

  def __fspath__(self) -> str:
    return str(self)

  def __reduce__(self):
    key = str(self.key)
    return _received, (self.scheme, key, self.folder, self.keeps)

  def __truediv__(self, other: str | os.PathLike) -> "Remote":
    return self.joinpath(os.fspath(other))

  def joinpath(self, *others: str) -> "Remote":
    """Returns the path below this one."""
    return self._at(self.key.joinpath(*others))

  @property
  def parent(self) -> "Remote":
    """The folder that holds it."""
    return self._at(self.key.parent)

  def _at(self, key: pathlib.PurePosixPath) -> "Remote":
    return Remote(self.scheme, key, self.folder, self.keeps, self.sent)

  @property
  def name(self) -> str:
    """The last part."""
    return self.key.name

  @property
  def stem(self) -> str:
    """The last part, without suffix."""
    return self.key.stem

  @property
  def suffix(self) -> str:
    """From the last dot of the name on."""
    return self.key.suffix

  def relative_to(self, other: "Remote") -> pathlib.PurePosixPath:
    """Returns what leads from a folder to here."""
    return self.key.relative_to(other.key)

  def names(self) -> _Names:
    """Returns what a folder holds; nothing if it is not there."""
    if self not in _listings:
      parents = (self._at(key) for key in self.key.parents)
      if not _listed_below.isdisjoint(parents):
        return {}
      _list(self, below=False)
    return _listings[self]

  def list_below(self) -> "Remote":
    """Returns the folder itself, all that is below now known."""
    if self not in _listed_below:
      _list(self, below=True)
      _listed_below.add(self)
    return self

  def stat(self) -> Stat:
    """Returns size and time of a file's change.

    Raises:
      FileNotFoundError: no such file.
    """
    found = self.parent.names().get(self.name) if self._is_below() else None
    if found is None:
      raise FileNotFoundError(errno.ENOENT, _GONE, str(self))
    return found

  def is_file(self) -> bool:
    """Returns whether it is a file."""
    return self._is_below() and bool(self.parent.names().get(self.name))

  def is_dir(self) -> bool:
    """Returns whether files are below it."""
    return bool(self.names())

  def exists(self) -> bool:
    """Returns whether it is a file or a folder; of a bucket always True."""
    return not self._is_below() or self.name in self.parent.names()

  def _is_below(self) -> bool:
    return len(self.key.parts) > 1

  def glob(self, pattern: str) -> Iterator["Remote"]:
    """Yields the paths below that match, part by part; `**` is any folders."""
    first, _, rest = pattern.partition("/")
    if first == "**":
      for folder, _, _ in self.walk():
        yield from folder.glob(rest)
      return
    if any(sign in first for sign in "*?["):
      names = fnmatch.filter(self.names(), first)
    else:
      names = [first]
    for name in names:
      if rest:
        yield from (self / name).glob(rest)
      elif name in self.names():
        yield self / name

  def walk(self) -> Iterator[tuple["Remote", list[str], list[str]]]:
    """Yields as os.walk does."""
    names = self.names()
    below = [name for name, entry in names.items() if entry is None]
    yield self, below, [name for name, entry in names.items() if entry]
    for name in below:
      yield from (self / name).walk()

  def rglob(self, pattern: str) -> Iterator["Remote"]:
    """Yields all files below whose names match."""
    for folder, _, names in self.walk():
      for name in fnmatch.filter(names, pattern):
        yield folder / name

  @property
  def copy(self) -> pathlib.Path:
    """Where the copy lies; no name, however it is made, leads elsewhere."""
    digest = hashlib.sha256(str(self).encode("utf-8", "surrogateescape"))
    return pathlib.Path(
        self.folder, digest.hexdigest()[:2], digest.hexdigest()[2:]
    )


# The paths of a process.
Location = pathlib.Path | Remote


def _received(scheme: str, key: str, folder: str, keeps: bool) -> Remote:
  return Remote(scheme, pathlib.PurePosixPath(key), folder, keeps, sent=True)


def path(text: str | os.PathLike, cache: str = "") -> Location:
  """Returns a user's path; `cache` is the folder for copies of remote files.

  What is a path already stays what it is: a name found may begin with "~".

  Raises:
    UserError: the address of no store that can be read, or of no bucket.
  """
  if isinstance(text, Location):
    return text
  text = os.fspath(text)
  scheme, separator, rest = text.partition("://")
  if not separator:
    return pathlib.Path(text).expanduser()
  key = pathlib.PurePosixPath(rest.strip("/"))
  if scheme not in _HINTS or not key.parts:
    raise UserError(
        f"{text}: expected a local path, gs://BUCKET/NAME or s3://BUCKET/NAME"
    )
  folder = str(pathlib.Path(cache).expanduser()) if cache else _temporary()
  return Remote(scheme, key, folder, bool(cache))


@functools.cache
def _temporary() -> str:
  folder = tempfile.mkdtemp(prefix="mcjepa_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def remove_temporary() -> None:
  """Deletes this process's copies but the cache's, where it ends without atexit."""
  if _temporary.cache_info().currsize:
    shutil.rmtree(_temporary(), ignore_errors=True)
    _temporary.cache_clear()


def listed(folder: Location) -> Location:
  """Returns the folder; what is below a remote one is now known."""
  return folder.list_below() if isinstance(folder, Remote) else folder


def names(folder: str | os.PathLike) -> list[str]:
  """Returns the names in a folder, as os.listdir does."""
  if isinstance(folder, Remote):
    return list(folder.names())
  return os.listdir(folder)


def visible(folder: Location, wanted: str) -> list[str]:
  """Returns the sorted names in a folder of what is wanted, none hidden.

  Raises:
    UserError: no such folder.
  """
  try:
    found = names(folder)
  except OSError as error:
    raise UserError(
        f"{folder}: expected a folder of {wanted}, came: {error.strerror}"
    ) from error
  if not found and isinstance(folder, Remote):
    raise UserError(f"{folder}: expected a folder of {wanted}, came: {_GONE}")
  return sorted(name for name in found if not name.startswith("."))


def find(
    root: str | os.PathLike, candidates: Sequence[str], *probes: str
) -> Location:
  """Returns the first candidate folder under `root` that holds a probe.

  Raises:
    UserError: none does.
  """
  root = path(root)
  for candidate in candidates:
    # glob yields nothing for a folder that is not there.
    if any(any((root / candidate).glob(probe)) for probe in probes):
      return listed(root / candidate)
  missing = root / candidates[0] / probes[0]
  while not missing.parent.exists():
    missing = missing.parent
  raise UserError(
      f"{missing}: not found; expected {root / candidates[0] / probes[0]}"
      + "".join(f", or {root / other / probes[0]}" for other in candidates[1:])
  )


def walk(
    top: str | os.PathLike, on_error: Callable[[OSError], Any]
) -> Iterator[tuple[Any, list[str], list[str]]]:
  """Yields as os.walk does, folders as paths."""
  if isinstance(top, Remote):
    yield from top.walk()
    return
  for folder, below, names in os.walk(top, onerror=on_error):
    yield pathlib.Path(folder), below, names


def split(path: str | os.PathLike) -> tuple[str | Remote, str]:
  """Returns the folder of a path and its name there."""
  if isinstance(path, Remote):
    return path.parent, path.name
  return os.path.split(path)


def local(path: str | os.PathLike) -> str | os.PathLike:
  """Returns where the file lies on a local disk, copied once if it is remote.

  Raises:
    FileNotFoundError: no such file in its store.
    Unreachable: the store does not answer.
  """
  path = _remote(path)
  if not isinstance(path, Remote):
    return path
  if path.keeps and not path.sent:
    path.stat()  # its folder is listed now, and no copy in it an old one
  part = f"{path.copy}.part"
  # Several processes want it at once: the others wait for the one that copies.
  while not path.copy.exists():
    with _asking(path):
      path.copy.parent.mkdir(parents=True, exist_ok=True)
      file = open(part, "ab")
      fcntl.flock(file, fcntl.LOCK_EX)
    with file:
      if not _is_open(file, part):
        continue
      if path.copy.exists():  # since it was looked for
        os.unlink(part)
      else:
        _download(path, part)
        os.replace(part, path.copy)
  return path.copy


def _is_open(file: IO, name: str) -> bool:
  """Returns whether the file still has this name."""
  try:
    return os.path.samestat(os.stat(name), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


def copied(
    path: str | os.PathLike, *, again: bool = False
) -> tuple[str | os.PathLike, bool]:
  """Returns where the file can be opened, and whether it is to be deleted then.

  As `local`, but that what is not read `again` stays on no disk without a cache.
  """
  path = _remote(path)
  if again or not isinstance(path, Remote) or path.keeps or path.copy.exists():
    return local(path), False
  with _asking(path):
    path.copy.parent.mkdir(parents=True, exist_ok=True)
    handle, spare = tempfile.mkstemp(dir=path.copy.parent)
    os.close(handle)
  _download(path, spare)
  return spare, True


def _remote(text: str | os.PathLike) -> str | os.PathLike:
  is_address = isinstance(text, str) and "://" in text
  return path(text) if is_address else text


def _download(path: Remote, part: str) -> None:
  """Copies into a file that is there, and deletes it where that fails."""
  started = time.time()
  try:
    with _asking(path):
      store, options = _store(path.scheme), _ONE_REQUEST[path.scheme]
      store.get_file(str(path), part, **options)
      listed = _listings.get(path.parent, {}).get(path.name)
      came = os.stat(part).st_size
      if listed and came != listed.st_size:
        raise EOFError(f"expected {listed.st_size} bytes, came {came}")
      # What changed while it was copied is newer than the copy.
      os.utime(part, (started, started))
  except BaseException as error:
    pathlib.Path(part).unlink(missing_ok=True)
    if isinstance(error, FileNotFoundError):
      raise FileNotFoundError(errno.ENOENT, _GONE, str(path)) from error
    raise


@functools.cache
def _store(scheme: str) -> Any:
  """Returns the file system, which itself tries again what may be transient."""
  # Its other class asks for the kind of each bucket, with a package that takes
  # seconds to load, and warns where it may not.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # A traceback beside the one error that follows.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  import fsspec

  return fsspec.filesystem(scheme, use_listings_cache=False)


@contextlib.contextmanager
def _asking(path: Remote, to_be: str = "read") -> Iterator[None]:
  """Makes of what a store answers one error; FileNotFoundError stays."""
  try:
    yield
  except FileNotFoundError:
    raise
  except ImportError as error:
    package = _PACKAGES[path.scheme]
    raise UserError(
        f"{path}: {path.scheme}:// is read with the package {package}, which is"
        f" not installed: pip install {package} ({error})"
    ) from error
  # Of requests, aiohttp, google.auth, botocore: without a class in common.
  except Exception as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, OSError) and (
        error.errno in _NO_ROOM or str(error.filename).startswith(path.folder)
    ):
      raise Unreachable(
          f"{path}: cannot be copied into {path.folder}: {reason}"
      ) from error
    raise Silent(
        f"{path}: cannot be {to_be} ({reason}); check {_HINTS[path.scheme]}"
    ) from error


def put(part: pathlib.Path, path: Location) -> None:
  """Gives a local file that is whole its name; it has no other then.

  Raises:
    OSError: a disk cannot be written, or there is no such bucket.
    Unreachable: the store does not answer.
  """
  with open(part, "rb") as file:
    os.fsync(file.fileno())
  if isinstance(path, Remote):
    with _changing(path) as store:
      store.put_file(os.fspath(part), str(path))
    part.unlink()
  else:
    os.replace(part, path)


def write(path: Location, data: bytes) -> None:
  """Writes a file that stands under its name whole or not at all; raises as `put`."""
  if isinstance(path, Remote):
    with _changing(path) as store:
      store.pipe_file(str(path), data)
  else:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    put(part, path)


def remove(path: Location) -> None:
  """Deletes a file, if it is there; raises as `put`."""
  if not isinstance(path, Remote):
    path.unlink(missing_ok=True)
  elif path.exists():
    with _changing(path) as store:
      store.rm_file(str(path))


def forget(folder: Location) -> None:
  """Makes what other processes write into a folder seen."""
  _listings.pop(folder, None)


def prepare(address: str) -> None:
  """Settles how the package of an address's store behaves, for its other users."""
  _store(address.partition("://")[0])


def forget_below(folder: Location) -> None:
  """Makes what other processes write anywhere below a folder seen."""
  if not isinstance(folder, Remote):  # a disk is listed anew each time
    return
  for known in [x for x in _listings if folder in (x, *_parents(x))]:
    del _listings[known]
  for known in list(_listed_below):
    if folder in (known, *_parents(known)) or known in _parents(folder):
      _listed_below.discard(known)


def _parents(path: Remote) -> set[Remote]:
  return {path._at(key) for key in path.key.parents}


@contextlib.contextmanager
def _changing(path: Remote) -> Iterator[Any]:
  try:
    with _asking(path, "written"):
      yield _store(path.scheme)
  except FileNotFoundError as error:
    raise FileNotFoundError(errno.ENOENT, _GONE, str(path)) from error
  finally:
    forget(path.parent)


def _list(folder: Remote, *, below: bool) -> None:
  """Puts what a folder holds, or all that is `below` it, into the listings."""
  try:
    with _asking(folder):
      store = _store(folder.scheme)
      if below:
        found = list(store.find(str(folder), detail=True).values())
      else:
        found = store.ls(str(folder), detail=True)
  except FileNotFoundError:
    found = []
  prefix = f"{folder.key}/"
  folders: dict[str, _Names] = {"": {}}
  for entry in found:
    relative = entry["name"].removeprefix(prefix)
    # A name that ends in a slash stands for an empty folder.
    is_folder = entry["type"] == "directory" or relative.endswith("/")
    *parents, name = relative.rstrip("/").split("/")
    # A folder may be listed in itself; what no path can spell is left out.
    if relative == entry["name"] or {"", ".", ".."} & {*parents, name}:
      continue
    parent = "/".join(parents)
    names = _names_of(folders, parent)
    if is_folder:
      names[name] = None
      continue
    changed = entry.get("mtime") or entry["LastModified"]
    stat = Stat(entry["size"], int(changed.timestamp() * 1e9))
    names.setdefault(name, stat)
    if folder.keeps:
      _drop_if_old(folder.joinpath(parent, name), stat)
  for below, names in folders.items():
    _listings[folder / below] = names


def _names_of(folders: dict[str, _Names], folder: str) -> _Names:
  """Returns the names in a folder, which its own parents then name."""
  if folder not in folders:
    parent, _, name = folder.rpartition("/")
    _names_of(folders, parent)[name] = None
    folders[folder] = {}
  return folders[folder]


def _drop_if_old(path: Remote, stat: Stat) -> None:
  """Deletes a copy of another size, or from before the file last changed."""
  try:
    copy = path.copy.stat()
  except OSError:
    return
  newest = stat.st_mtime_ns + int(_CLOCKS * 1e9)
  if copy.st_size != stat.st_size or copy.st_mtime_ns < newest:
    with _asking(path):
      path.copy.unlink(missing_ok=True)


def require(folder: Location, key: str) -> Location:
  """Returns the folder; raises UserError for a remote one without files."""
  if isinstance(folder, Remote) and not folder.is_dir():
    raise UserError(
        f"{key}: expected a folder with files, got {folder}, where nothing is:"
        f" no such bucket or folder; check {_HINTS[folder.scheme]}"
    )
  return folder
