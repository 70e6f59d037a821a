"""Readers of files and of images.

Files may be hostile: the size that a header claims is held against the size of
the file before anything is allocated, and every fault is a UserError that names
the file.
"""

import contextlib
import io
import os
import re
import stat
import warnings

from jaxtyping import UInt8
import numpy as np
from PIL import Image, UnidentifiedImageError
import simplejpeg

from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

# `max_pixels` stands in its place, with one error and no warning before it.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

Path = str | os.PathLike

MAX_PIXELS = 2**26
# Of the images that a set may hold in place of one another.
SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".webp", ".bmp")

_JPEG_MAGIC = b"\xff\xd8"
# Without comments and with 8 bits, as FlyingChairs writes it.
_PPM_HEADER = re.compile(rb"P6\s+([1-9]\d{0,5})\s+([1-9]\d{0,5})\s+255\s")
# Deflate packs at most 1032 bytes into one, and a byte holds 8 1-bit pixels.
DEFLATE_RATIO = 1032
# A JPEG block of 8x8 pixels takes a bit at least, BMP's runs 255 pixels two bytes;
# a WebP of one colour takes next to nothing, so its bound is no fact but ours.
_PIXELS_PER_BYTE = {
    "PPM": 8,
    "PNG": 8 * DEFLATE_RATIO,
    "JPEG": 512,
    "BMP": 128,
    "WEBP": 2**13,
}
# A scan costs the decoder time for every pixel, and the file as little as 35
# bytes; libjpeg writes 10. A marker, with its length after it, is none of those
# that stand within a scan.
_MAX_SCANS = 32
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
# No format that runs a program (EPS) or holds a film (GIF, TIFF).
_FORMATS = ("JPEG", "PNG", "PPM", "WEBP", "BMP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


@contextlib.contextmanager
def opened(path: Path, wanted: str, *, again: bool = False):
  """Yields the open file and its size; only a regular file is opened.

  A file that will be opened `again` is copied once where it is remote.
  """
  try:
    local, is_spare = paths.copied(path, again=again)
    # A pipe would block at open, so the kind is looked at first.
    if not stat.S_ISREG(os.stat(local).st_mode):
      raise UserError(f"{path}: expected {wanted}, came no regular file")
    try:
      file = open(local, "rb")
    finally:
      if is_spare:
        os.unlink(local)
  except (OSError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path}: expected {wanted}, came: {reason}") from error
  with file:
    yield file, os.fstat(file.fileno()).st_size


def file_size(path: Path, wanted: str) -> int:
  """Returns the size of a regular file; a remote one's as it is listed."""
  if not isinstance(path, paths.Remote):
    with opened(path, wanted) as (_, size):
      return size
  try:
    return path.stat().st_size
  except FileNotFoundError as error:
    raise UserError(
        f"{path}: expected {wanted}, came: {error.strerror}"
    ) from error


def _check_size(
    name: Path, width: int, height: int, kind: str, size: int, max_pixels: int
) -> None:
  """Raises for more pixels than are wanted, or than a file of its size holds."""
  most = min(max_pixels, size * _PIXELS_PER_BYTE[kind])
  if width * height > most:
    raise UserError(
        f"{name}: expected at most {most} pixels ({max_pixels}, or what {size} "
        f"bytes hold), came {width}x{height}"
    )


def _check_palette(data: bytes, name: Path) -> None:
  """Raises for a BMP with more colours than indices, each a turn of Pillow's."""
  if data[:2] != b"BM" or int.from_bytes(data[14:18], "little") < 40:
    return
  bits = int.from_bytes(data[28:30], "little")
  colors = int.from_bytes(data[46:50], "little")
  if bits <= 8 and colors > 256:
    raise UserError(
        f"{name}: expected a palette of at most 256 colours, came {colors}"
    )


def _check_scans(data: bytes, name: Path) -> None:
  """Raises for a JPEG of so many scans that its decoding would not end."""
  # Much sooner, and true of all but those with other files within.
  if data.count(_SCAN) <= _MAX_SCANS:
    return
  at, scans = 2, 0
  while (found := _MARKER.search(data, at)) and found[0] != _END:
    scans += found[0] == _SCAN
    if scans > _MAX_SCANS:
      raise UserError(f"{name}: expected at most {_MAX_SCANS} scans, came more")
    at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])


