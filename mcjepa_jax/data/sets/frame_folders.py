"""Sequences of numbered image files, as they lie in any folder."""

from collections.abc import Iterable, Sequence
import contextlib
import hashlib
import os
import pathlib
import re

from jaxtyping import UInt8
import numpy as np
import tqdm

from mcjepa_jax.data.readers import image_files, video_files
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

# Grey levels by which a frame that nobody can see differs from its neighbour.
_UNKNOWN = np.uint8(4)


class FolderFrames:
  """A sequence of image files in one folder, in order."""

  def __init__(self, folder: image_files.Path, names: Sequence[str], name: str):
    self.folder = paths.path(folder)
    self.name = name
    self._names = tuple(names)

  def __len__(self) -> int:
    return len(self._names)

  def frame(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns one frame."""
    return image_files.read_image(self.folder / self._names[index])

  def frame_id(self, index: int) -> str:
    """Returns the frame's path under the data set's root, without suffix."""
    stem = pathlib.Path(self._names[index]).stem
    return f"{self.name}/{stem}" if self.name else stem

  def thumbnails(self) -> video_files.Thumbnails:
    """Returns a small picture of every frame; all are decoded once a disk.

    One that cannot be decoded is a little different from the one before: its
    pairs are neither still nor cut, so that it is named where one is drawn.
    """
    file = self._thumbnails()
    with contextlib.suppress(OSError, ValueError):
      kept = np.load(file, allow_pickle=False)
      if kept.shape[:1] == (len(self),):
        return kept
    bar = tqdm.tqdm(
        self._names, f"looking at {self.name}", delay=2, leave=False
    )
    found = [self._thumbnail(name) for name in bar]
    blank = np.zeros(
        (video_files.THUMBNAIL, video_files.THUMBNAIL, 3), np.uint8
    )
    last = next((small for small in found if small is not None), blank)
    for i, small in enumerate(found):
      last = found[i] = last ^ _UNKNOWN if small is None else small
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
      file.parent.mkdir(parents=True, exist_ok=True)
      part, path = video_files.temporary(stack, file.parent)
      np.save(part, np.stack(found), allow_pickle=False)
      part.close()
      os.replace(path, file)
    return np.stack(found)

  def _thumbnail(self, name: str) -> UInt8[np.ndarray, "s s 3"] | None:
    try:
      path = self.folder / name
      return video_files.thumbnail(
          image_files.read_image(path, min_side=video_files.THUMBNAIL)
      )
    except paths.Unreachable:
      raise
    except UserError:
      return None

  def _thumbnails(self) -> pathlib.Path:
    """Returns where they are kept: named by the files, their sizes and times."""
    is_local = isinstance(self.folder, pathlib.Path)
    key = [str(self.folder.resolve() if is_local else self.folder)]
    for name in self._names:
      with contextlib.suppress(FileNotFoundError):
        stamp = (self.folder / name).stat()
        key.append(f"{name}|{stamp.st_size}|{stamp.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(key).encode("utf-8", "surrogateescape"))
    name = f"{self.folder.name}-{digest.hexdigest()[:16]}.thumbnails.npy"
    return video_files.default_cache_dir() / name


def frame_folders(
    root: image_files.Path,
    folders: Iterable[image_files.Path] | None = None,
    *,
    leave_out: str = "",
) -> list[FolderFrames]:
  """Returns all image sequences in a folder and its subfolders.

  Files of one folder whose names differ in the last number alone are a
  sequence, in steps of its smallest difference, and a missing frame ends it: so
  DAVIS, Sintel's scenes, FlyingThings3D, HD1K, KITTI's 000000_10 and _11, and
  the pairs of FlyingChairs are each read as they lie. A gap counts steps.
  `folders` are all that is looked at below `root`; a name whose stem is the
  regular expression `leave_out` counts as missing.
  """
  root = paths.path(root)
  sequences = []
  for top in (paths.listed(root),) if folders is None else folders:
    for folder, below, names in paths.walk(top, _cannot_list):
      below[:] = sorted(
          (f for f in below if f[0] != "."), key=video_files.natural
      )
      relative = folder.relative_to(root).as_posix()
      for run in _runs(names, leave_out):
        name = "" if relative == "." else relative
        sequences.append(FolderFrames(folder, run, name))
  if not sequences:
    raise UserError(
        f"{root}: expected numbered images ({', '.join(image_files.SUFFIXES)}), at "
        "least two of a sequence, came none"
    )
  return sequences


def _cannot_list(error: OSError):
  raise UserError(
      f"{error.filename}: expected a folder of frames, came: {error.strerror}"
  ) from error


def _runs(names: Iterable[str], leave_out: str) -> list[list[str]]:
  """Returns the sequences of at least two frames among a folder's files."""
  numbered: dict[tuple[str, str], dict[int, str]] = {}
  for name in names:
    stem, suffix = os.path.splitext(name)
    if leave_out and re.fullmatch(leave_out, stem):
      continue
    found = re.fullmatch(r"(.*?)([0-9]+)(\D*)", stem)
    if found and suffix.lower() in image_files.SUFFIXES and name[0] != ".":
      rest = (found[1], found[3] + suffix)
      numbered.setdefault(rest, {})[int(found[2])] = name
  runs = []
  for rest in sorted(
      numbered, key=lambda rest: video_files.natural(rest[0] + rest[1])
  ):
    numbers = np.array(sorted(numbered[rest]))
    if len(numbers) < 2:
      continue
    steps = np.diff(numbers)
    breaks = np.flatnonzero(steps != steps.min()) + 1
    for run in np.split(numbers, breaks):
      if len(run) > 1:
        runs.append([numbered[rest][number] for number in run.tolist()])
  return runs
