"""Checkpoints in WORKDIR/checkpoints/STEP: train state, data streams, meta.

A checkpoint is atomic: one that was not written to its end is never listed,
chosen or restored.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import errno
import functools
import itertools
import math
import os
import shutil
import sys
import tempfile
import threading
from typing import Any

import jax
from jax import numpy as jnp
from jax._src import distributed
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from mcjepa_jax.errors import TransientError, UserError
from mcjepa_jax.storage import checkpoint_reader

_PARTIAL = ".orbax-checkpoint-tmp"
# A background write that fails tells the text of these errors alone.
_REFUSALS = tuple(
    os.strerror(n)
    for n in (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    )
)
_REFUSALS += ("UNAVAILABLE", "PERMISSION_DENIED", "DEADLINE_EXCEEDED")  # gs://
_policies = ocp.checkpoint_managers


@jax.jit
def _copies(state: Any) -> Any:
  return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copies_into(old: Any, state: Any) -> Any:
  """The copies of a state, in the memory of copies that were made before."""
  del old
  return _copies(state)


# Of the objects below, the same on all hosts.
_numbers = itertools.count()


class Checkpoints:
  """Writes and restores the checkpoints of the one job that owns a workdir."""

  def __init__(
      self,
      workdir: str | os.PathLike,
      *,
      keep_last: int = 1,
      keep_hours: float = 0.0,
      keep_best: int = 0,
      metric: str = "loss",
      larger_is_better: bool = False,
  ):
    """Opens or makes WORKDIR/checkpoints and removes what a crash left there.

    Args:
      workdir: folder of the run.
      keep_last: how many of the newest steps stay.
      keep_hours: besides, the first and one each so many hours stay; 0 is none.
      keep_best: how many of the best steps by `metric` stay besides.
      metric: name in the metrics given to `save`; a step without it, or with a
        value that is not finite, is never among the best.
      larger_is_better: what "best" means.

    Raises:
      UserError: the folder cannot be made or written.
    """
    self._folder = (
        checkpoint_reader.absolute(workdir) / checkpoint_reader.FOLDER
    )
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      if "://" not in str(self._folder):
        tempfile.TemporaryFile(dir=self._folder).close()
    except OSError as error:
      raise UserError(
          f"workdir {checkpoint_reader.absolute(workdir)} cannot be written:"
          f" {error.strerror}"
      ) from error

    def goodness(metrics: Mapping[str, float]) -> float:
      value = metrics.get(metric, math.nan)
      if not math.isfinite(value):
        return -math.inf
      return value if larger_is_better else -value

    keep = [_policies.LatestN(keep_last)]
    if keep_hours:
      keep.append(_policies.EveryNSeconds(3600 * keep_hours))
    if keep_best:
      keep.append(
          _policies.BestN(
              get_metric_fn=goodness,
              n=keep_best,
              keep_checkpoints_without_metrics=False,
          )
      )
    self._copied: Any = None  # on CPUs: the state that was saved last
    # Orbax waits for the arrays before a save returns. Of the copies on CPUs it
    # does so in a thread, beside the run; not of several hosts', who must all do
    # one thing after the other.
    self._thread = None
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
      self._thread = futures.ThreadPoolExecutor(max_workers=1)
    self._begun: futures.Future[Any] | None = None  # a save, in the thread
    self._awaited = False  # whether a save's end was not waited for yet
    self.failures = 0  # saves that failed since the last that did not
    self._number = next(_numbers)
    self._part_failed = False  # of several hosts, this one's
    among = None
    if jax.process_count() > 1:
      among = ocp.AsyncOptions(barrier_sync_fn=self._wait_for_others)
    try:
      self._manager = ocp.CheckpointManager(
          self._folder,
          options=ocp.CheckpointManagerOptions(
              preservation_policy=_policies.AnyPreservationPolicy(keep),
              # Without it Orbax writes no metrics, and forgets on restart which
              # steps were the best.
              best_fn=goodness,
              cleanup_tmp_directories=True,
              async_options=among,
          ),
      )
    # It reads the metrics of each.
    except checkpoint_reader.STORAGE_ERRORS as error:
      raise checkpoint_reader.unreadable(self._folder, error) from error
    # JAX answers by the largest number that it was asked with, which has to be
    # the run's own: Orbax asks with training steps.
    self._manager.reached_preemption = lambda step: False

  @contextlib.contextmanager
  def _written(self) -> Iterator[None]:
    """Raises UserError for what a disk that takes no more raises inside."""
    remote = "://" in str(self._folder)
    kinds = (OSError, ValueError, jax.errors.JaxRuntimeError)
    if remote:  # what a bucket's clients raise has no class in common
      kinds = (Exception,)
    try:
      yield
    except kinds as error:
      reason = next((x for x in _REFUSALS if x in str(error)), None)
      # Of several hosts each waits for what the others write.
      of_jax = isinstance(error, jax.errors.JaxRuntimeError)
      if isinstance(error, TimeoutError) or (
          of_jax and reason == "DEADLINE_EXCEEDED"
      ):
        reason = "not every host has written its part in time"
      if reason is None and isinstance(error, OSError):
        reason = error.strerror or str(error)
      if reason is None and remote:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
      if reason is None:
        raise
      self.failures += 1
      left = self._left()
      raise (TransientError if remote else UserError)(
          f"a checkpoint in {self._folder} cannot be written: {reason}; {left}"
      ) from error

  def _wait_for_others(self, *, key: str, timeout_ms: int) -> None:
    """Waits at a barrier of a save's, unless this host's part of it has failed.

    Orbax would have it wait for the others first, and these wait for it.
    """
    # In the thread that ends a save: an exception on its way through Orbax.
    aside = threading.current_thread() is not threading.main_thread()
    if aside and (error := sys.exception()):
      self._part_failed = True
      raise error
    # A dump may be written beside a checkpoint.
    distributed.global_state.client.wait_at_barrier(
        f"{self._number}/{key}", timeout_ms
    )

  def _left(self) -> str:
    """What there is after a save that failed."""
    try:
      steps = checkpoint_reader.complete_steps(self._folder)
    except Exception:  # of a bucket: it refuses that as well
      return "what was there before stays"
    return f"step {steps[-1]} stays" if steps else "there is none before it"

  def _drop_partial(self) -> None:
    """Makes room of what a failed write left; one that goes on, next time."""
    if jax.process_index() == 0 and "://" not in str(self._folder):
      for path in self._folder.iterdir():
        if path.name.endswith(_PARTIAL):
          shutil.rmtree(path, ignore_errors=True)

  def latest_step(self) -> int | None:
    """Returns the newest step, if there is one; one that is being written counts.

    Raises:
      UserError: the last save could not begin.
    """
    self._join()
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """Returns the steps in order, and raises, as `latest_step`."""
    self._join()
    return sorted(self._manager.all_steps())

  def go_back(self, step: int) -> int | None:
    """Deletes what is newer than a step; returns the newest that is left.

    The oldest one stays, however new it is.
    """
    self._copied = None  # its memory is wanted for what is restored
    self._join()
    # A save that failed has taken off the list what it was to replace.
    self._manager.reload()
    steps = self.all_steps()
    if jax.process_count() > 1:  # all have listed what all are to delete
      multihost_utils.sync_global_devices("go_back")
    for newer in steps[1:]:
      if newer > step:
        self._manager.delete(newer)
    return self.latest_step()

  def make_room(self, state: Any) -> None:
    """Takes the memory that saves of such a state need, which holds up a run."""
    if jax.default_backend() == "cpu":
      for _ in range(2):  # the second compiles how a copy takes its place
        self._apart(state)

  def _apart(self, state: Any) -> Any:
    """Returns the state where no step that it is donated to writes.

    A CPU's arrays are written from the memory that they have, and a step that
    takes it would wait for the write. The copy stays for the next save, whose
    copy takes its place: clearing new pages takes five times as long.
    """
    old = self._copied
    if jax.tree.map(jnp.shape, old) == jax.tree.map(jnp.shape, state):
      self._copied = _copies_into(old, state)
    else:
      self._copied = _copies(state)
    return self._copied

  def save(
      self,
      step: int,
      state: Any,
      streams: Mapping[str, Any],
      meta: Mapping[str, Any],
      metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts to write a step; returns False if the step is there already.

    When it returns the state may be donated. Waits for the save before; what that
    one failed with is raised once this one has begun. `streams` and `meta` are
    written as JSON: tuples come back as lists.
    """
    failed = None
    try:
      self.wait_until_finished()
    except UserError as error:
      failed = error
    if step in self.all_steps():
      if failed is not None:
        raise failed
      return False
    self._drop_partial()
    if jax.default_backend() == "cpu":
      state = self._apart(state)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        streams=ocp.args.JsonSave(dict(streams)),
        meta=ocp.args.JsonSave({**meta, "step": step}),
    )

    def begin():
      with self._written():
        # The caller decides when; Orbax would refuse a step below its newest.
        return self._manager.save(
            step, args=args, metrics=dict(metrics or {}), force=True
        )

    begun = True
    if self._thread is None:
      begun = begin()
    else:
      self._begun = self._thread.submit(begin)
    self._awaited = True
    if failed is not None:
      raise failed
    return begun

  def _join(self) -> None:
    """Waits until the save under way has begun; raises what kept it from that."""
    if self._begun is None:
      return
    try:
      self._begun.result()
    except UserError:
      self._awaited = False
      raise
    finally:
      if self._begun.done():  # not where the wait is interrupted
        self._begun = None

  def _there(self, function: Callable[[], None]) -> None:
    """Calls where saves are begun: Orbax tells each thread of an error once."""
    if self._thread is None:
      function()
    else:
      self._thread.submit(function).result()

  def restore(
      self, step: int, abstract_state: Any
  ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Returns (state, streams, meta), the state in the given shardings.

    Raises:
      UserError: the step is not there, cannot be read, or is of another
        architecture, which is found before anything is loaded.
    """
    path = checkpoint_reader.locate(self._folder / str(step))
    abstract = checkpoint_reader.on_devices(abstract_state)
    checkpoint_reader.check_architecture(path, abstract)
    try:
      restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
              state=ocp.args.StandardRestore(abstract),
              streams=ocp.args.JsonRestore(),
              meta=ocp.args.JsonRestore(),
          ),
      )
    except checkpoint_reader.STORAGE_ERRORS as error:
      raise checkpoint_reader.unreadable(path, error) from error
    return restored["state"], restored["streams"], restored["meta"]

  def wait_until_finished(self) -> None:
    """Waits for the save under way; raises what it failed with."""
    awaited, self._awaited = self._awaited, False
    self._join()
    with self._written():
      self._there(self._manager.wait_until_finished)
    if awaited:
      self.failures = 0

  def check_errors(self) -> None:
    """Raises, once, what the last save has failed with; waits for nothing."""
    if not self._awaited:  # each step asks
      return
    if self._begun is not None:
      if not self._begun.done():
        return
      if self._begun.exception():  # Orbax takes that save for one under way
        self.wait_until_finished()
    # The manager's own check finds nothing: the thread that ends a save took it.
    if self._part_failed or not self._manager.is_saving_in_progress():
      self.wait_until_finished()

  def close(self) -> None:
    """Waits as above, and ends the background threads."""
    try:
      self.wait_until_finished()
    finally:
      try:
        self._there(self._manager.close)
      finally:
        if self._thread is not None:
          self._thread.shutdown()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    try:
      self.close()
    except UserError as fault:
      if error is None:
        raise
      # What ends the run keeps its exit code.
      print(f"warning: {fault}", file=sys.stderr)
