"""Damage to files: each function returns other bytes, as `rng` decides.

Those that know a format expect a whole file of it.
"""

from collections.abc import Callable
import io
import math
import re
import struct
from typing import Any
import zipfile
import zlib

import numpy as np

Damage = Callable[[bytes, np.random.Generator], bytes]

_BOUNDARIES = [0, 1, 2, 3, 127, 128, 255, 2**15 - 1, 2**15, 2**16 - 1, 2**24]
_BOUNDARIES += [2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**63 - 1, 2**64 - 1]
_NUMBERS = "0 1 -1 255 256 65535 65536 2147483647 4294967295 1e9 nan -inf"
_HEADER = 256  # Bytes in which most fields lie.
_REPEATS = (1, 9, 99, 999)
_BOMB = 2**22  # bytes that a stream inflates to
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_KINDS = (b"zTXt", b"iTXt", b"iCCP", b"PLTE", b"tRNS", b"acTL", b"fcTL")
_PNG_KINDS += (b"fdAT", b"eXIf", b"gAMA", b"IDAT", b"IHDR", b"IEND", b"cHRM")
_DTYPES = "<f2 <f4 >f4 <f8 <f16 |u1 <i8 <u8 <c8 |O |S4 <U9 |V0 <U0 ?".split()


def _at(data: bytes, rng: np.random.Generator) -> int:
  """Returns a place, every other time in the header."""
  size = len(data) if rng.random() < 0.5 else min(len(data), _HEADER)
  return int(rng.integers(size + 1))


def _span(data: bytes, rng: np.random.Generator) -> slice:
  start = _at(data, rng)
  return slice(start, start + 1 + int(2 ** rng.uniform(0, 10)))


def pick(rng: np.random.Generator, values):
  """Returns one of the values."""
  return values[int(rng.integers(len(values)))]


def _flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
  damaged = bytearray(data)
  for _ in range(int(rng.integers(1, 9)) if data else 0):
    damaged[min(_at(data, rng), len(data) - 1)] ^= 1 << int(rng.integers(8))
  return bytes(damaged)


def _set_bytes(data: bytes, rng: np.random.Generator) -> bytes:
  place = slice(start := _at(data, rng), start + int(rng.integers(1, 17)))
  return data[: place.start] + rng.bytes(len(data[place])) + data[place.stop :]


def _truncate(data: bytes, rng: np.random.Generator) -> bytes:
  return data[: _at(data, rng)]


def _insert(data: bytes, rng: np.random.Generator) -> bytes:
  at, size = _at(data, rng), int(2 ** rng.uniform(0, 12))
  new = pick(rng, (rng.bytes(size), bytes(size), b"\xff" * size))
  return data[:at] + new + data[at:]


def _delete(data: bytes, rng: np.random.Generator) -> bytes:
  place = _span(data, rng)
  return data[: place.start] + data[place.stop :]


def _duplicate(data: bytes, rng: np.random.Generator) -> bytes:
  place, at = _span(data, rng), _at(data, rng)
  return data[:at] + data[place] * int(rng.integers(1, 9)) + data[at:]


def _set_integer(data: bytes, rng: np.random.Generator) -> bytes:
  size, order = pick(rng, (1, 2, 4, 8)), pick(rng, ("little", "big"))
  value = pick(rng, _BOUNDARIES) & (2 ** (8 * size) - 1)
  at = _at(data, rng)
  new = value.to_bytes(size, order)[: len(data) - at]
  return data[:at] + new + data[at + size :]


def _set_number(data: bytes, rng: np.random.Generator) -> bytes:
  """Changes a number that is written in digits."""
  found = list(re.finditer(rb"-?\d[\d.]*", data[: 4 * _HEADER]))
  if not found:
    return _set_integer(data, rng)
  place, value = pick(rng, found), pick(rng, _NUMBERS.split())
  return data[: place.start()] + value.encode() + data[place.end() :]


_IN_PLACE = (_flip_bits, _set_bytes, _set_integer)
_ANY = (*_IN_PLACE, _set_integer, _truncate, _insert, _delete, _duplicate)
_ANY += (_set_number,)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
  """Returns the bytes after one to four faults."""
  for _ in range(int(rng.integers(1, 5))):
    data = pick(rng, _ANY)(data, rng)
  return data


