"""Readers and writers of flow files and images.

A flow reader returns (flow, valid): flow [h w 2] in pixels, (u right, v down),
and valid [h w 1], 1 where the file knows the flow. Where it does not, flow is
0, so no NaN or 1e10 can reach a product with the mask. In .flo and .pfm
"unknown" is NaN or a magnitude above 1e9 (Middlebury's rule).

Files may be hostile: the size that a header claims is held against the size of
the file before anything is allocated, and every fault is a UserError that names
the file.
"""

from collections.abc import Callable
import contextlib
import io
import os
import pathlib
import re
import stat
import struct
from typing import BinaryIO
import warnings
import zlib

import cv2
from jaxtyping import Float32, UInt8
import numpy as np
from PIL import Image
import simplejpeg

from mcjepa_jax.errors import UserError

# `max_pixels` stands in its place, with one error and no warning before it.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

Path = str | os.PathLike
Flow = tuple[Float32[np.ndarray, "h w 2"], Float32[np.ndarray, "h w 1"]]

MAX_PIXELS = 2**26

_FLO_MAGIC = b"PIEH"
_UNKNOWN_ABOVE = 1e9
_UNKNOWN = 1e10
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC = b"\xff\xd8"
# Without comments and with 8 bits, as FlyingChairs writes it.
_PPM_HEADER = re.compile(rb"P6\s+([1-9]\d{0,5})\s+([1-9]\d{0,5})\s+255\s")
# Deflate packs at most 1032 bytes into one, and a byte holds 8 1-bit pixels.
_DEFLATE_RATIO = 1032
# A JPEG block of 8x8 pixels takes a bit at least, BMP's runs 255 pixels two bytes;
# a WebP of one colour takes next to nothing, so its bound is no fact but ours.
_PIXELS_PER_BYTE = {
    "PPM": 8,
    "PNG": 8 * _DEFLATE_RATIO,
    "JPEG": 512,
    "BMP": 128,
    "WEBP": 2**13,
}
# No format that runs a program (EPS) or holds a film (GIF, TIFF).
_FORMATS = ("JPEG", "PNG", "PPM", "WEBP", "BMP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


@contextlib.contextmanager
def opened(path: Path, wanted: str):
  """Yields the open file and its size; only a regular file is opened."""
  try:
    # A pipe would block at open, so the kind is looked at first.
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise UserError(f"{path}: expected {wanted}, came no regular file")
    file = open(path, "rb")
  except (OSError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path}: expected {wanted}, came: {reason}") from error
  with file:
    yield file, os.fstat(file.fileno()).st_size


def _read_floats(
    file: BinaryIO, path: Path, dtype: str, shape: tuple[int, int, int]
) -> np.ndarray:
  """Returns the rest of the file as an array; its size is already checked."""
  count = int(np.prod(shape))
  values = np.fromfile(file, dtype, count)
  if values.size != count:
    raise UserError(f"{path}: expected {count} floats, came {values.size}")
  return values.reshape(shape).astype(np.float32, copy=False)


def _split_unknown(flow: Float32[np.ndarray, "h w 2"]) -> Flow:
  # NaN fails either comparison, so it counts as unknown.
  if max(-flow.min(), flow.max()) <= _UNKNOWN_ABOVE:
    return np.ascontiguousarray(flow), np.ones_like(flow[..., :1])
  valid = np.all(np.abs(flow) <= _UNKNOWN_ABOVE, axis=-1, keepdims=True)
  return np.where(valid, flow, np.float32(0)), valid.astype(np.float32)


def _mark_unknown(path: Path, flow: np.ndarray, valid: np.ndarray | None):
  """Returns the flow with 1e10 where it is not valid."""
  if valid is not None:
    flow = np.where(valid > 0, flow, np.float32(_UNKNOWN))
  if not np.isfinite(flow).all():
    raise UserError(f"{path}: expected finite flow to write, came NaN or inf")
  return flow


def _write(path: Path, *parts: bytes) -> None:
  try:
    with open(path, "wb") as file:
      for part in parts:
        file.write(part)
  except OSError as error:
    raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def read_flo(path: Path) -> Flow:
  """Returns (flow, valid) of a Middlebury .flo file."""
  with opened(path, "a .flo file") as (file, size):
    header = file.read(12)
    if header[:4] != _FLO_MAGIC or len(header) < 12:
      raise UserError(
          f"{path}: expected a .flo file (PIEH, width, height), "
          f"came {header[:4]!r} in {size} bytes"
      )
    width, height = struct.unpack("<ii", header[4:])
    if width < 1 or height < 1 or 12 + 8 * width * height != size:
      raise UserError(
          f"{path}: its header says {width}x{height}, so expected "
          f"{12 + 8 * width * height} bytes, came {size}"
      )
    return _split_unknown(_read_floats(file, path, "<f4", (height, width, 2)))


def write_flo(
    path: Path,
    flow: Float32[np.ndarray, "h w 2"],
    valid: Float32[np.ndarray, "h w 1"] | None = None,
) -> None:
  """Writes a .flo file, 1e10 where `valid` is 0."""
  height, width, _ = flow.shape
  flow = _mark_unknown(path, flow, valid).astype("<f4")
  _write(path, _FLO_MAGIC, struct.pack("<ii", width, height), flow.tobytes())


def read_pfm(path: Path) -> Flow:
  """Returns (flow, valid) of a colour .pfm file as FlyingThings3D writes it.

  Rows run from the bottom up, a negative scale means little-endian, its
  magnitude is ignored, and so is the third channel.
  """
  with opened(path, "a .pfm file") as (file, size):
    lines = [file.readline(64) for _ in range(3)]
    kind, sizes, scale = (line.strip() for line in lines)
    found = re.fullmatch(rb"(\d{1,9})\s+(\d{1,9})", sizes)
    endian = re.fullmatch(rb"([+-]?)(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", scale, re.I)
    if kind != b"PF" or not found or not endian or lines[2][-1:] != b"\n":
      raise UserError(
          f"{path}: expected a 3-channel .pfm (PF, width height, scale), "
          f"came {b''.join(lines)[:40]!r}"
      )
    width, height = int(found[1]), int(found[2])
    wanted = file.tell() + 12 * width * height
    if width < 1 or height < 1 or wanted != size:
      raise UserError(
          f"{path}: its header says {width}x{height}, so expected "
          f"{wanted} bytes, came {size}"
      )
    dtype = "<f4" if endian[1] == b"-" else ">f4"
    values = _read_floats(file, path, dtype, (height, width, 3))
  return _split_unknown(values[::-1, :, :2])


def write_pfm(
    path: Path,
    flow: Float32[np.ndarray, "h w 2"],
    valid: Float32[np.ndarray, "h w 1"] | None = None,
) -> None:
  """Writes a little-endian .pfm file, third channel 0, 1e10 where not valid."""
  height, width, _ = flow.shape
  values = np.zeros((height, width, 3), "<f4")
  values[..., :2] = _mark_unknown(path, flow, valid)[::-1]
  _write(path, b"PF\n%d %d\n-1.0\n" % (width, height), values.tobytes())


def _png_chunks(path: Path, data: bytes) -> list[tuple[bytes, memoryview]]:
  """Returns (kind, body) of each chunk up to IEND, with its CRC checked."""
  view, chunks, at = memoryview(data), [], len(_PNG_MAGIC)
  while not chunks or chunks[-1][0] != b"IEND":
    head = data[at : at + 8]
    size = int.from_bytes(head[:4], "big")
    end = at + 12 + size
    if len(head) < 8 or end > len(data):
      raise UserError(f"{path}: expected whole PNG chunks, came a cut file")
    crc = int.from_bytes(data[end - 4 : end], "big")
    if zlib.crc32(view[at + 4 : end - 4]) != crc:
      raise UserError(f"{path}: the PNG chunk {head[4:]!r} fails its checksum")
    chunks.append((head[4:], view[at + 8 : end - 4]))
    at = end
  if at != len(data):
    raise UserError(f"{path}: {len(data) - at} bytes follow the PNG's end")
  return chunks


def _png_chunk(kind: bytes, body: bytes) -> bytes:
  crc = zlib.crc32(body, zlib.crc32(kind))
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def read_kitti_flow(path: Path) -> Flow:
  """Returns (flow, valid) of a 16-bit RGB png in KITTI's code (also HD1K's).

  u = (R - 2^15) / 64, v = (G - 2^15) / 64, valid where B > 0.
  """
  with opened(path, "a 16-bit KITTI flow png") as (file, size):
    header = file.read(33)
    if header[:8] != _PNG_MAGIC or header[12:16] != b"IHDR" or size < 57:
      raise UserError(f"{path}: expected a 16-bit KITTI flow png, came no PNG")
    width, height, *layout = struct.unpack(">IIBBBBB", header[16:29])
    if layout != [16, 2, 0, 0, 0]:
      raise UserError(
          f"{path}: expected a 16-bit RGB png, not interlaced (16, 2, 0, 0, 0), "
          f"came bits, colour, compression, filter, interlace {tuple(layout)}"
      )
    wanted = height * (1 + 6 * width)
    if not (0 < width and 0 < height and wanted <= _DEFLATE_RATIO * size):
      raise UserError(
          f"{path}: its header says {width}x{height}, more than {size} bytes "
          "can hold"
      )
    file.seek(0)
    chunks = _png_chunks(path, file.read(size))
  packed = b"".join(body for kind, body in chunks if kind == b"IDAT")
  # libpng fills the rows of a short stream with zeros and calls it a warning.
  try:
    stream = zlib.decompressobj()
    came = len(stream.decompress(packed, wanted + 1))
  except zlib.error as error:
    raise UserError(f"{path}: its pixels do not unpack: {error}") from error
  if came != wanted or not stream.eof or stream.unused_data:
    raise UserError(
        f"{path}: its header says {width}x{height}, so expected {wanted} bytes "
        f"of pixels, came {'more' if came > wanted else came}"
    )
  # Nothing but the pixels reaches the C decoder: no profile, text or animation.
  png = _PNG_MAGIC + b"".join(
      (
          _png_chunk(b"IHDR", header[16:29]),
          _png_chunk(b"IDAT", packed),
          _png_chunk(b"IEND", b""),
      )
  )
  # Pillow keeps only the high byte of 16-bit RGB. OpenCV returns BGR.
  values = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
  if values is None or values.dtype != np.uint16:
    raise UserError(f"{path}: expected 16-bit RGB pixels, came none")
  valid = values[..., :1] > 0
  flow = (values[..., :0:-1].astype(np.float32) - 2**15) / 64
  return flow * valid, valid.astype(np.float32)


def write_kitti_flow(
    path: Path,
    flow: Float32[np.ndarray, "h w 2"],
    valid: Float32[np.ndarray, "h w 1"] | None = None,
) -> None:
  """Writes a KITTI flow png: 1/64 px steps, clipped to [-512, 512) px."""
  if valid is None:
    valid = np.ones_like(flow[..., :1])
  code = (
      np.where(valid > 0, flow, np.float32(0)).astype(np.float64) * 64 + 2**15
  )
  if not np.isfinite(code).all():
    raise UserError(f"{path}: expected finite flow to write, came NaN or inf")
  code = np.clip(np.rint(code), 0, 2**16 - 1)
  bgr = np.concatenate(
      [valid > 0, code[..., 1:] * (valid > 0), code[..., :1] * (valid > 0)],
      axis=-1,
  )
  done, png = cv2.imencode(".png", bgr.astype(np.uint16))
  if not done:
    raise UserError(f"{path}: {flow.shape[1]}x{flow.shape[0]} is no PNG size")
  _write(path, png.tobytes())


FLOW_READERS: dict[str, Callable[[Path], Flow]] = {
    ".flo": read_flo,
    ".pfm": read_pfm,
    ".png": read_kitti_flow,
}


def read_flow(path: Path) -> Flow:
  """Returns (flow, valid) by the reader of the file's suffix."""
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in FLOW_READERS:
    raise UserError(
        f"{path}: expected one of {', '.join(FLOW_READERS)}, came {suffix!r}"
    )
  return FLOW_READERS[suffix](path)


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
    image = _decode_jpeg(data, name, min_side, max_pixels)
  else:
    image = _decode_ppm(data, name, max_pixels)
  if image is not None:
    return image
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
    raise UserError(
        f"{name}: expected an image ({', '.join(_FORMATS)}), "
        f"came {len(data)} bytes that do not decode: {error}"
    ) from error


def read_image(
    path: Path, *, min_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the RGB pixels of an image file; see `decode_image`."""
  with opened(path, "an image") as (file, size):
    # 16-bit RGB without compression has 6 bytes a pixel.
    if size > 8 * max_pixels:
      raise UserError(
          f"{path}: expected an image of at most {max_pixels} pixels, came "
          f"{size} bytes"
      )
    data = file.read(size)
  return decode_image(data, path, min_side=min_side, max_pixels=max_pixels)
