"""A run's flow on every pair with ground truth, as a markdown table.

  python -m benchmarks.flow_table RESULTS.json [METRICS.jsonl]

One line a pair: EPE of the run, of zero flow, of the pair's best constant, of
Farneback and of DIS; then on how many pairs the run is below the constant, and
its mean beside zero flow's. With the log of the run also its features' std, how
much of zero flow's photometric error is left, and the evals over the steps.
"""

import json
import pathlib
import sys

import numpy as np

_METRICS = ("epe", "epe_zero", "epe_pair_constant", "epe_farneback", "epe_dis")
_MONITORS = (
    "feature_std/stride_2",
    "feature_std/stride_4",
    "feature_std/stride_8",
    "feature_std/stride_16",
    "feature_std/stride_32",
    "feature_std/pooled",
    "feature_std/embedding",
    "flow/mean_magnitude",
    "flow/zero_ratio",
)


def pairs_table(results: dict) -> str:
  """The lines of the pairs, and what they come to."""
  pairs = sorted(
      key.rsplit("/", 1)[0]
      for key in results
      if key.startswith("flow/")
      and key.count("/") == 3
      and key.endswith("/epe")
  )
  rows = {p: [results[f"{p}/{m}"] for m in _METRICS] for p in pairs}
  lines = [
      "| pair | ours | zero | pair's constant | Farneback | DIS |",
      "|---|---|---|---|---|---|",
  ]
  for pair, values in rows.items():
    cells = " | ".join(f"{value:.2f}" for value in values)
    lines.append(f"| {pair.removeprefix('flow/')} | {cells} |")
  mean = np.mean(list(rows.values()), axis=0)
  lines.append("| mean | " + " | ".join(f"{m:.2f}" for m in mean) + " |")
  below = [pair for pair, values in rows.items() if values[0] < values[2]]
  sets = {pair.split("/")[1] for pair in below}
  counts = [
      f"{name} {sum(pair.split('/')[1] == name for pair in below)}"
      for name in sorted(sets)
  ]
  lines += [
      "",
      f"Below the pair's constant on {len(below)} of {len(pairs)}"
      f" ({', '.join(counts)}); the mean is {mean[0] / mean[1]:.2f} of zero"
      f" flow's, the constants' {mean[2] / mean[1]:.2f}, Farneback's"
      f" {mean[3] / mean[1]:.2f}, DIS's {mean[4] / mean[1]:.2f}.",
  ]
  knn = [key for key in results if key.startswith("knn/")]
  lines += ["", "| kNN | percent |", "|---|---|"]
  lines += [
      f"| {key.removeprefix('knn/')} | {results[key]:.2f} |" for key in knn
  ]
  return "\n".join(lines)


def course_table(log: list[dict], columns: int = 7) -> str:
  """Monitors averaged over equal parts of the run, and the evals within it."""
  last = log[-1]["step"] + 1
  edges = np.linspace(0, last, columns + 1)
  heads = [f"{int(a)}-{int(b)}" for a, b in zip(edges, edges[1:], strict=False)]
  lines = [
      "| steps | " + " | ".join(heads) + " |",
      "|---" * (columns + 1) + "|",
  ]
  for name in _MONITORS:
    cells = []
    for a, b in zip(edges, edges[1:], strict=False):
      values = [x[name] for x in log if name in x and a <= x["step"] < b]
      cells.append(f"{np.mean(values):.2f}" if values else "")
    if any(cells):
      lines.append(f"| {name} | " + " | ".join(cells) + " |")
  for line in log:
    evals = {
        key: value
        for key, value in line.items()
        if key.count("/") == 2
        and key.endswith(("/epe", "/epe_zero", "/top1"))
        and key.startswith(("flow/", "knn/"))
    }
    if evals:
      text = ", ".join(f"{key} {value:.2f}" for key, value in evals.items())
      lines += ["", f"Step {line['step']}: {text}."]
  return "\n".join(lines)


def main(argv: list[str]) -> int:
  """Prints the tables."""
  if len(argv) not in (1, 2):
    print(f"error: expected RESULTS.json [METRICS.jsonl], got {argv}",
          file=sys.stderr)  # fmt: skip
    return 2
  print(pairs_table(json.loads(pathlib.Path(argv[0]).read_text())))
  if len(argv) == 2:
    lines = pathlib.Path(argv[1]).read_text().splitlines()
    print("\n" + course_table([json.loads(line) for line in lines]))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
