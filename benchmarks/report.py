"""How the benchmarks end: rows as JSON, and an exit code."""

from collections.abc import Mapping, Sequence
import json
import pathlib
import sys
from typing import Any


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
