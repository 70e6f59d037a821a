"""Pairs of frames, with and without true flow, out of the files of any set.

An example of a `FlowSet` is {name, frame_1, frame_2: u8 [h w 3], flow: f32
[h w 2] from frame 1 to frame 2 in pixels, valid: f32 [h w 1]}, with visible: f32
[h w 1] where the set knows occlusion. valid is 1 where the ground truth counts;
visible is 1 where the pixel is seen in both frames, and is meaningful where
valid is 1. A set whose flow has s times the frames' height and width also gives
flow_all: f32 [h w s s 2], the block of vectors of each pixel; flow is its upper
left one, and valid is 1 where the whole block is known.
"""

from collections.abc import Iterable
import dataclasses
import os
import pathlib

import numpy as np

from mcjepa_jax.data.readers import flow_files, image_files
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

# As many faults of one folder as a reader wants to see at once.
_MAX_FAULTS = 10


@dataclasses.dataclass(frozen=True)
class FlowPair:
  """The files of one pair; what the set lacks is None."""

  name: str
  frame_1: image_files.Path
  frame_2: image_files.Path
  flow: image_files.Path
  # Where a mask is not 0, frame 2 hides the pixel, or the flow is wrong there.
  # A .npy of bytes, or a picture with one channel or more.
  occlusions: image_files.Path | None = None
  invalid: image_files.Path | None = None
  # Flow file valid where both frames see it.
  flow_visible: image_files.Path | None = None
  # The flow's grid is so many times the frames', its vectors are in the frames'
  # pixels.
  flow_scale: int = 1

  def __post_init__(self):
    # A string is a fraction of a Path, to hold and to send to a worker.
    for field, value in tuple(vars(self).items()):
      if isinstance(value, pathlib.Path):
        object.__setattr__(self, field, str(value))


class FramePairs:
  """Pairs of frames, decoded when asked for; no label is opened."""

  def __init__(self, pairs: Iterable[FlowPair]):
    self.pairs = tuple(pairs)

  def __len__(self) -> int:
    return len(self.pairs)

  def record_id(self, index: int) -> str:
    """Returns the pair's name, which does not depend on where the set lies."""
    return self.pairs[index].name

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
    pair = self.pairs[index]
    frame_1 = image_files.read_image(pair.frame_1)
    frame_2 = image_files.read_image(pair.frame_2)
    _expect_size(frame_2, pair.frame_2, frame_1, pair.frame_1)
    return {"frame_1": frame_1, "frame_2": frame_2}


class FlowSet(FramePairs):
  """Pairs of frames with their ground truth, decoded when asked for."""

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
    pair = self.pairs[index]
    example = super().__getitem__(index)
    frame_1, scale = example["frame_1"], pair.flow_scale
    flow, valid = flow_files.read_flow(pair.flow)
    _expect_size(flow, pair.flow, frame_1, pair.frame_1, scale=scale)
    height, width = frame_1.shape[:2]
    blocks = (height, scale, width, scale, -1)
    if scale > 1:
      example["flow_all"] = flow.reshape(blocks).swapaxes(1, 2)
    flow, valid = flow[::scale, ::scale], valid.reshape(blocks).min((1, 3))
    if pair.invalid is not None:
      valid = valid * (1 - _read_mask(pair.invalid, frame_1, pair.frame_1))
    example |= dict(name=pair.name, flow=flow, valid=valid)
    if pair.occlusions is not None:
      occluded = _read_mask(pair.occlusions, frame_1, pair.frame_1)
      example["visible"] = 1 - occluded
    elif pair.flow_visible is not None:
      _, example["visible"] = flow_files.read_flow(pair.flow_visible)
      _expect_size(example["visible"], pair.flow_visible, frame_1, pair.frame_1)
    return example


def _expect_size(
    came: np.ndarray,
    path: image_files.Path,
    frame: np.ndarray,
    of: image_files.Path,
    *,
    scale: int = 1,
):
  height, width = (scale * side for side in frame.shape[:2])
  if came.shape[:2] != (height, width):
    raise UserError(
        f"{path}: expected {width}x{height}, {'twice ' if scale == 2 else ''}"
        f"the size of {of}, came {came.shape[1]}x{came.shape[0]}"
    )


def _read_mask(
    path: image_files.Path, frame: np.ndarray, of: image_files.Path
) -> np.ndarray:
  if os.fspath(path).endswith(".npy"):
    mask = flow_files.read_npy(path, np.uint8, 2)[..., None] > 0
  else:
    mask = image_files.read_image(path).any(axis=-1, keepdims=True)
  _expect_size(mask, path, frame, of)
  return mask.astype(np.float32)


def checked(
    pairs: list[FlowPair], folder: paths.Location, *, labels: bool = True
) -> FramePairs:
  """Returns the set, once every file that it must have is known to exist."""
  if not pairs:
    raise UserError(
        f"{folder}: expected flow files with their frames, came none"
    )
  listings: dict[image_files.Path, set[str]] = {}
  faults = []
  for pair in pairs:
    for path in (pair.frame_1, pair.frame_2) + (pair.flow,) * labels:
      parent, name = paths.split(path)
      # One listing of a folder costs less than a look at each of its files.
      if parent not in listings:
        listings[parent] = listing(parent)
      if name not in listings[parent]:
        faults.append(f"{path}: not found; expected a file of {pair.name}")
    if len(faults) >= _MAX_FAULTS:
      break
  if faults:
    raise UserError(*faults)
  return FlowSet(pairs) if labels else FramePairs(pairs)


def listing(folder: image_files.Path) -> set[str]:
  """Returns the names in a folder; none where it is not there."""
  try:
    return set(paths.names(folder))
  except FileNotFoundError:
    return set()
  except OSError as error:
    raise UserError(f"{folder}: cannot be listed: {error.strerror}") from error
