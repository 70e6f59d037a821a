"""Readers and writers of flow files.

A flow reader returns (flow, valid): flow [h w 2] in pixels, (u right, v down),
and valid [h w 1], 1 where the file knows the flow. Where it does not, flow is
0, so no NaN or 1e10 can reach a product with the mask. Except in KITTI's png
"unknown" is NaN, infinite or a magnitude above 1e9 (Middlebury's rule).

Files may be hostile: the size that a header claims is held against the size of
the file before anything is allocated, and every fault is a UserError that names
the file.
"""

from collections.abc import Callable
import io
import math
import pathlib
import re
import struct
from typing import BinaryIO
import zipfile
import zlib

import cv2
import h5py
from jaxtyping import Float, Float32
import numpy as np

from mcjepa_jax.data.readers import image_files
from mcjepa_jax.errors import UserError

Flow = tuple[Float32[np.ndarray, "h w 2"], Float32[np.ndarray, "h w 1"]]

_FLO_MAGIC = b"PIEH"
_UNKNOWN_ABOVE = 1e9
_UNKNOWN = 1e10
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# What zipfile, zlib and HDF5 answer a hostile file with.
_HOSTILE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
)
_DEFLATE, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE


def _read_floats(
    file: BinaryIO,
    path: image_files.Path,
    dtype: str,
    shape: tuple[int, int, int],
) -> np.ndarray:
  """Returns the rest of the file as an array; its size is already checked."""
  count = int(np.prod(shape))
  values = np.fromfile(file, dtype, count)
  if values.size != count:
    raise UserError(f"{path}: expected {count} floats, came {values.size}")
  return values.reshape(shape).astype(np.float32, copy=False)


def _split_unknown(flow: Float[np.ndarray, "h w 2"]) -> Flow:
  # What float32 cannot hold becomes infinite, or NaN: unknown.
  with np.errstate(over="ignore", invalid="ignore"):
    flow = flow.astype(np.float32, copy=False)
  # NaN fails either comparison, so it counts as unknown.
  if max(-flow.min(), flow.max()) <= _UNKNOWN_ABOVE:
    return np.ascontiguousarray(flow), np.ones_like(flow[..., :1])
  valid = np.all(np.abs(flow) <= _UNKNOWN_ABOVE, axis=-1, keepdims=True)
  return np.where(valid, flow, np.float32(0)), valid.astype(np.float32)


def _mark_unknown(
    path: image_files.Path, flow: np.ndarray, valid: np.ndarray | None
):
  """Returns the flow with 1e10 where it is not valid."""
  if valid is not None:
    flow = np.where(valid > 0, flow, np.float32(_UNKNOWN))
  if not np.isfinite(flow).all():
    raise UserError(f"{path}: expected finite flow to write, came NaN or inf")
  return flow


def _write(path: image_files.Path, *parts: bytes) -> None:
  try:
    with open(path, "wb") as file:
      for part in parts:
        file.write(part)
  except OSError as error:
    raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def read_flo(path: image_files.Path) -> Flow:
  """Returns (flow, valid) of a Middlebury .flo file."""
  with image_files.opened(path, "a .flo file") as (file, size):
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
    path: image_files.Path,
    flow: Float32[np.ndarray, "h w 2"],
    valid: Float32[np.ndarray, "h w 1"] | None = None,
) -> None:
  """Writes a .flo file, 1e10 where `valid` is 0."""
  height, width, _ = flow.shape
  flow = _mark_unknown(path, flow, valid).astype("<f4")
  _write(path, _FLO_MAGIC, struct.pack("<ii", width, height), flow.tobytes())


def read_pfm(path: image_files.Path) -> Flow:
  """Returns (flow, valid) of a colour .pfm file as FlyingThings3D writes it.

  Rows run from the bottom up, a negative scale means little-endian, its
  magnitude is ignored, and so is the third channel.
  """
  with image_files.opened(path, "a .pfm file") as (file, size):
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
    path: image_files.Path,
    flow: Float32[np.ndarray, "h w 2"],
    valid: Float32[np.ndarray, "h w 1"] | None = None,
) -> None:
  """Writes a little-endian .pfm file, third channel 0, 1e10 where not valid."""
  height, width, _ = flow.shape
  values = np.zeros((height, width, 3), "<f4")
  values[..., :2] = _mark_unknown(path, flow, valid)[::-1]
  _write(path, b"PF\n%d %d\n-1.0\n" % (width, height), values.tobytes())


