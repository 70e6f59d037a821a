"""Runs that are seeds of one, as markdown: mean and spread beside what is simpler.

  python -m benchmarks.seeds RESULTS.json RESULTS.json ...

Flow on each set and over all their pairs, in pixels, and what else has an
untrained twin, in percent: the mean of the runs and their standard deviation
(n - 1), also where training does not help.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
import statistics
import sys

from mcjepa_jax import compare, errors
from mcjepa_jax.runtime import command_line

_FLOW = {
    "ours": "epe",
    "untrained": "epe_random_init",
    "zero": "epe_zero",
    "pair's constant": "epe_pair_constant",
    "Farneback": "epe_farneback",
    "DIS": "epe_dis",
}
_TWINS = {
    "ours": "",
    "untrained": "_random_init",
    "pixels": "_pixels",
    "first mask stays": "_copy_first",
}

Results = Mapping[str, float]


def spread(values: Sequence[float]) -> str:
  """Mean and standard deviation; one figure where all are the same."""
  mean, std = statistics.fmean(values), statistics.stdev(values)
  return f"{mean:.2f} ± {std:.2f}" if std else f"{mean:.2f}"


def pairs_mean(results: Results, metric: str) -> float:
  """A flow metric over the pairs of all sets."""
  rows = [
      (results[f"{key.rpartition('/')[0]}/{metric}"], count)
      for key, count in results.items()
      if key.startswith("flow/") and key.endswith("/count")
  ]
  return sum(x * n for x, n in rows) / sum(n for _, n in rows)


def table(
    heads: Sequence[str],
    rows: Mapping[str, Sequence[Callable[[Results], float] | None]],
    runs: Sequence[Results],
) -> list[str]:
  """The lines: a name, then what each function gives of the runs."""
  lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
  for name, functions in rows.items():
    cells = [spread([f(run) for run in runs]) if f else "" for f in functions]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return lines


def tables(runs: Sequence[Results]) -> str:
  """Both tables, of what all runs have."""
  shared = set.intersection(*map(set, runs))
  sets = [
      key.rpartition("/")[0]
      for key in runs[0]
      if key.startswith("flow/") and key.endswith("/epe") and key in shared
  ]
  flow = {
      name: [lambda run, k=f"{name}/{m}": run[k] for m in _FLOW.values()]
      for name in sets
  }
  flow["all pairs"] = [
      lambda run, m=metric: pairs_mean(run, m) for metric in _FLOW.values()
  ]
  rest = {
      key.removesuffix("_random_init"): None
      for key in runs[0]
      if key.endswith("_random_init")
      and not key.startswith("flow/")
      and "/learning_rate" not in key  # what was chosen, no result
      and key in shared
  }
  content = {
      key: [
          (lambda run, k=key + end: run[k]) if key + end in shared else None
          for end in _TWINS.values()
      ]
      for key in rest
  }
  return "\n".join(
      [*table([*_FLOW], flow, runs), "", *table([*_TWINS], content, runs)]
  )


def main(argv: Sequence[str]) -> int:
  """Prints the tables."""

  def body():
    if len(argv) < 2:
      raise errors.UserError(f"expected RESULTS.json twice or more, got {argv}")
    print(tables([compare.read(pathlib.Path(file)) for file in argv]))

  return command_line.guarded(body, debug=False)


if __name__ == "__main__":
  raise SystemExit(main(sys.argv[1:]))
