"""What a running stream tells of its workers: their rate, and their death."""

import math
import multiprocessing
import os
import signal
import time

import cv2
import numpy as np
import pytest

from mcjepa_jax.data.pipeline import batches, shared_memory
from mcjepa_jax.errors import UserError


class Slow:
  """Images that take a while, and tell the threads of the worker's OpenCV."""

  def __init__(self, seconds: float = 0.0):
    self._seconds = seconds

  def __len__(self) -> int:
    return 1000

  def record_id(self, index: int) -> str:
    return str(index)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    time.sleep(self._seconds)
    return {"image": np.full((16, 16, 3), cv2.getNumThreads(), np.uint8)}


def content(*, seconds: float = 0.0, size: int = 16, num_workers: int = 0):
  source = batches.ContentSource("images", Slow(seconds))
  return batches.content_stream(
      [source], size=size, batch_size=2, seed=0, num_workers=num_workers
  )


def test_rate_is_that_of_making_batches_not_of_taking_them():
  with content(seconds=0.02) as stream:
    assert math.isnan(stream.rate())
    for _ in range(3):
      next(stream)
    time.sleep(0.3)
    next(stream)
    # Two images of 20 ms each, less what a busy machine adds.
    assert 0 < stream.rate() < 25


def test_a_worker_starts_no_threads_of_opencv():
  with content(num_workers=1) as stream:
    arrays = next(stream).arrays
    assert (arrays["views"] == 1).all()
    assert len(stream._borrower._opened) == shared_memory.can_lend()
    assert stream.rate() > 0


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_an_error():
  before = set(multiprocessing.active_children())
  with content(size=300, num_workers=1) as stream:
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - before
    time.sleep(1)
    os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"content .*{worker.pid}.*SIGKILL"):
      for _ in range(100):
        next(stream)
    assert time.monotonic() - start < 30
