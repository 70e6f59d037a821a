"""Checkpoints in WORKDIR/checkpoints/STEP: train state, data streams, meta.

A checkpoint is atomic: one that was not written to its end is never listed,
chosen or restored. A PATH is a workdir, its checkpoints folder, or one step in
it; the first two mean the newest complete step.
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

from etils import epath
import jax
from jax import numpy as jnp
from jax._src import distributed
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp

from mcjepa_jax.errors import Passing, UserError
from mcjepa_jax.storage import paths

_FOLDER = "checkpoints"
_SHOWN = 4
_PARTIAL = ".orbax-checkpoint-tmp"
# What damaged or missing files raise: tensorstore has no error class.
_STORAGE_ERRORS = (OSError, ValueError, KeyError)
# Of these a background write that fails tells the text alone.
_REFUSALS = tuple(
    os.strerror(n)
    for n in (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    )
)
_REFUSALS += ("UNAVAILABLE", "PERMISSION_DENIED", "DEADLINE_EXCEEDED")  # gs://
_policies = ocp.checkpoint_managers


def _absolute(path: str | os.PathLike) -> epath.Path:
  text = os.fspath(path)
  if "://" in text:
    paths.prepare(text)
    return epath.Path(text)
  return epath.Path(os.path.abspath(text))


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _on_devices(abstract: Any) -> Any:
  """Returns the shapes, each with a sharding: its own, or one device."""
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=x.sharding or one
      ),
      abstract,
  )


def _steps(folder: epath.Path) -> list[int]:
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def begun(workdir: str | os.PathLike) -> bool:
  """Returns whether a run has come to the point where it may save."""
  return (_absolute(workdir) / _FOLDER).exists()


def newest_step(workdir: str | os.PathLike) -> int | None:
  """Returns the newest step of which a workdir has a complete checkpoint."""
  return max(_steps(_absolute(workdir) / _FOLDER), default=None)


def locate(path: str | os.PathLike) -> epath.Path:
  """Returns the folder of one complete step.

  Raises:
    UserError: there is none at the path.
  """
  folder = _absolute(path)
  if not folder.exists():
    raise UserError(f"checkpoint {folder} does not exist")
  if folder.name.isdigit() and int(folder.name) in _steps(folder.parent):
    return folder
  if (folder / _FOLDER).is_dir():
    folder = folder / _FOLDER
  steps = _steps(folder)
  if not steps:
    raise UserError(
        f"{folder} holds no complete checkpoint: expected a workdir, its "
        f"{_FOLDER} folder or one step in it"
    )
  return folder / str(steps[-1])


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
  """Returns what was saved as `meta`, and its "step"."""
  return _read(
      locate(path),
      "meta",
      ocp.JsonCheckpointHandler(),
      ocp.args.JsonRestore(),
  )


def restore_params(path: str | os.PathLike, abstract_params: Any) -> Any:
  """Returns the parameters alone, whatever the optimizer was.

  Args:
    path: a workdir, its checkpoints folder, or one step in it.
    abstract_params: shapes, with shardings or for one device; may leave out
      whole entries of the saved tree's first level.

  Raises:
    UserError: no checkpoint, or one of another architecture.
  """
  step = locate(path)
  check_params(step, abstract_params)
  abstract = {"params": _on_devices(abstract_params)}
  return _read(
      step,
      "state",
      ocp.PyTreeCheckpointHandler(),
      ocp.args.PyTreeRestore(
          abstract,
          restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
          partial_restore=True,
      ),
  )["params"]


def check_params(path: str | os.PathLike, abstract_params: Any) -> None:
  """Raises what `restore_params` would of a checkpoint that has not these."""
  _check_architecture(
      locate(path),
      {"params": abstract_params},
      within=tuple(f"params/{group}" for group in abstract_params),
  )


def check_finite(path: str | os.PathLike, params: Any) -> None:
  """Raises UserError where parameters are NaN or infinite: none is measurable."""
  whole = jax.jit(
      lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)
  )
  bad = [
      _name(at)
      for at, finite in jax.tree_util.tree_flatten_with_path(whole(params))[0]
      if not finite
  ]
  if bad:
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise UserError(
        f"checkpoint {path}: expected finite parameters, got NaN or infinity in"
        f" {', '.join(bad[:_SHOWN])}{more}"
    )


def _read(step: epath.Path, item: str, handler: Any, args: Any) -> Any:
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      return checkpointer.restore(step / item, args=args)
  except _STORAGE_ERRORS as error:
    raise _unreadable(step, error) from error


def _unreadable(step: epath.Path, error: Exception) -> UserError:
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  reason = reason.split(" [tensorstore_spec")[0]
  *_, before, newest = [None, None, *_steps(step.parent)]
  if before is not None and step.name == str(newest):
    reason += f"; without its folder step {before} is the newest"
  return UserError(f"checkpoint {step} cannot be read: {reason}")


def _describe(leaf: Any) -> str:
  if leaf is None:
    return "nothing"
  return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _check_architecture(
    step: epath.Path, abstract: Any, *, within: tuple[str, ...] = ("",)
) -> None:
  """Raises UserError if the checkpoint's arrays are not those of `abstract`."""
  try:
    saved = ocp.PyTreeCheckpointHandler().metadata(step / "state").tree
  except _STORAGE_ERRORS as error:
    raise _unreadable(step, error) from error
  found = {
      _name(path): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(saved)[0]
      if any(_name(path[: w.count("/") + 1]) == w or not w for w in within)
  }
  expected = {
      _name(path): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
  }
  differences = [
      f"{name} is {_describe(found.get(name))}, "
      f"expected {_describe(expected.get(name))}"
      # Parameters before the optimizer's copies of them.
      for name in sorted(
          found.keys() | expected.keys(),
          key=lambda name: (not name.startswith("params/"), name),
      )
      if _describe(found.get(name)) != _describe(expected.get(name))
  ]
  if differences:
    more = len(differences) - _SHOWN
    raise UserError(
        f"checkpoint {step} is of another architecture: "
        + "; ".join(differences[:_SHOWN])
        + (f"; and {more} more" if more > 0 else "")
    )


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
    self._folder = _absolute(workdir) / _FOLDER
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      if "://" not in str(self._folder):
        tempfile.TemporaryFile(dir=self._folder).close()
    except OSError as error:
      raise UserError(
          f"workdir {_absolute(workdir)} cannot be written: {error.strerror}"
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
    except _STORAGE_ERRORS as error:  # it reads the metrics of each
      raise _unreadable(self._folder, error) from error
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
      raise (Passing if remote else UserError)(
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
      steps = _steps(self._folder)
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
    path = locate(self._folder / str(step))
    abstract = _on_devices(abstract_state)
    _check_architecture(path, abstract)
    try:
      restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
              state=ocp.args.StandardRestore(abstract),
              streams=ocp.args.JsonRestore(),
              meta=ocp.args.JsonRestore(),
          ),
      )
    except _STORAGE_ERRORS as error:
      raise _unreadable(path, error) from error
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
