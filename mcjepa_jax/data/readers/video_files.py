"""Video files as sequences of frames.

A sequence has __len__, frame(i), frame_id(i) and thumbnails(). A video is
decoded once, into a cache of frames on disk: a frame by its number is then one
read instead of a decode from the key frame before it.
"""

from collections.abc import Iterable
import contextlib
import hashlib
import os
import pathlib
import re
import tempfile
from typing import IO

import cv2
from jaxtyping import UInt8
import numpy as np
import tqdm

from mcjepa_jax.data.readers import image_files
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

# FFmpeg complains to stderr, beside the one error that follows; it reads this
# at its first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")

THUMBNAIL = 32
# Each lies in the one before; the last holds the table of samples.
_MP4_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
# What an MP4 or MOV may begin with.
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
# The header of an MKV or WebM, and all the rest.
_EBML = (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67")
# Two black frames of 7680x4320 in VP9 are a file of 10,400 bytes: 3,190.
_PIXELS_PER_BYTE = 2**12
# As many take a second to look at.
_MAX_PARTS = 2**20

Thumbnails = UInt8[np.ndarray, "t 32 32 3"]


def default_cache_dir() -> pathlib.Path:
  """Returns $MCJEPA_CACHE, or mcjepa_jax in the user's cache folder."""
  if "MCJEPA_CACHE" in os.environ:
    return pathlib.Path(os.environ["MCJEPA_CACHE"])
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(caches) / "mcjepa_jax"


def default_max_bytes() -> int:
  """Returns $MCJEPA_CACHE_GIB, or 16 GiB, in bytes."""
  text = os.environ.get("MCJEPA_CACHE_GIB", "16")
  try:
    return round(float(text) * 2**30)
  except (ValueError, OverflowError) as error:
    raise UserError(
        f"MCJEPA_CACHE_GIB: expected a number, got {text!r}"
    ) from error


class VideoFrames:
  """The frames of one video, decoded once into a cache on disk.

  Frames whose longer side is over `max_side` are made smaller by area. The
  cache of a video is a .npy of its frames and one of thumbnails, named by the
  video's path, size, time of change and `max_side`; both appear whole or not at
  all. A video that needs more than `max_bytes` is refused.
  """

  def __init__(
      self,
      path: image_files.Path,
      *,
      max_side: int = 640,
      cache_dir: image_files.Path | None = None,
      max_bytes: int | None = None,
      progress: bool = True,
      name: str | None = None,
  ):
    self.path = paths.path(path)
    self.name = name or self.path.name
    max_bytes = default_max_bytes() if max_bytes is None else max_bytes
    cache = pathlib.Path(cache_dir or default_cache_dir())
    if isinstance(self.path, paths.Remote):
      image_files.file_size(self.path, "a video")  # names a missing one
      address = self.path
    else:
      # The container is looked at each time: it is cheap, and names the fault.
      _check_container(self.path)
      address = self.path.resolve()
    stamp = self.path.stat()
    key = f"{address}|{stamp.st_size}|{stamp.st_mtime_ns}|{max_side}"
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    self._frames = cache / f"{self.path.stem}-{digest[:16]}.npy"
    self._thumbnails = self._frames.with_suffix(".thumbnails.npy")
    if not (self._frames.is_file() and self._thumbnails.is_file()):
      self._decode(max_side, max_bytes, progress)
    # The shape alone is kept: a memmap would be pickled as its whole content.
    try:
      frames = np.load(self._frames, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
      raise UserError(
          f"{self._frames}: expected the frames of {self.path}, came: {error}: "
          "delete it"
      ) from error
    self._offset, self._shape = frames.offset, frames.shape
    if self.nbytes > max_bytes:
      raise _over_limit(self.path, self._shape, max_bytes)

  def __len__(self) -> int:
    return self._shape[0]

  @property
  def nbytes(self) -> int:
    """Bytes of all the frames on disk."""
    return int(np.prod(self._shape))

  def frame(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns one frame, read from the cache."""
    index = range(len(self))[index]
    size = self.nbytes // len(self)
    offset = self._offset + index * size
    with image_files.opened(self._frames, f"frames of {self.path}") as (
        file,
        _,
    ):
      pixels = np.fromfile(file, np.uint8, size, offset=offset)
    if pixels.size != size:
      raise UserError(f"{self._frames}: came cut: delete it")
    return pixels.reshape(self._shape[1:])

  def frame_id(self, index: int) -> str:
    """Returns the video's name and the frame's number."""
    return f"{self.name}/{index:06d}"

  def thumbnails(self) -> Thumbnails:
    """Returns a small picture of every frame."""
    return np.load(self._thumbnails, allow_pickle=False)

  def _decode(self, max_side: int, max_bytes: int, progress: bool) -> None:
    cache = self._frames.parent
    if isinstance(self.path, paths.Remote):
      _check_container(self.path)
    try:
      cache.mkdir(parents=True, exist_ok=True)
      with contextlib.ExitStack() as stack:
        part, part_path = temporary(stack, cache)
        shape, thumbnails = None, []
        for frame in _decoded(self.path, max_side, progress):
          if shape is None:
            shape = frame.shape
            # Written again with the number of frames: numpy pads the header so
            # that the first axis may grow.
            start = _write_npy_header(part, (0, *shape))
          if frame.shape != shape:
            raise UserError(
                f"{self.path}: expected frames of one size, came {shape} and "
                f"then {frame.shape}"
            )
          thumbnails.append(thumbnail(frame))
          if len(thumbnails) * frame.size > max_bytes:
            raise _over_limit(self.path, (len(thumbnails), *shape), max_bytes)
          part.write(frame.tobytes())
        part.seek(0)
        if _write_npy_header(part, (len(thumbnails), *shape)) != start:
          raise RuntimeError("numpy no longer pads the header of a .npy file")
        small, small_path = temporary(stack, cache)
        np.save(small, np.stack(thumbnails), allow_pickle=False)
        part.close()
        small.close()
        os.replace(small_path, self._thumbnails)
        os.replace(part_path, self._frames)
    except OSError as error:
      raise UserError(
          f"{cache}: cannot hold the frames of {self.path}: {error.strerror}; "
          "cache_dir or MCJEPA_CACHE names another folder"
      ) from error


def _over_limit(
    path: paths.Location, shape: tuple[int, ...], limit: int
) -> UserError:
  count, height, width, _ = shape
  return UserError(
      f"{path}: expected at most {limit} bytes of decoded frames, came more "
      f"({count} or more of {width}x{height}); MCJEPA_CACHE_GIB sets the limit"
  )


def temporary(stack: contextlib.ExitStack, folder: pathlib.Path):
  """Returns (file, path) of a new file that is gone unless it is renamed."""
  handle, path = tempfile.mkstemp(dir=folder, suffix=".part")
  stack.callback(lambda: pathlib.Path(path).unlink(missing_ok=True))
  return stack.enter_context(os.fdopen(handle, "wb")), path


def _write_npy_header(file, shape: tuple[int, ...]) -> int:
  np.lib.format.write_array_header_1_0(
      file, {"descr": "|u1", "fortran_order": False, "shape": shape}
  )
  return file.tell()


def thumbnail(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
  """Returns the frame at the size at which change is looked for."""
  size = (THUMBNAIL, THUMBNAIL)
  return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def _check_container(path: paths.Location) -> None:
  """Raises unless the file is a whole MP4, MOV, AVI, MKV or WebM.

  The decoder takes a cut file for a shorter video, and follows a play list,
  whatever its suffix, to the files and hosts that it names.
  """
  with image_files.opened(path, "a video", again=True) as (file, size):
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
      part_length = _riff_length
    elif head[:4] == _EBML[0]:
      part_length = _ebml_length
    elif head[4:8] in _MP4_BOXES:
      part_length = _mp4_length
    else:
      raise UserError(
          f"{path}: expected an MP4, MOV, AVI, MKV or WebM, came {head!r}"
      )
    at = parts = 0
    while size - at >= 8:
      parts += 1
      if parts > _MAX_PARTS:
        raise UserError(
            f"{path}: expected a video of at most {_MAX_PARTS} parts, came more"
        )
      file.seek(at)
      length = part_length(file.read(16), size - at)
      if length < 8 or at + length > size:
        raise UserError(
            f"{path}: expected a whole video, came a cut one: its part at byte "
            f"{at} ends at {at + length}, the file at {size}"
        )
      at += length
    if part_length is _mp4_length:
      _check_samples(path, file, 0, size, size)


def _check_samples(
    path: paths.Location,
    file: IO[bytes],
    start: int,
    end: int,
    size: int,
    depth: int = 0,
) -> None:
  """Raises if an MP4's boxes claim more samples of one size than it can hold.

  The decoder makes room for all of them before it reads one.
  """
  at = start
  while end - at >= 8:
    file.seek(at)
    head = file.read(20).ljust(20, b"\0")
    length = _mp4_length(head[:16], end - at)
    if length < 8:
      return
    if head[4:8] in _MP4_CONTAINERS:
      if depth == len(_MP4_CONTAINERS):
        raise UserError(
            f"{path}: expected at most {depth} boxes in one another, came more"
        )
      inner = at + 8, min(at + length, end)
      _check_samples(path, file, *inner, size, depth + 1)
    elif head[4:8] == b"stsz":
      each = int.from_bytes(head[12:16], "big")
      count = int.from_bytes(head[16:20], "big")
      if each * count > size:
        raise UserError(
            f"{path}: expected samples within its {size} bytes, came {count} of"
            f" {each} bytes each"
        )
    at += length


def _riff_length(head: bytes, left: int) -> int:
  if head[:4] != b"RIFF":
    return left
  length = 8 + int.from_bytes(head[4:8], "little")
  # A chunk of odd length has a byte of padding that it does not count.
  return length + 1 if length % 2 and length < left else length


def _mp4_length(head: bytes, left: int) -> int:
  length = int.from_bytes(head[:4], "big")
  if length == 1:
    return int.from_bytes(head[8:], "big")
  return length or left


def _ebml_length(head: bytes, left: int) -> int:
  if head[:4] not in _EBML:
    return left
  # As many zero bits as the size has bytes after its first; all ones: unknown.
  count = 9 - head[4].bit_length()
  largest = 2 ** (7 * count) - 1
  length = int.from_bytes(head[4 : 4 + count], "big") & largest
  return left if length == largest else 4 + count + length


def _decoded(
    path: paths.Location, max_side: int, progress: bool
) -> Iterable[UInt8[np.ndarray, "h w 3"]]:
  """Yields the RGB frames of a video, at most `max_side` long."""
  log_level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
  try:
    # "concat:a|b" is a protocol to FFmpeg; an absolute path never is.
    file = pathlib.Path(paths.local(path)).resolve()
    video = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG)
  except cv2.error as error:
    raise UserError(f"{path}: expected a video, came: {error}") from error
  finally:
    cv2.utils.logging.setLogLevel(log_level)
  try:
    if not video.isOpened():
      raise UserError(f"{path}: expected a video, came one that does not open")
    width = int(video.get(cv2.CAP_PROP_FRAME_WIDTH))
    height = int(video.get(cv2.CAP_PROP_FRAME_HEIGHT))
    most = min(image_files.MAX_PIXELS, _PIXELS_PER_BYTE * path.stat().st_size)
    if not 0 < width * height <= most:
      raise UserError(
          f"{path}: expected frames of 1 to {most} pixels, came {width}x{height}"
      )
    # An estimate: right in most MP4s, twice the truth in some AVIs.
    declared = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    count = 0
    with tqdm.tqdm(
        desc=f"decoding {path.name}",
        total=max(declared, 0) or None,
        unit="frame",
        delay=2,
        disable=not progress,
    ) as bar:
      while True:
        came, frame = video.read()
        if not came:
          break
        count += 1
        scale = max_side / max(frame.shape[:2])
        if scale < 1:
          size = [max(1, round(side * scale)) for side in frame.shape[1::-1]]
          frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        bar.update()
  finally:
    video.release()
  if count == 0 or 2 * count < declared - 1:
    raise UserError(
        f"{path}: expected some {max(declared, 1)} frames, came {count}"
    )


def videos(
    path: image_files.Path,
    *,
    max_side: int = 640,
    cache_dir: image_files.Path | None = None,
    max_bytes: int | None = None,
    progress: bool = True,
) -> list[VideoFrames]:
  """Returns the video, or all videos in a folder; `max_bytes` is for them all."""
  max_bytes = default_max_bytes() if max_bytes is None else max_bytes
  path = paths.path(path)
  chosen, root = [path], path.parent
  if path.is_dir():
    root = paths.listed(path)
    found = (f for f in path.rglob("[!.]*") if f.is_file())
    found = (f for f in found if f.suffix.lower() in VIDEO_SUFFIXES)
    chosen = sorted(found, key=natural)
  if not chosen:
    raise UserError(
        f"{path}: expected videos ({', '.join(VIDEO_SUFFIXES)}), came none"
    )
  faults = []
  for file in chosen:
    try:
      # A remote one is looked at when it is copied, to be decoded.
      if not isinstance(file, paths.Remote):
        _check_container(file)
    except UserError as error:
      faults.extend(error.messages)
  if faults:
    raise UserError(*faults)
  sequences = []
  for file in chosen:
    sequences.append(
        VideoFrames(
            file,
            name=file.relative_to(root).as_posix(),
            max_side=max_side,
            cache_dir=cache_dir,
            max_bytes=max_bytes,
            progress=progress,
        )
    )
    max_bytes -= sequences[-1].nbytes
  return sequences


def natural(name: image_files.Path) -> list:
  """Returns a sort key that puts 9 before 10."""
  parts = re.split(r"(\d+)", os.fspath(name))
  return [int(part) if i % 2 else part for i, part in enumerate(parts)]