def _png_chunks(
    path: image_files.Path, data: bytes
) -> list[tuple[bytes, memoryview]]:
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


def read_kitti_flow(path: image_files.Path) -> Flow:
  """Returns (flow, valid) of a 16-bit RGB png in KITTI's code (also HD1K's).

  u = (R - 2^15) / 64, v = (G - 2^15) / 64, valid where B > 0.
  """
  with image_files.opened(path, "a 16-bit KITTI flow png") as (file, size):
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
    if not (
        0 < width and 0 < height and wanted <= image_files.DEFLATE_RATIO * size
    ):
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
    path: image_files.Path,
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


def _npy_header(
    file: io.BufferedIOBase, path: image_files.Path
) -> tuple[tuple[int, ...], np.dtype]:
  """Returns (shape, dtype) of the plain array whose values come next."""
  try:
    # Of the later versions a header may claim gigabytes.
    if np.lib.format.read_magic(file) != (1, 0):
      raise ValueError("not version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
  # A hostile header raises whatever Python's own parser raises.
  except Exception as error:
    raise UserError(f"{path}: expected an .npy array, came: {error}") from error
  if dtype.hasobject or fortran or min(shape, default=0) < 1:
    raise UserError(
        f"{path}: expected numbers in rows, came {dtype} {shape}"
        f"{' in columns' if fortran else ''}"
    )
  return shape, dtype


def read_npy(path: image_files.Path, dtype: type, axes: int) -> np.ndarray:
  """Returns the array of an .npy file that must have this dtype and rank."""
  wanted = f"an .npy file of {np.dtype(dtype)} with {axes} axes"
  with image_files.opened(path, wanted) as (file, size):
    shape, came = _npy_header(file, path)
    if came != dtype or len(shape) != axes:
      raise UserError(f"{path}: expected {wanted}, came {came} {shape}")
    # Python's integers do not overflow, NumPy's would.
    count = math.prod(shape)
    expected = file.tell() + count * came.itemsize
    if expected != size:
      raise UserError(
          f"{path}: its header says {shape}, so expected {expected} bytes, "
          f"came {size}"
      )
    return np.fromfile(file, came, count).reshape(shape)


def read_npy_flow(path: image_files.Path) -> Flow:
  """Returns (flow, valid) of a float32 .npy [h w 2], as TartanAir writes it."""
  flow = read_npy(path, np.float32, 3)
  if flow.shape[2] != 2:
    raise UserError(f"{path}: expected [h w 2], came {flow.shape}")
  return _split_unknown(flow)


def read_npz_flow(path: image_files.Path) -> Flow:
  """Returns (flow, valid) of an .npz file with u and v [h w], as VIPER's."""
  with image_files.opened(path, "an .npz file") as (file, size):
    try:
      with zipfile.ZipFile(file) as archive:
        u, v = (_npz_float(archive, name, path, size) for name in "uv")
    except UserError:
      raise
    except _HOSTILE as error:
      raise UserError(
          f"{path}: expected an .npz file, came: {error}"
      ) from error
  if u.shape != v.shape:
    raise UserError(
        f"{path}: expected u and v of one size, came {u.shape} and {v.shape}"
    )
  # Of two types NumPy casts one, and a NaN that signals warns.
  with np.errstate(invalid="ignore"):
    flow = np.stack([u, v], axis=-1)
  return _split_unknown(flow)


def _npz_float(
    archive: zipfile.ZipFile, name: str, path: image_files.Path, size: int
) -> Float[np.ndarray, "h w"]:
  """Returns a member; no more is unpacked than its header says."""
  if f"{name}.npy" not in archive.namelist():
    raise UserError(
        f"{path}: expected an array {name!r}, came {archive.namelist()[:9]}"
    )
  entry = archive.getinfo(f"{name}.npy")
  if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise UserError(f"{path}: expected {name!r} stored or deflated")
  held = image_files.DEFLATE_RATIO * min(entry.compress_size, size)
  with archive.open(entry) as member:
    shape, dtype = _npy_header(member, path)
    _expect_floats(path, dtype, shape, axes=2, held=held)
    wanted = math.prod(shape) * dtype.itemsize
    # The byte that must not come makes zipfile look at the checksum.
    data = member.read(wanted + 1)
  if len(data) != wanted:
    raise UserError(
        f"{path}: {name!r} says {shape}, so expected {wanted} bytes, came "
        f"{'more' if len(data) > wanted else len(data)}"
    )
  return np.frombuffer(data, dtype).reshape(shape)


def _expect_floats(
    path: image_files.Path,
    dtype: np.dtype,
    shape: tuple[int, ...],
    *,
    axes: int,
    held: int,
):
  """Raises unless they are a flow's and at most `held` bytes."""
  if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) != axes:
    raise UserError(
        f"{path}: expected floats with {axes} axes, came {dtype} {shape}"
    )
  if (
      math.prod(shape[:2]) > image_files.MAX_PIXELS
      or math.prod(shape) * dtype.itemsize > held
  ):
    raise UserError(
        f"{path}: its header says {shape}, more than {image_files.MAX_PIXELS} pixels or "
        f"than the {held} bytes that its packed bytes can hold"
    )


