"""A run's folder, which may be one in a bucket.

Checkpoints and dumps are written straight to gs://BUCKET/RUN. Logs grow line by
line, which no object of a bucket does: they are written to a folder of this
machine, and copied to the bucket before each checkpoint and at the end. So a run
that goes on from a checkpoint finds its logs up to there, on whatever machine.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
import time

from mcjepa_jax import errors
from mcjepa_jax.storage import paths

_CHECKPOINTS = "checkpoints"
DUMPS = "dumps"  # in it, of steps that were not finite
_MARKER = "opened.txt"
CONFIG = "config.json"  # by which a run is known, also one that was copied
_SHOWN = 4


class Folder:
  """`local`, where logs are written; `address`, where checkpoints are.

  What ends a run that cannot save there is a `refusal`.
  """

  refusal: type[errors.UserError] = errors.UserError

  def __init__(self, local: pathlib.Path, address: str | pathlib.Path):
    self.local, self.address = local, address

  def push(self) -> None:
    """Nothing: what is written is in its place."""


class _Mirrored(Folder):
  """A folder in a bucket, and the local one that its logs are in."""

  refusal = errors.TransientError

  def __init__(self, local: pathlib.Path, remote: paths.Remote):
    super().__init__(local, str(remote))
    self._remote = remote
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}
    self._pull()
    self.push()

  def _pull(self) -> None:
    paths.forget_below(self._remote)
    for folder, below, names in self._remote.walk():
      if folder == self._remote:
        if (below or names) and not {_MARKER, CONFIG} & set(names):
          raise errors.UserError(
              f"workdir: expected a new folder or one of a run, with its"
              f" {CONFIG}; in {folder} are"
              f" {', '.join(sorted([*below, *names])[:_SHOWN])}"
          )
        # Written where they are, and large.
        below[:] = [x for x in below if x not in (_CHECKPOINTS, DUMPS)]
      for name in names:
        if name == _MARKER:  # another host may be writing it
          continue
        target = self.local / folder.relative_to(self._remote) / name
        _fetch(folder / name, target)
        self._sent[target] = _version(target)
    # Written anew: a bucket that takes nothing is told now.
    (self.local / _MARKER).write_text(f"{time.time()}\n")

  def push(self) -> None:
    """Copies to the bucket what has changed since the last time.

    Raises:
      Unreachable: it cannot be written.
    """
    for path in sorted(self.local.rglob("[!.]*")):  # others are half written
      version = _version(path)
      if path.is_dir() or self._sent.get(path) == version:
        continue
      handle, part = tempfile.mkstemp()
      os.close(handle)
      try:
        # What is appended meanwhile comes next time.
        shutil.copyfile(path, part)
        paths.put(
            pathlib.Path(part),
            self._remote.joinpath(*path.relative_to(self.local).parts),
        )
      finally:
        pathlib.Path(part).unlink(missing_ok=True)
      self._sent[path] = version


def _fetch(file: paths.Remote, target: pathlib.Path) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  copy, spare = paths.copied(file)
  (shutil.move if spare else shutil.copyfile)(copy, target)


@contextlib.contextmanager
def fetched(address: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a folder here that holds what is at an address; itself if it is here.

  Raises:
    UserError: a bucket that cannot be read.
  """
  location = paths.path(address)
  if not isinstance(location, paths.Remote):
    yield location
    return
  with tempfile.TemporaryDirectory(prefix="mcjepa_dump_") as local:
    for folder, _, names in location.walk():
      for name in names:
        target = pathlib.Path(local) / folder.relative_to(location) / name
        _fetch(folder / name, target)
    if not any(pathlib.Path(local).iterdir()):
      raise errors.UserError(f"{location}: there is nothing")
    yield pathlib.Path(local)


def _version(path: pathlib.Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def opened(workdir: str | os.PathLike) -> Iterator[Folder]:
  """Gives the folder of a run; what is in a bucket is copied there at the end.

  Raises:
    UserError: a bucket that cannot be read or written.
  """
  location = paths.path(workdir)
  if not isinstance(location, paths.Remote):
    yield Folder(location, location)
    return
  if location.scheme != "gs":
    raise errors.UserError(
        f"workdir: expected a local folder or gs://BUCKET/FOLDER, got {location}"
    )
  with tempfile.TemporaryDirectory(prefix="mcjepa_run_") as local:
    folder = _Mirrored(pathlib.Path(local), location)
    try:
      yield folder
    except BaseException:
      try:
        folder.push()
      # What ends the run keeps its exit code.
      except (OSError, errors.UserError) as fault:
        print(f"warning: {fault}", file=sys.stderr)
      raise
    folder.push()
