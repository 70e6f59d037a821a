"""SIGTERM, and a step that hangs."""

from collections.abc import Callable, Iterator
import contextlib
import faulthandler
import itertools
import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from mcjepa_jax import errors

# How often this process asked whether to stop.
_asked = itertools.count(1)


@contextlib.contextmanager
def on_sigterm(
    handler: Callable[..., None], *, alone: bool = False
) -> Iterator[None]:
  """Calls `handler` on SIGTERM inside.

  Of many hosts JAX has its own, which ends all at one step; where each may end
  `alone`, the handler takes its place.
  """
  if jax.distributed.is_initialized() and not alone:
    yield
    return
  before = signal.signal(signal.SIGTERM, handler)
  try:
    yield
  finally:
    # None where JAX's own was there: nothing asks it any more.
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def stopping(stop: threading.Event) -> bool:
  """Whether to stop before this step, on SIGTERM to any host.

  All hosts ask as often, and all hear it at the same step.
  """
  if jax.process_count() == 1 or stop.is_set():
    return stop.is_set()
  # Of a SIGTERM before the first question JAX makes number 1 the last one, so
  # a resumed run's steps are no numbers to ask by.
  if multihost_utils.reached_preemption_sync_point(next(_asked)):
    stop.set()  # on all: JAX says so once
  return stop.is_set()


def stop_unsaved(*_: Any) -> None:
  """Handles SIGTERM where there is nothing new to save."""
  raise errors.Stop(
      errors.EXIT_PREEMPTED,
      "SIGTERM outside of the steps: what is saved is all there is",
  )


def stopped(step: int) -> errors.Stop:
  """Returns what ends a run by SIGTERM, once it is saved at a step."""
  return errors.Stop(errors.EXIT_PREEMPTED, f"SIGTERM: saved at step {step}")


class HangTimer:
  """Prints all threads' stacks when a step comes late, and again each time.

  A step that hangs does so on every host, and each prints its own to stderr.
  """

  def __init__(self, seconds: float):
    """Watches nothing before the first step, nor at 0 `seconds`."""
    self._seconds = seconds

  def step(self) -> None:
    """Begins a step, which ends the one before."""
    if self._seconds:
      faulthandler.dump_traceback_later(
          self._seconds, repeat=True, file=sys.__stderr__
      )

  def close(self) -> None:
    """Ends the last step."""
    faulthandler.cancel_dump_traceback_later()
