"""JSON and JSON-lines files on a disk of this machine, and a disk that refuses."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import json
import os
import pathlib
import socket
from typing import Any, TextIO

from mcjepa_jax import errors


def check_writable(folder: pathlib.Path, key: str) -> None:
  """Makes the folder, and raises UserError if it cannot be written."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # Containers on many hosts have one process number.
    probe = folder / f".write_test.{socket.gethostname()}.{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise errors.UserError(
        f"{key}: cannot write {folder}: {error.strerror}"
    ) from error


@contextlib.contextmanager
def refusal_told(folder: pathlib.Path) -> Iterator[None]:
  """Raises UserError where the folder takes no more of what is written inside."""
  try:
    yield
  except OSError as error:
    # A write to an open file names none.
    ours = pathlib.Path(str(error.filename or "/")).is_relative_to(folder)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if not (ours or full):
      raise
    raise errors.UserError(
        f"workdir: cannot write {error.filename or folder}: {error.strerror};"
        " what was saved stays, and a run started again goes on from there"
    ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON in one move: a reader sees the old file or the new one."""
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  partial.write_text(json.dumps(value, indent=2, allow_nan=True) + "\n")
  partial.replace(path)


def append(path: pathlib.Path, line: Mapping[str, Any]) -> None:
  """Adds a line to a JSON-lines file that no resumed run shortens."""
  with path.open("a") as file:
    file.write(json.dumps(dict(line)) + "\n")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The complete lines of a JSON-lines file; a torn last one is left out."""
  if not path.exists():
    return []
  lines = []
  for line in path.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return lines


def reopen(path: pathlib.Path, step: int) -> TextIO:
  """A JSON-lines file to append to, without its lines from `step` on."""
  kept = [line for line in read_lines(path) if line["step"] < step]
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
  partial.replace(path)
  return path.open("a")