def splice(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
  """Returns the beginning of one file and the end of another."""
  at = _at(data, rng)
  return data[:at] + other[at if rng.random() < 0.5 else _at(other, rng) :]


def png(data: bytes, rng: np.random.Generator) -> bytes:
  """Damages a chunk, or what it packs, under a checksum that is right."""
  chunks, at = [], len(_PNG_MAGIC)
  while at + 12 <= len(data):
    size = int.from_bytes(data[at : at + 4], "big")
    chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
    at += 12 + size
  if not chunks:
    return damaged(data, rng)
  i, turn = int(rng.integers(len(chunks))), rng.random()
  kind, body = chunks[i]
  if turn < 0.15:
    bomb = zlib.compress(bytes(_BOMB))
    new = pick(rng, (b"k\0\0", b"k\0\1\0\0\0", b"")) + bomb
    chunks.insert(i, (pick(rng, _PNG_KINDS), new))
  elif turn < 0.3:
    chunks.insert(i, pick(rng, chunks))
  elif turn < 0.35:
    del chunks[i]
  elif kind == b"IHDR":
    fields = list(struct.unpack(">IIBBBBB", body[:13].ljust(13, b"\0")))
    j = int(rng.integers(len(fields)))
    fields[j] = pick(rng, _BOUNDARIES) & (0xFF if j > 1 else 0xFFFFFFFF)
    chunks[i] = (kind, struct.pack(">IIBBBBB", *fields))
  elif kind == b"IDAT" and turn < 0.8:
    chunks[i] = (kind, _repacked(body, rng))
  else:
    chunks[i] = (kind, damaged(body, rng))
  return _PNG_MAGIC + b"".join(
      struct.pack(">I", len(body))
      + kind
      + body
      + struct.pack(">I", zlib.crc32(kind + body))
      for kind, body in chunks
  )


def _repacked(packed: bytes, rng: np.random.Generator) -> bytes:
  try:
    data = zlib.decompressobj().decompress(packed, _BOMB)
  except zlib.error:  # a later part of a stream
    return damaged(packed, rng)
  data = damaged(data, rng)
  if rng.random() < 0.3:
    data += bytes(_BOMB)
  return zlib.compress(data, int(rng.integers(10)))


def jpeg(data: bytes, rng: np.random.Generator) -> bytes:
  """Damages a segment in place, or repeats what follows one."""
  found = list(re.finditer(rb"\xff[\xc0-\xc4\xda-\xdd\xe0-\xef]", data))
  if not found:
    return damaged(data, rng)
  at = pick(rng, found).start() + 2
  if rng.random() < 0.1:
    end = len(data) - 2
    return data[:end] + data[at - 2 : end] * pick(rng, _REPEATS) + data[end:]
  segment = pick(rng, _IN_PLACE)(data[at : at + 20], rng)
  return data[:at] + segment + data[at + 20 :]


def riff(data: bytes, rng: np.random.Generator) -> bytes:
  """Damages what a RIFF holds, and says its length as it then is."""
  data = data[:12] + pick(rng, (*_IN_PLACE, damaged))(data[12:], rng)
  return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def mp4(data: bytes, rng: np.random.Generator) -> bytes:
  """Damages the index in place."""
  at = max(data.find(b"moov"), 0)
  for _ in range(int(rng.integers(1, 4))):
    place = at + int(rng.integers(len(data) - at))
    data = data[:place] + pick(rng, _IN_PLACE)(data[place:], rng)
  return data


def npy(data: bytes, rng: np.random.Generator) -> bytes:
  """Writes another header, every other time with as many values."""
  array = np.load(io.BytesIO(data), allow_pickle=False)
  shape, dtype = list(array.shape), array.dtype.str
  turn, body = rng.random(), array.tobytes()
  if turn < 0.4 and shape:
    value = pick(rng, _BOUNDARIES) * pick(rng, (1, 1, 1, -1))
    shape[int(rng.integers(len(shape)))] = value
  elif turn < 0.6:
    dtype = pick(rng, _DTYPES)
  elif turn < 0.8:
    shape = [int(n) for n in rng.integers(-1, 9, rng.integers(5))]
  else:
    body = damaged(body, rng)
  file = io.BytesIO()
  header = {"descr": dtype, "fortran_order": bool(rng.random() < 0.1)}
  np.lib.format.write_array_header_1_0(file, header | {"shape": tuple(shape)})
  if rng.random() < 0.5:
    count = math.prod(shape) * np.dtype(dtype).itemsize
    body = (body + bytes(_BOMB))[: min(max(count, 0), _BOMB)]
  return file.getvalue() + body


def npz(data: bytes, rng: np.random.Generator) -> bytes:
  """Damages a member or its name within an archive that is whole."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    members = [(name, archive.read(name)) for name in archive.namelist()]
  i = int(rng.integers(len(members)))
  name, body = members[i]
  turn = rng.random()
  if turn < 0.1:
    members[i] = (pick(rng, ("../", "/", "a/", "\1", "é")) + name, body)
  elif turn < 0.15:
    del members[i]
  else:
    members[i] = (name, pick(rng, (npy, npy, damaged))(body, rng))
  packing = pick(rng, (zipfile.ZIP_STORED,) * 3 + (zipfile.ZIP_DEFLATED,))
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", packing) as archive:
    for name, body in members:
      # Without the time of day, which the name alone would have.
      entry = zipfile.ZipInfo(name)
      entry.compress_type = packing
      archive.writestr(entry, body)
  data = file.getvalue()
  if rng.random() < 0.2:
    # The index, which is the end of the archive.
    at = max(data.find(b"PK\x01\x02"), 0)
    data = data[:at] + damaged(data[at:], rng)
  return data


def odd_value(value: Any, rng: np.random.Generator) -> Any:
  """Returns JSON with one value of it replaced."""
  if isinstance(value, dict) and value and rng.random() < 0.9:
    key = pick(rng, list(value))
    if rng.random() < 0.1:
      return {k: v for k, v in value.items() if k != key}
    return value | {key: odd_value(value[key], rng)}
  if isinstance(value, list) and value and rng.random() < 0.8:
    i = int(rng.integers(len(value)))
    if rng.random() < 0.2:
      return value[:i] + value[i + 1 :] + [value[i]] * int(rng.integers(3))
    return value[:i] + [odd_value(value[i], rng)] + value[i + 1 :]
  if isinstance(value, str) and rng.random() < 0.6:
    text = damaged(value.encode(), rng).decode("latin-1")
    return pick(rng, (text, f"../{value}", f"/{value}", f"{value}\0", "1"))
  odd = (*_BOUNDARIES, -1, 0.5, 1e300, True, None, "", "..", [], {}, [[]])
  return pick(rng, odd)
