"""Flow of two images from a checkpoint, as files that a person can look at.

python -m mcjepa_jax.predict --checkpoint=PATH --inputs A B --output=DIR
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from mcjepa_jax import (
    assembly,
    checkpoint,
    command,
    errors,
    evaluate,
    sharding,
    visualize,
)
from mcjepa_jax.data import flow_io
from mcjepa_jax.models import mcjepa


def restore_model(
    path: str | pathlib.Path, *, mesh: jax.sharding.Mesh
) -> tuple[mcjepa.MCJEPA, Any, dict[str, Any]]:
  """The model that a checkpoint describes, its parameters and its meta.

  Raises:
    UserError: no checkpoint there, or one that cannot be read.
  """
  meta = checkpoint.read_meta(path)
  model = assembly.model(ml_collections.ConfigDict({"model": meta["model"]}))
  abstract = jax.eval_shape(lambda: mcjepa.init_params(model, 0))
  replicated = sharding.replicated(mesh)
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
      abstract,
  )
  return model, checkpoint.restore_params(path, abstract), meta


def read_pair(inputs: Sequence[str]) -> list[np.ndarray]:
  """The two images, decoded.

  Raises:
    UserError: not two, or files that cannot be read, or of unequal size.
  """
  if len(inputs) != 2:
    raise errors.UserError(f"--inputs: expected two images, got {len(inputs)}")
  frames, faults = [], []
  for path in inputs:
    try:
      frames.append(flow_io.read_image(path))
    except errors.UserError as error:
      faults.extend(error.messages)
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
  faults, frames = [], []
  folder = pathlib.Path(output).expanduser()
  for check in (
      lambda: frames.extend(read_pair(inputs)),
      lambda: _make_folder(folder),
      lambda: checkpoint.locate(checkpoint_path),
  ):
    try:
      check()
    except errors.UserError as error:
      faults.extend(error.messages)
  if faults:
    raise errors.UserError(*faults)
  mesh = sharding.make_mesh(1)
  model, params, _ = restore_model(checkpoint_path, mesh=mesh)
  flow = evaluate.flow_predictor(model, params, mesh)(np.stack(frames))[0]
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
  flow_io.write_flo(files["flow"], flow)
  visualize.save_png(files["color"], visualize.flow_to_color(flow))
  visualize.save_png(files["warped"], visualize.warp(frames[1], flow))
  visualize.save_png(files["panel"], visualize.flow_panel(*frames, flow))
  return files


def _make_folder(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
        f"--output: cannot write {folder}: {error.strerror}"
    ) from error


def main(argv: Sequence[str] | None = None) -> int:
  """The exit code of the command."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    flags = command.split(argv, ("checkpoint", "inputs", "output")).flags
    faults = [
        f"--{name}: expected {hint}"
        for name, hint in (
            ("checkpoint", "a workdir or one step in it"),
            ("inputs", "two images"),
            ("output", "a folder"),
        )
        if not flags.get(name)
    ]
    if faults:
      raise errors.UserError(*faults)
    files = predict(
        checkpoint_path=flags["checkpoint"][0],
        inputs=flags["inputs"],
        output=flags["output"][0],
    )
    for file in files.values():
      print(file)

  return command.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
