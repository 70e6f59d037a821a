"""Batches out of worker processes: the iterator that a run reads.

It goes on from any batch, tells how fast its workers are, and ends the run when
one of them dies.
"""

import collections
from collections.abc import Iterator
from concurrent import futures
import ctypes
import math
from multiprocessing import active_children, connection, parent_process
import os
import signal
import statistics
import threading
import time
from typing import Any, NamedTuple
import weakref

import cv2
import grain
from jaxtyping import UInt8
import numpy as np

from mcjepa_jax.data.pipeline import shared_memory
from mcjepa_jax.errors import TransientError, UserError

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

# Seconds without a batch after which a dead worker is what is waited for.
_PATIENCE = 5.0

Arrays = dict[str, UInt8[np.ndarray, "n h w 3"]]


class TaskBatch(NamedTuple):
  """This host's rows of a batch."""

  arrays: Arrays
  records: list[str]  # each pair or image that was read
  faults: list[tuple[str, str]]  # (record, fault) of those that were replaced


def _keep_memory() -> None:
  """Lets glibc's malloc keep freed memory for the next array; others go on.

  It would return each image and batch to the kernel, and the pages that the
  kernel then clears anew take as long as all the work: 1.9 ms of CPU a 512x384
  pair instead of 0.9, measured on a virtual machine.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _start_worker(worker_index: int, worker_count: int) -> None:
  """Ends a Grain worker with its parent, and leaves signals to the parent.

  A worker is one thread: OpenCV's own would take turns with other workers.

  SIGTERM goes to a whole job at once, and the parent needs its workers until it
  has saved.

  A worker whose parent was killed would wait for room in its queue for ever.
  """
  del worker_index, worker_count
  cv2.setNumThreads(0)
  _keep_memory()
  shared_memory.start_lending()
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  def watch():
    connection.wait([parent_process().sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


# Iterators that wait for what a dead worker did not send.
_ABANDONED = []


def _end(iterators: list[grain.DatasetIterator]) -> None:
  while iterators:
    iterators.pop().close()


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
  if isinstance(tree, dict):
    items = [(f"{path}.{k}" if path else k, v) for k, v in tree.items()]
  elif isinstance(tree, list):
    items = [(f"{path}[{i}]", v) for i, v in enumerate(tree)]
  else:
    return {path: tree}
  return {k: v for item in items for k, v in _flatten(item[1], item[0]).items()}


class _Timed:
  """Batches, lent by a worker, with the seconds that making them took."""

  def __init__(self, batches: grain.MapDataset):
    self._batches = batches

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, index: int) -> tuple[TaskBatch, float]:
    start = time.perf_counter()
    part = self._batches[index]
    arrays = {
        key: shared_memory.lend(array) for key, array in part.arrays.items()
    }
    return part._replace(arrays=arrays), time.perf_counter() - start


class Stream(Iterator):
  """Iterates over the parts of this host from any batch on.

  `stream[k]` is batch k, computed in this process. Workers start with the first
  `next`, or before it with `start`.
  """

  def __init__(
      self,
      batches: grain.MapDataset,
      fingerprint: dict[str, Any],
      *,
      start: int = 0,
      num_workers: int = 0,
      prefetch: int = 2,
  ):
    """Describes the iteration; nothing runs yet.

    Args:
      batches: element k is the part of batch k.
      fingerprint: what the order of the data depends on, as JSON.
      start: index of the first batch.
      num_workers: processes, each making whole batches; 0 for one thread.
      prefetch: batches that wait in the queue of each worker.
    """
    self._batches = batches
    self._fingerprint = fingerprint
    self._next_batch = start
    self._num_workers = num_workers
    self._prefetch = prefetch
    # The iterator, once it runs, and its processes.
    self._running = []
    self._workers = []
    self._borrower = shared_memory.Borrower()
    # Of the last batches.
    self._seconds = collections.deque(maxlen=32)
    # Also at exit: an iterator that outlives the modules that it uses ends in
    # tracebacks on stderr.
    weakref.finalize(self, _end, self._running)

  def __getitem__(self, index: int) -> TaskBatch:
    return self._batches[index]

  def __next__(self) -> TaskBatch:
    self.start()
    part, seconds = self._wait() if self._workers else self._take()
    self._next_batch += 1
    self._seconds.append(seconds)
    return part

  def rate(self) -> float:
    """Returns the batches a second that the workers make; NaN before the first.

    Of the last batches that `next` returned, whether or not it waited for them;
    without the time that a worker takes to send one.
    """
    if not self._seconds:
      return math.nan
    return max(1, self._num_workers) / statistics.median(self._seconds)

  def _take(self) -> tuple[TaskBatch, float]:
    """Returns the next batch, out of the memory that it shares."""
    part, seconds = next(self._running[0])
    arrays = {k: self._borrower.take(v) for k, v in part.arrays.items()}
    return part._replace(arrays=arrays), seconds

  def _wait(self) -> tuple[TaskBatch, float]:
    """Returns the next batch, or raises TransientError for a worker that died.

    Grain would wait for ever where a worker dies within sending a batch, which
    is most of the time where the batches go through pipes.
    """
    batch = futures.Future()

    def get():
      try:
        batch.set_result(self._take())
      except BaseException as error:
        batch.set_exception(error)

    # No executor: its threads are waited for at exit.
    threading.Thread(target=get, daemon=True).start()
    while not futures.wait([batch], _PATIENCE).done and not self._died():
      pass
    if batch.done() and isinstance(batch.exception(), shared_memory.Gone):
      # A process that is being killed loses its files first.
      deadline = time.monotonic() + _PATIENCE
      while not self._died() and time.monotonic() < deadline:
        time.sleep(0.01)
    if batch.done() and not (batch.exception() and self._died()):
      return batch.result()
    if not batch.done():
      # Closing it would wait for the same bytes; at exit Grain ends what is
      # left without.
      _ABANDONED.append(self._running.pop())
    raise TransientError(
        f"a worker of the {self._fingerprint['stream']} stream died: "
        f"{self._died()}; SIGKILL is the kernel's where memory runs out: fewer "
        "workers, or a smaller batch, need less"
    )

  def _died(self) -> str:
    """Names the workers that ended by themselves; an empty string if none."""
    return ", ".join(
        f"process {worker.pid} ended with "
        + (
            signal.Signals(-worker.exitcode).name
            if worker.exitcode < 0
            else f"exit code {worker.exitcode}"
        )
        for worker in self._workers
        if worker.exitcode
    )

  def start(self) -> None:
    """Starts the workers, if they do not run yet."""
    if self._running:
      return
    others = set(active_children())
    # Batches have random access: going on from batch k is slicing off the k
    # first, whereas the state of Grain's own iterator holds the number of
    # workers.
    batches = grain.MapDataset.source(_Timed(self._batches[self._next_batch :]))
    threads = 0 if self._num_workers else 1
    dataset = batches.to_iter_dataset(
        grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=threads * self._prefetch
        )
    )
    if self._num_workers:
      if shared_memory.can_lend():
        # What is not lent goes through pipes: /dev/shm may be small.
        dataset = grain.experimental.WithOptionsIterDataset(
            dataset, grain.experimental.DatasetOptions(min_shm_size=2**62)
        )
      dataset = dataset.mp_prefetch(
          grain.MultiprocessingOptions(
              num_workers=self._num_workers,
              per_worker_buffer_size=self._prefetch,
          ),
          worker_init_fn=_start_worker,
      )
    iterator = iter(dataset)
    # Makes the iterators of the workers, which else wait for the first `next`.
    iterator.get_state()
    iterator.start_prefetch()
    self._running.append(iterator)
    # Threads of Grain start them, in milliseconds.
    deadline = time.monotonic() + _PATIENCE
    while len(self._workers) < self._num_workers:
      self._workers = list(set(active_children()) - others)
      if time.monotonic() > deadline:
        break
      time.sleep(0.01)

  def state(self) -> dict[str, Any]:
    """Returns, as JSON, the position of the batch that `next` returns next.

    A caller that queues batches keeps with each the state from before it.
    """
    return {"next_batch": self._next_batch, "fingerprint": self._fingerprint}

  def restore(self, state: dict[str, Any]) -> None:
    """Moves to the position of a state, under any number of workers and hosts.

    Raises:
      UserError: the state is of a stream of other data, seed or sizes.
    """
    saved = _flatten(state["fingerprint"])
    ours = _flatten(self._fingerprint)
    changes = [
        f"{key} was {saved.get(key, 'absent')}, is {ours.get(key, 'absent')}"
        for key in sorted(saved.keys() | ours.keys())
        if saved.get(key) != ours.get(key)
        # A checkpoint of an older version has none.
        and (key in saved or not key.endswith(".digest"))
    ]
    if changes:
      raise UserError(
          f"the {self._fingerprint['stream']} data of the checkpoint differ "
          f"from those of this run: {'; '.join(changes)}"
      )
    self.close()
    self._next_batch = state["next_batch"]

  def close(self) -> None:
    """Ends the workers; a later `next` starts new ones."""
    _end(self._running)
    self._borrower.close()
    self._workers.clear()

  def __enter__(self) -> "Stream":
    return self

  def __exit__(self, *exception) -> None:
    self.close()
