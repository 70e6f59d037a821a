"""The logs of a run: numbers, records, pictures and replaced records."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib

from jaxtyping import UInt8
import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.runtime import tensorboard, visualize
from mcjepa_jax.storage import local_files

_FEW_RECORDS = 1_000
_NAMED = 10  # bad records in an error


def save_picture(
    workdir: pathlib.Path, name: str, image: UInt8[np.ndarray, "h w 3"]
) -> None:
  """Writes WORKDIR/pictures/NAME.png."""
  visualize.save_png(workdir / "pictures" / f"{name}.png", image)


class Journal:
  """The logs of a workdir: metrics.jsonl, records.jsonl, TensorBoard, PNGs.

  Opened at a step, it drops lines from that step on: a run that resumes writes
  them again.
  """

  def __init__(
      self,
      workdir: pathlib.Path,
      *,
      step: int,
      records: bool,
      board: bool = True,
  ):
    self._workdir = workdir
    self._metrics = local_files.reopen(workdir / "metrics.jsonl", step)
    self._records = None
    if records:
      self._records = local_files.reopen(workdir / "records.jsonl", step)
    self._board = (
        tensorboard.EventFile(workdir / "tensorboard", step) if board else None
    )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Logs numbers of one step."""
    self._metrics.write(json.dumps({"step": step} | dict(values)) + "\n")
    self._metrics.flush()
    if self._board:
      # What is not finite has no place on a curve.
      finite = {name: x for name, x in values.items() if math.isfinite(x)}
      self._board.scalars(step, finite)

  def records(self, step: int, records: Mapping[str, list[str]]) -> None:
    """Logs which examples a step consumes, where the config asks for it."""
    if self._records is not None:
      self._records.write(json.dumps({"step": step} | dict(records)) + "\n")
      self._records.flush()

  def picture(
      self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]
  ) -> None:
    """Logs a picture, also as WORKDIR/pictures/NAME.png (the newest)."""
    if self._board:
      self._board.picture(step, name, image)
    save_picture(self._workdir, name, image)

  def close(self) -> None:
    """Flushes all."""
    self._metrics.close()
    if self._records is not None:
      self._records.close()
    if self._board:
      self._board.close()


class Quarantine:
  """The records that were replaced, each named once in quarantine.jsonl.

  `limit` is the share of those drawn that may be; of fewer than 1,000 as of
  1,000. Opened at a step, it drops lines from that step on.
  """

  def __init__(self, workdir: pathlib.Path, *, step: int, limit: float):
    self._path = workdir / "quarantine.jsonl"
    self._file = local_files.reopen(self._path, step)
    self._limit = limit
    self._named: dict[str, dict[str, str]] = {}
    for line in local_files.read_lines(self._path):
      self._named.setdefault(line["task"], {})[line["record"]] = line["fault"]
    self._drawn: dict[str, int] = {}
    self._replaced: dict[str, int] = {}

  def add(
      self, step: int, task: str, drawn: int, faults: Sequence[tuple[str, str]]
  ) -> list[tuple[str, str]]:
    """Those of a step's faults, (record, fault), that are new.

    Raises:
      UserError: too many of the records drawn so far had to be replaced.
    """
    named, new = self._named.setdefault(task, {}), []
    for record, fault in faults:
      if record not in named:
        named[record] = fault
        new.append((record, fault))
        line = {"step": step, "task": task, "record": record, "fault": fault}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
    drawn = self._drawn[task] = self._drawn.get(task, 0) + drawn
    replaced = self._replaced[task] = self._replaced.get(task, 0) + len(faults)
    if replaced > self._limit * max(drawn, _FEW_RECORDS):
      raise errors.UserError(
          f"bad_records: expected at most {self._limit:.2%} of {task}'s records"
          f" to be unreadable, got {replaced} of {drawn}; see {self._path}",
          *(
              f"{record}: {fault}"
              for record, fault in [*named.items()][:_NAMED]
          ),
      )
    return new

  def counts(self) -> dict[str, float]:
    """How many records were replaced, by task, since the run began."""
    return {
        f"quarantined/{task}": float(len(named))
        for task, named in self._named.items()
    }

  def close(self) -> None:
    """Flushes all."""
    self._file.close()
