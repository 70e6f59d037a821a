"""What the benchmarks print, and how they end: rows as JSON, an exit code."""

from collections.abc import Mapping, Sequence
import json
import pathlib
import sys
from typing import Any

import tqdm


def show(
    row: Mapping[str, Any], *, first: bool, widths: tuple[int, int]
) -> None:
  """Prints a row in columns, above any bar; the `first` below its keys."""
  for cells in [row, row.values()] if first else [row.values()]:
    name, *rest = cells
    line = f"{name:{widths[0]}}"
    tqdm.tqdm.write(line + "".join(f"{cell:>{widths[1]}}" for cell in rest))


def end(
    path: str | None,
    meta: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    failed: bool,
) -> None:
  """Writes {meta, rows} to `path`, if there is one; exits 1 if `failed`."""
  if path:
    text = json.dumps({"meta": meta, "rows": rows}, indent=2)
    pathlib.Path(path).write_text(text + "\n")
  if failed:
    sys.exit(1)
