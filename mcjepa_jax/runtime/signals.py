"""SIGTERM, and a step that hangs.

A training hears SIGTERM in three ways. Between its steps it asks `stopping`, and
the step that hears it saves. An evaluation on the way ends by `until_sigterm`.
Where there is nothing new to save, `stop_unsaved` ends the process at once.
"""

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


class _Interrupted(BaseException):
  """SIGTERM, where it ends what is done: no fault of a file or of an eval."""


@contextlib.contextmanager
def until_sigterm(stop: threading.Event) -> Iterator[None]:
  """Has SIGTERM end what is done inside; `stop` is set then.

  Of many hosts, which have to end at one step, it ends nothing inside.
  """

  def interrupt(*_):
    stop.set()
    raise _Interrupted

  with contextlib.suppress(_Interrupted), on_sigterm(interrupt):
    yield


def stop_on_sigterm(
    stop: threading.Event,
) -> contextlib.AbstractContextManager[None]:
  """Has SIGTERM set `stop`, for which the loop asks by `stopping`."""
  return on_sigterm(lambda *_: stop.set())


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
