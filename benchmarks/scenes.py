"""Generated pairs a second: python -m benchmarks.scenes [--json=PATH] [--images=FOLDER]

Processor time of one thread, the least of five runs; the reference is reading
the same frames back from PNG files in memory, as a data set on disk would be.
The cut-outs' photographs are those of FOLDER, else procedural ones, decoded
before the clock starts, or in the row that says so, within it.
The exit code is 1 below 200 procedural pairs of 64x64 a second, or below 100
of cut-outs.
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

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from mcjepa_jax.data.readers import image_files  # noqa: E402
from mcjepa_jax.data.sets import (  # noqa: E402
    cutouts,
    image_sets,
    synthetic,
)

_PHOTOGRAPHS = 200


class _Encoded:
  """Images as files in memory, decoded when they are asked for."""

  def __init__(self, images, kind: str):
    self.files = [io.BytesIO() for _ in images]
    for file, image in zip(self.files, images, strict=True):
      Image.fromarray(image).save(file, kind)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return {"image": image_files.decode_image(self.files[i].getvalue(), str(i))}


def _photographs(folder: pathlib.Path | None) -> list[dict[str, np.ndarray]]:
  if folder is None:
    images = synthetic.Images(size=(160, 216), seed=0, num_examples=40)
  else:
    images = image_sets.ImageFolder(folder)
  steps = np.linspace(0, len(images) - 1, min(len(images), _PHOTOGRAPHS))
  return [images[i] for i in steps.astype(int).tolist()]


def _rate(function, count: int) -> float:
  times = []
  for _ in range(5):
    start = time.process_time()
    function()
    times.append(time.process_time() - start)
  return count / min(times)


def _row(name: str, pairs, target: float | None) -> dict:
  records = list(pairs)
  frames = [r[key] for r in records for key in ("frame_1", "frame_2")]
  files = _Encoded(frames, "png")
  ours = _rate(lambda: list(pairs), len(pairs))
  reference = _rate(lambda: [files[i] for i in range(len(files))], len(pairs))
  return {
      "name": name,
      "shape": "x".join(map(str, pairs.size)),
      "ours": ours,
      "reference": reference,
      "reference_name": "decode the same frames from PNG",
      "unit": "pairs a second a core",
      "ratio": ours / reference,
      "target": target,
      "passed": target is None or ours >= target,
  }


def main(argv: list[str] | None = None) -> int:
  """0 if the targets are met; prints the rates and writes the JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path)
  parser.add_argument("--images", type=pathlib.Path)
  args = parser.parse_args(argv)
  cv2.setNumThreads(1)
  decoded = _photographs(args.images)
  encoded = _Encoded([photograph["image"] for photograph in decoded], "jpeg")
  small = dict(size=(64, 64), seed=0, num_examples=40)
  large = dict(size=(384, 512), seed=0, num_examples=5)
  rows = [
      _row("synthetic_pairs", synthetic.Pairs(**small), 200),
      _row("cutouts", cutouts.Pairs(decoded, **small), 100),
      _row("cutouts_and_decoding", cutouts.Pairs(encoded, **small), None),
      _row("synthetic_pairs", synthetic.Pairs(**large), None),
      _row("cutouts", cutouts.Pairs(decoded, **large), None),
  ]
  print(json.dumps(rows, indent=2))
  if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + "\n")
  return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
  sys.exit(main())
