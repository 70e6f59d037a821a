"""The results of evals as a table."""

from collections.abc import Mapping
from typing import Any

# In results: the evals of which there are none, and why.
NOT_EVALUATED = "meta/not_evaluated"


def table(results: Mapping[str, Any]) -> str:
  """The results as aligned lines.

  Without those of single examples and classes, and without silent alarms.
  """
  rows = [
      (key, f"{value:.3f}" if isinstance(value, float) else str(value))
      for key, value in results.items()
      if key.count("/") < 3 and (value or not key.startswith("alarm/"))
  ]
  width = max(len(key) for key, _ in rows)
  return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)
