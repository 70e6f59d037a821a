"""Procedural pairs a second on one core: python -m benchmarks.scenes [--json=PATH]

Processor time of one thread, the least of five runs; the reference is reading
the same frames back from PNG files in memory, as a data set on disk would be.
The exit code is 1 below 200 pairs of 64x64 a second.
"""

import argparse
import io
import json
import os
import pathlib
import sys
import time

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
  os.environ[_name] = "1"  # before numpy

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from mcjepa_jax.data import synthetic  # noqa: E402

_TARGET = 200
_PAIRS = 40


def _rate(function) -> float:
  times = []
  for _ in range(5):
    start = time.process_time()
    function()
    times.append(time.process_time() - start)
  return _PAIRS / min(times)


def main(argv: list[str] | None = None) -> int:
  """0 if the target is met; prints the rates and writes the JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args(argv)
  pairs = synthetic.Pairs(seed=0, num_examples=_PAIRS)
  files = []
  for record in pairs:
    for key in ("frame_1", "frame_2"):
      file = io.BytesIO()
      Image.fromarray(record[key]).save(file, "png")
      files.append(file)
  ours = _rate(lambda: list(pairs))
  reference = _rate(lambda: [np.asarray(Image.open(file)) for file in files])
  row = {
      "name": "synthetic_pairs",
      "ours": ours,
      "reference": reference,
      "reference_name": "decode the same frames from PNG",
      "unit": "pairs a second a core",
      "ratio": ours / reference,
      "target": _TARGET,
      "passed": ours >= _TARGET,
  }
  print(json.dumps(row, indent=2))
  if args.json:
    args.json.write_text(json.dumps([row], indent=2) + "\n")
  return 0 if row["passed"] else 1


if __name__ == "__main__":
  sys.exit(main())