def _decode_jpeg(
    data: bytes, name: Path, min_side: int | None, max_pixels: int
) -> UInt8[np.ndarray, "h w 3"] | None:
  """Returns what Pillow does, sooner; None for what is Pillow's to judge."""
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
  except ValueError:
    return None
  _check_size(name, width, height, "JPEG", len(data), max_pixels)
  # Pillow knows which CMYK is inverted.
  if colours not in ("YCbCr", "Gray", "RGB"):
    return None
  reduction = 1
  if min_side is not None:
    while reduction < 8 and min(width, height) // (2 * reduction) >= min_side:
      reduction *= 2
  try:
    return simplejpeg.decode_jpeg(
        data,
        min_height=-(-height // reduction),
        min_width=-(-width // reduction),
    )
  except ValueError:
    return None


def _decode_ppm(
    data: bytes, name: Path, max_pixels: int
) -> UInt8[np.ndarray, "h w 3"] | None:
  """Returns what Pillow does, sooner; None for what is Pillow's to judge."""
  header = _PPM_HEADER.match(data)
  if header is None:
    return None
  width, height = map(int, header.groups())
  if len(data) - header.end() != 3 * width * height:
    return None
  _check_size(name, width, height, "PPM", len(data), max_pixels)
  pixels = np.frombuffer(data, np.uint8, offset=header.end())
  return pixels.reshape(height, width, 3).copy()


def decode_image(
    data: bytes,
    name: Path,
    *,
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the RGB pixels of an encoded image; alpha is dropped.

  With `min_side` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both
  sides stay at least that long (2048x1536 for 256: 6 ms instead of 19).
  """
  if data[:2] == _JPEG_MAGIC:
    _check_scans(data, name)
    image = _decode_jpeg(data, name, min_side, max_pixels)
  else:
    image = _decode_ppm(data, name, max_pixels)
  if image is not None:
    return image
  _check_palette(data, name)
  try:
    # Out of memory, as Pillow reads as much as a chunk claims to hold.
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      _check_size(name, *image.size, image.format, len(data), max_pixels)
      # Pillow takes a 16-bit png, such as KITTI's flow, for an 8-bit picture.
      deep = image.format == "PNG" and data[24] > 8
      if deep or image.mode not in _MODES:
        raise UserError(
            f"{name}: expected 8 bits a channel, came "
            f"{'16 bits' if deep else image.mode}"
        )
      if min_side is not None:
        image.draft("RGB", (min_side, min_side))
      return np.array(image.convert("RGB"))
  except (UserError, MemoryError):
    raise
  # Pillow answers a hostile file with whatever its parser ran into.
  except Exception as error:
    unknown = isinstance(error, UnidentifiedImageError)
    # Pillow's own words would be the address of the bytes.
    reason = "of no such format" if unknown else f"that do not decode: {error}"
    raise UserError(
        f"{name}: expected an image ({', '.join(_FORMATS)}), "
        f"came {len(data)} bytes {reason}"
    ) from error


def read_encoded(path: Path, *, max_pixels: int = MAX_PIXELS) -> bytes:
  """Returns the bytes of an image file, at most what `max_pixels` can take."""
  with opened(path, "an image") as (file, size):
    # 16-bit RGB without compression has 6 bytes a pixel.
    if size > 8 * max_pixels:
      raise UserError(
          f"{path}: expected an image of at most {max_pixels} pixels, came "
          f"{size} bytes"
      )
    return file.read(size)


def read_image(
    path: Path, *, min_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the RGB pixels of an image file; see `decode_image`."""
  data = read_encoded(path, max_pixels=max_pixels)
  return decode_image(data, path, min_side=min_side, max_pixels=max_pixels)
