"""Flow of two images from a checkpoint, as files that a person can look at.

python -m mcjepa_jax.predict --checkpoint=PATH --inputs A B --output=DIR
"""

from collections.abc import Sequence
import pathlib
import sys

import numpy as np

from mcjepa_jax import errors, loading
from mcjepa_jax.data.readers import flow_files, image_files
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import inference
from mcjepa_jax.runtime import command_line, visualize
from mcjepa_jax.storage import checkpoint_reader, local_files


def read_pair(inputs: Sequence[str]) -> list[np.ndarray]:
  """The two images, decoded.

  Raises:
    UserError: not two, or files that cannot be read, or of unequal size.
  """
  if len(inputs) != 2:
    raise errors.UserError(f"--inputs: expected two images, got {len(inputs)}")
  frames = []
  faults = errors.collect(
      *(lambda p=p: frames.append(image_files.read_image(p)) for p in inputs)
  )
  if faults:
    raise errors.UserError(*faults)
  if frames[0].shape != frames[1].shape:
    sizes = [f"{f.shape[1]}x{f.shape[0]}" for f in frames]
    raise errors.UserError(
        f"--inputs: expected two images of one size, got {inputs[0]} of"
        f" {sizes[0]} and {inputs[1]} of {sizes[1]}"
    )
  return frames


def predict(
    *, checkpoint_path: str, inputs: Sequence[str], output: str
) -> dict[str, pathlib.Path]:
  """The files written, by kind: flow (.flo), color, warped, panel (.png).

  The images are decoded before the checkpoint is read.

  Raises:
    UserError: images, checkpoint or folder cannot be used.
  """
  frames = []
  folder = pathlib.Path(output).expanduser()
  faults = errors.collect(
      lambda: frames.extend(read_pair(inputs)),
      lambda: local_files.check_writable(folder, "--output"),
      lambda: checkpoint_reader.locate(checkpoint_path),
  )
  if faults:
    raise errors.UserError(*faults)
  mesh = sharding.make_mesh(1)
  model, params, _ = loading.load(checkpoint_path, mesh=mesh)
  flow = inference.flow_predictor(model, params, mesh)(np.stack(frames))[0]
  stem = pathlib.Path(inputs[0]).stem
  files = {
      kind: folder / f"{stem}_{kind}{suffix}"
      for kind, suffix in (
          ("flow", ".flo"),
          ("color", ".png"),
          ("warped", ".png"),
          ("panel", ".png"),
      )
  }
  flow_files.write_flo(files["flow"], flow)
  visualize.save_png(files["color"], visualize.flow_to_color(flow))
  visualize.save_png(files["warped"], visualize.warp(frames[1], flow))
  visualize.save_png(files["panel"], visualize.flow_panel(*frames, flow))
  return files


def main(argv: Sequence[str] | None = None) -> int:
  """The exit code of the command."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    flags = command_line.split(argv, ("checkpoint", "inputs", "output")).flags
    checkpoint_path, output = command_line.single(
        flags,
        remote=("checkpoint",),
        checkpoint="WORKDIR or one step in it",
        output="FOLDER",
    )
    files = predict(
        checkpoint_path=checkpoint_path,
        inputs=flags.get("inputs", ()),
        output=output,
    )
    for file in files.values():
      print(file)

  return command_line.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
