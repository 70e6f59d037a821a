"""PNG files that lie about their size."""

import struct
import zlib


def png(width, height, pixels, *, layout=(16, 2, 0, 0, 0), pack=zlib.compress):
  header = struct.pack(">IIBBBBB", width, height, *layout)
  chunks = ((b"IHDR", header), (b"IDAT", pack(pixels)), (b"IEND", b""))
  return b"\x89PNG\r\n\x1a\n" + b"".join(
      struct.pack(">I", len(body))
      + kind
      + body
      + struct.pack(">I", zlib.crc32(kind + body))
      for kind, body in chunks
  )
