"""MPI-Sintel with true flow, and with flow that a reader gets wrong."""

import pathlib

import numpy as np
from PIL import Image

from mcjepa_jax.data.readers import flow_files
from mcjepa_jax.data.sets import synthetic

SCENES = 3
PAIRS = synthetic.Pairs(size=(96, 128), seed=1, num_examples=SCENES)


# What a reader gets wrong: (frame_1, frame_2, flow) of a right example.
FAULTS = {
    "as given": lambda e: (e["frame_1"], e["frame_2"], e["flow_12"]),
    "u and v swapped": lambda e: (
        e["frame_1"],
        e["frame_2"],
        e["flow_12"][..., ::-1],
    ),
    "negated": lambda e: (e["frame_1"], e["frame_2"], -e["flow_12"]),
    "u negated": lambda e: (
        e["frame_1"],
        e["frame_2"],
        np.stack([-e["flow_12"][..., 0], e["flow_12"][..., 1]], -1),
    ),
    "v negated": lambda e: (
        e["frame_1"],
        e["frame_2"],
        np.stack([e["flow_12"][..., 0], -e["flow_12"][..., 1]], -1),
    ),
    "frames exchanged": lambda e: (e["frame_2"], e["frame_1"], e["flow_12"]),
    "the other direction's flow": lambda e: (
        e["frame_1"],
        e["frame_2"],
        e["flow_21"],
    ),
    "rows flipped": lambda e: (e["frame_1"], e["frame_2"], e["flow_12"][::-1]),
    "twice too long": lambda e: (e["frame_1"], e["frame_2"], 2 * e["flow_12"]),
    "half too long": lambda e: (e["frame_1"], e["frame_2"], e["flow_12"] / 2),
}


def write(root: pathlib.Path, fault: str = "as given") -> pathlib.Path:
  """Writes MPI-Sintel, a pair a scene, with a fault in all of it."""
  for i in range(SCENES):
    *frames, flow = FAULTS[fault](PAIRS[i])
    for number, frame in enumerate(frames, 1):
      path = root / f"MPI-Sintel/training/clean/s{i}/frame_{number:04d}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(frame).save(path)
    path = root / f"MPI-Sintel/training/flow/s{i}/frame_0001.flo"
    path.parent.mkdir(parents=True)
    flow_files.write_flo(path, np.ascontiguousarray(flow))
  return root