def read_flo5(path: image_files.Path) -> Flow:
  """Returns (flow, valid) of Spring's .flo5: HDF5 with a data set "flow".

  Nothing outside the file is followed: no link, external or virtual data.
  """
  with image_files.opened(path, "a .flo5 (HDF5) file") as (file, size):
    try:
      with h5py.File(file, "r") as store:
        flow = _hdf5_flow(store, path, size)
    except UserError:
      raise
    except _HOSTILE as error:
      raise UserError(
          f"{path}: expected a .flo5 (HDF5) file, came: {error}"
      ) from error
  return _split_unknown(flow)


def _hdf5_flow(
    store: h5py.File, path: image_files.Path, size: int
) -> Float[np.ndarray, "h w 2"]:
  """Returns the data set "flow", once nothing about it can surprise."""
  if not isinstance(store.get("flow", getlink=True), h5py.HardLink):
    raise UserError(f"{path}: expected a data set 'flow', came {list(store)}")
  flow = store["flow"]
  if not isinstance(flow, h5py.Dataset) or flow.is_virtual or flow.external:
    raise UserError(f"{path}: expected 'flow' to be a data set of this file")
  plist = flow.id.get_create_plist()
  filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
  if filters not in ([], [_DEFLATE], [_SHUFFLE, _DEFLATE]):
    raise UserError(f"{path}: expected 'flow' deflated, came filters {filters}")
  stored = flow.id.get_storage_size()
  ratio = image_files.DEFLATE_RATIO if filters else 1
  _expect_floats(
      path, flow.dtype, flow.shape, axes=3, held=ratio * min(stored, size)
  )
  if flow.shape[2] != 2 or 0 in flow.shape or stored > size:
    raise UserError(f"{path}: expected [h w 2] in {size} bytes, came {flow}")
  if not filters:
    return flow[()]
  if math.prod(flow.chunks) > flow.size:
    raise UserError(f"{path}: expected chunks of {flow}, came {flow.chunks}")
  # HDF5 unpacks as much as a chunk holds, a thousand times the file's size.
  values = np.empty(flow.shape, flow.dtype)
  wanted = math.prod(flow.chunks) * flow.dtype.itemsize
  for region in flow.iter_chunks():
    start = tuple(side.start for side in region)
    skipped, packed = flow.id.read_direct_chunk(start)
    data = zlib.decompressobj().decompress(packed, wanted + 1)
    if skipped or len(data) != wanted:
      raise UserError(
          f"{path}: expected {wanted} bytes in the chunk at {start}, came "
          f"{'more' if len(data) > wanted else len(data)}"
      )
    if _SHUFFLE in filters:
      data = np.frombuffer(data, np.uint8).reshape(flow.dtype.itemsize, -1)
      data = data.T.tobytes()
    chunk = np.frombuffer(data, flow.dtype).reshape(flow.chunks)
    tile = values[region]
    tile[...] = chunk[tuple(map(slice, tile.shape))]
  return values


FLOW_READERS: dict[str, Callable[[image_files.Path], Flow]] = {
    ".flo": read_flo,
    ".flo5": read_flo5,
    ".npy": read_npy_flow,
    ".npz": read_npz_flow,
    ".pfm": read_pfm,
    ".png": read_kitti_flow,
}


def read_flow(path: image_files.Path) -> Flow:
  """Returns (flow, valid) by the reader of the file's suffix."""
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in FLOW_READERS:
    raise UserError(
        f"{path}: expected one of {', '.join(FLOW_READERS)}, came {suffix!r}"
    )
  return FLOW_READERS[suffix](path)
