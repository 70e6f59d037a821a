"""Batches from a worker to its parent, through memory that both keep.

A new shared segment for each batch costs more than making it: the kernel clears
every page, and each side maps it anew. These are used again, and have no name:
whoever is killed leaves nothing behind, and /dev/shm may be small (64 MiB in
many containers).
"""

import dataclasses
import math
import mmap
from multiprocessing import parent_process
import os

from jaxtyping import UInt8
import numpy as np


class Gone(Exception):
  """The worker that lent an array has ended."""


@dataclasses.dataclass(frozen=True)
class Lent:
  """An array in a worker's segment, to be taken once."""

  process: int
  file: int  # the worker's descriptor
  capacity: int  # bytes; the one after them is 1 until the array is taken
  shape: tuple[int, ...]


class _Lender:
  """A worker's segments; as many as are under way at once."""

  def __init__(self):
    self._segments: dict[int, tuple[int, int, mmap.mmap]] = {}  # by address

  def empty(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    size = math.prod(shape)
    _, capacity, memory = self._free(size) or self._new(size)
    memory[capacity] = 1
    return np.frombuffer(memory, np.uint8, size).reshape(shape)

  def _free(self, size: int) -> tuple[int, int, mmap.mmap] | None:
    for segment in self._segments.values():
      _, capacity, memory = segment
      if capacity >= size and not memory[capacity]:
        return segment
    return None

  def _new(self, size: int) -> tuple[int, int, mmap.mmap]:
    file = os.memfd_create("mcjepa_jax")
    os.ftruncate(file, size + 1)
    memory = mmap.mmap(file, size + 1)
    address = np.frombuffer(memory, np.uint8, 1).ctypes.data
    self._segments[address] = segment = file, size, memory
    return segment

  def lend(self, array: np.ndarray) -> Lent | np.ndarray:
    segment = self._segments.get(array.ctypes.data)
    if segment is None:
      return array
    file, capacity, _ = segment
    return Lent(os.getpid(), file, capacity, array.shape)


# Of this process, if it is a worker that can lend.
_lender = None


def can_lend() -> bool:
  """Returns whether the system has what is lent; Linux alone."""
  return hasattr(os, "memfd_create")


def start_lending() -> None:
  """Lets `empty` give the memory of segments; for a worker, at its start.

  Nothing changes where there are none, or where the parent could not open them.
  """
  global _lender
  try:
    os.listdir(f"/proc/{parent_process().pid}/fd")
  except OSError:
    return
  if can_lend():
    _lender = _Lender()


def empty(shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
  """Returns an array to fill and to `lend`."""
  return _lender.empty(shape) if _lender else np.empty(shape, np.uint8)


def lend(array: UInt8[np.ndarray, "..."]) -> Lent | np.ndarray:
  """Returns what to send to the parent; the array itself if it is none of `empty`."""
  return _lender.lend(array) if _lender else array


class Borrower:
  """The parent's side."""

  def __init__(self):
    self._opened: dict[tuple[int, int], mmap.mmap] = {}

  def take(self, lent: Lent | np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Returns a copy of the array, whose memory the worker may then use again.

    Raises:
      Gone: the worker has ended.
    """
    if not isinstance(lent, Lent):
      return np.array(lent, subok=False)
    key = lent.process, lent.file
    if key not in self._opened:
      self._opened[key] = _open(lent)
    memory = self._opened[key]
    array = np.frombuffer(memory, np.uint8, math.prod(lent.shape))
    array = array.reshape(lent.shape).copy()
    memory[lent.capacity] = 0
    return array

  def close(self) -> None:
    """Lets go of the segments, whose workers have ended."""
    # Unmapped when nobody reads them any more.
    self._opened = {}


def _open(lent: Lent) -> mmap.mmap:
  path = f"/proc/{lent.process}/fd/{lent.file}"
  try:
    file = os.open(path, os.O_RDWR)
  except FileNotFoundError as error:
    raise Gone(path) from error
  try:
    return mmap.mmap(file, lent.capacity + 1)
  finally:
    os.close(file)
