"""TensorBoard's event files, written without TensorFlow."""

from collections.abc import Mapping
import itertools
import os
import pathlib
import socket
import struct
import sys
import time
from typing import Any

from jaxtyping import UInt8
import numpy as np

_files = itertools.count()  # opened by this process


class EventFile:
  """The event file of TensorBoard.

  Written where it is called: what tensorboardX writes in a thread waits for ever
  once that thread has met a full disk.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    """Opens a new file; earlier files' events from `step` on are dropped."""
    # tensorboardX imports torch where it finds it: seconds, and no use here.
    absent = object()
    torch = sys.modules.get("torch", absent)
    if torch is absent:
      sys.modules["torch"] = None
    try:
      from tensorboardX import record_writer, summary
      from tensorboardX.proto import event_pb2
    finally:
      if torch is absent:
        del sys.modules["torch"]
    self._summary, self._proto = summary, event_pb2
    self._checksum = record_writer.masked_crc32c
    folder.mkdir(exist_ok=True)
    # Two files of one second have two names.
    name = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    path = folder / f"events.out.tfevents.{name}.{next(_files)}"
    self._file = path.open("wb")
    self._add(step, file_version="brain.Event:2")
    if step:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(step, session_log=start)

  def _add(self, step: int, **content: Any) -> None:
    event = self._proto.Event(wall_time=time.time(), step=step, **content)
    data = event.SerializeToString()
    # A record: u64 length, checksum of it, data, checksum of these.
    for part in (struct.pack("<Q", len(data)), data):
      self._file.write(part + struct.pack("<I", self._checksum(part)))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each name."""
    for name, value in values.items():
      self._add(step, summary=self._summary.scalar(name, value))
    self._file.flush()

  def picture(
      self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]
  ) -> None:
    """Adds a picture."""
    image = self._summary.image(name, image, dataformats="HWC")
    self._add(step, summary=image)
    self._file.flush()

  def close(self) -> None:
    """Flushes all."""
    self._file.close()
