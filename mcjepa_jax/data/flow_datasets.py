"""Optical flow sets with ground truth, in their official layouts.

An example is {name, frame_1, frame_2: u8 [h w 3], flow: f32 [h w 2] from frame
1 to frame 2 in pixels, valid: f32 [h w 1]}, with visible: f32 [h w 1] where the
set knows occlusion. valid is 1 where the ground truth counts; visible is 1
where the pixel is seen in both frames, and is meaningful where valid is 1.

Pairs without ground truth are left out. Training without labels reads the same
folders as frames: `video.frame_pairs`.
"""

from collections.abc import Iterable
import dataclasses
import os
import pathlib
import re

import numpy as np

from mcjepa_jax.data import flow_io
from mcjepa_jax.errors import UserError

# As many faults of one folder as a reader wants to see at once.
_MAX_FAULTS = 10


@dataclasses.dataclass(frozen=True)
class FlowPair:
  """The files of one pair; masks that the set lacks are None."""

  name: str
  frame_1: str
  frame_2: str
  flow: str
  occlusions: str | None = (
      None  # Gray png, not 0 where frame 2 hides the pixel.
  )
  invalid: str | None = None  # Gray png, not 0 where the flow is wrong.
  flow_visible: str | None = None  # Flow file valid where both frames see it.


class FlowSet:
  """Pairs of frames with their ground truth, decoded when asked for."""

  def __init__(self, pairs: Iterable[FlowPair]):
    self.pairs = tuple(pairs)

  def __len__(self) -> int:
    return len(self.pairs)

  def record_id(self, index: int) -> str:
    """Returns the pair's name, which does not depend on where the set lies."""
    return self.pairs[index].name

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
    pair = self.pairs[index]
    frame_1 = flow_io.read_image(pair.frame_1)
    frame_2 = flow_io.read_image(pair.frame_2)
    flow, valid = flow_io.read_flow(pair.flow)
    _expect_size(frame_2, pair.frame_2, frame_1, pair.frame_1)
    _expect_size(flow, pair.flow, frame_1, pair.frame_1)
    if pair.invalid is not None:
      valid = valid * (1 - _read_mask(pair.invalid, frame_1, pair.frame_1))
    example = dict(
        name=pair.name, frame_1=frame_1, frame_2=frame_2, flow=flow, valid=valid
    )
    if pair.occlusions is not None:
      occluded = _read_mask(pair.occlusions, frame_1, pair.frame_1)
      example["visible"] = 1 - occluded
    elif pair.flow_visible is not None:
      _, example["visible"] = flow_io.read_flow(pair.flow_visible)
      _expect_size(example["visible"], pair.flow_visible, frame_1, pair.frame_1)
    return example


def _expect_size(came: np.ndarray, path: str, frame: np.ndarray, of: str):
  if came.shape[:2] != frame.shape[:2]:
    (height, width), (wanted_height, wanted_width) = (
        came.shape[:2],
        frame.shape[:2],
    )
    raise UserError(
        f"{path}: expected {wanted_width}x{wanted_height}, the size of {of}, "
        f"came {width}x{height}"
    )


def _read_mask(path: str, frame: np.ndarray, of: str) -> np.ndarray:
  mask = flow_io.read_image(path)[..., :1] > 0
  _expect_size(mask, path, frame, of)
  return mask.astype(np.float32)


def _find(
    root: flow_io.Path, candidates: tuple[str, ...], probe: str
) -> pathlib.Path:
  """Returns the first candidate folder under `root` that holds `probe`."""
  root = pathlib.Path(root)
  for candidate in candidates:
    # glob yields nothing for a folder that is not there.
    if any((root / candidate).glob(probe)):
      return root / candidate
  missing = root / candidates[0] / probe
  while not missing.parent.exists():
    missing = missing.parent
  raise UserError(
      f"{missing}: not found; expected {root / candidates[0] / probe}"
      + "".join(f", or {root / other / probe}" for other in candidates[1:])
  )


def _flow_set(pairs: list[FlowPair], folder: pathlib.Path) -> FlowSet:
  """Returns the set, once every file that it names is known to exist."""
  if not pairs:
    raise UserError(
        f"{folder}: expected flow files with their frames, came none"
    )
  listings: dict[str, set[str]] = {}
  faults = []
  for pair in pairs:
    for path in (pair.frame_1, pair.frame_2):
      parent, name = os.path.split(path)
      # One listing of a folder costs less than a look at each of its files.
      if parent not in listings:
        listings[parent] = _listing(parent)
      if name not in listings[parent]:
        faults.append(f"{path}: not found; expected a frame of {pair.flow}")
    if len(faults) >= _MAX_FAULTS:
      break
  if faults:
    raise UserError(*faults)
  return FlowSet(pairs)


def _listing(folder: flow_io.Path) -> set[str]:
  try:
    return set(os.listdir(folder))
  except FileNotFoundError:
    return set()
  except OSError as error:
    raise UserError(f"{folder}: cannot be listed: {error.strerror}") from error


def _if_file(path: pathlib.Path) -> str | None:
  return str(path) if path.is_file() else None


def flying_chairs(root: flow_io.Path) -> FlowSet:
  """Returns FlyingChairs: NNNNN_img1.ppm, _img2.ppm, _flow.flo."""
  folder = _find(root, ("FlyingChairs_release/data", "data", ""), "*_flow.flo")
  names = sorted(
      name.removesuffix("_flow.flo")
      for name in _listing(folder)
      if name.endswith("_flow.flo")
  )
  pairs = [
      FlowPair(
          name=name,
          frame_1=str(folder / f"{name}_img1.ppm"),
          frame_2=str(folder / f"{name}_img2.ppm"),
          flow=str(folder / f"{name}_flow.flo"),
      )
      for name in names
  ]
  return _flow_set(pairs, folder)


def _sintel(root: flow_io.Path, render: str) -> FlowSet:
  folder = _find(root, ("MPI-Sintel/training", "training"), "flow")
  pairs = []
  for flow in sorted(folder.glob("flow/*/frame_*.flo")):
    scene, number = flow.parent.name, flow.stem.removeprefix("frame_")
    if not number.isdecimal():
      raise UserError(f"{flow}: expected frame_NNNN.flo")
    frames = folder / render / scene
    after = f"{int(number) + 1:0{len(number)}d}"
    pairs.append(
        FlowPair(
            name=f"{scene}_{number}",
            frame_1=str(frames / f"frame_{number}.png"),
            frame_2=str(frames / f"frame_{after}.png"),
            flow=str(flow),
            occlusions=_if_file(
                folder / "occlusions" / scene / f"frame_{number}.png"
            ),
            invalid=_if_file(
                folder / "invalid" / scene / f"frame_{number}.png"
            ),
        )
    )
  return _flow_set(pairs, folder / "flow")


def sintel_clean(root: flow_io.Path) -> FlowSet:
  """Returns the clean pass of MPI-Sintel's training scenes."""
  return _sintel(root, "clean")


def sintel_final(root: flow_io.Path) -> FlowSet:
  """Returns the final pass of MPI-Sintel's training scenes."""
  return _sintel(root, "final")


def middlebury(root: flow_io.Path) -> FlowSet:
  """Returns Middlebury's other-data: frame10, frame11 and flow10."""
  folder = _find(root, ("middlebury", ""), "other-gt-flow")
  pairs = []
  for flow in sorted(folder.glob("other-gt-flow/*/flow10.flo")):
    frames = folder / "other-data" / flow.parent.name
    pairs.append(
        FlowPair(
            name=flow.parent.name,
            frame_1=str(frames / "frame10.png"),
            frame_2=str(frames / "frame11.png"),
            flow=str(flow),
        )
    )
  return _flow_set(pairs, folder / "other-gt-flow")


def _kitti(
    root: flow_io.Path, candidates: tuple[str, ...], images: tuple[str, ...]
) -> FlowSet:
  folder = _find(root, candidates, "flow_occ")
  present = [name for name in images if (folder / name).is_dir()]
  if not present:
    raise UserError(
        f"{folder / images[0]}: not found; expected a folder of frames "
        f"({' or '.join(images)})"
    )
  frames = folder / present[0]
  pairs = []
  for flow in sorted(folder.glob("flow_occ/*_10.png")):
    name = flow.stem.removesuffix("_10")
    pairs.append(
        FlowPair(
            name=name,
            frame_1=str(frames / f"{name}_10.png"),
            frame_2=str(frames / f"{name}_11.png"),
            flow=str(flow),
            flow_visible=_if_file(folder / "flow_noc" / flow.name),
        )
    )
  return _flow_set(pairs, folder / "flow_occ")


def kitti_2015(root: flow_io.Path) -> FlowSet:
  """Returns KITTI 2015's training pairs: image_2, flow_occ, flow_noc."""
  return _kitti(
      root,
      ("kitti/data_scene_flow/training", "kitti/2015/training", "training"),
      ("image_2",),
  )


def kitti_2012(root: flow_io.Path) -> FlowSet:
  """Returns KITTI 2012's training pairs, in colour where colour is there."""
  return _kitti(
      root,
      ("kitti/data_stereo_flow/training", "kitti/2012/training", "training"),
      ("colored_0", "image_2", "image_0"),
  )


def hd1k(root: flow_io.Path) -> FlowSet:
  """Returns HD1K: each frame with the next one of its sequence."""
  folder = _find(root, ("HD1K", "hd1k", ""), "hd1k_flow_gt/flow_occ")
  frames = folder / "hd1k_input" / "image_2"
  names = sorted(n for n in _listing(frames) if re.fullmatch(r"\d+_\d+.png", n))
  pairs = []
  for name, after in zip(names, names[1:], strict=False):
    flow = _if_file(folder / "hd1k_flow_gt" / "flow_occ" / name)
    # The last frame of a sequence has a flow, but its second frame is not here.
    if flow is not None and name.split("_")[0] == after.split("_")[0]:
      pairs.append(
          FlowPair(
              name=name.removesuffix(".png"),
              frame_1=str(frames / name),
              frame_2=str(frames / after),
              flow=flow,
          )
      )
  return _flow_set(pairs, folder / "hd1k_flow_gt" / "flow_occ")


def flying_things(root: flow_io.Path) -> FlowSet:
  """Returns FlyingThings3D's TRAIN split: clean pass, left, into the future."""
  folder = _find(
      root,
      ("FlyingThings3D", "FlyingThings3D_subset", ""),
      "optical_flow/TRAIN",
  )
  pairs = []
  pattern = "*/*/into_future/left/OpticalFlowIntoFuture_*_L.pfm"
  for flow in sorted((folder / "optical_flow" / "TRAIN").glob(pattern)):
    scene = flow.parents[2]
    number = flow.stem.split("_")[1]
    frames = folder.joinpath(
        "frames_cleanpass", "TRAIN", scene.parent.name, scene.name, "left"
    )
    after = f"{int(number) + 1:04d}"
    # A scene's last flow points to a frame that the set does not hold.
    if (frames / f"{after}.png").is_file():
      pairs.append(
          FlowPair(
              name=f"{scene.parent.name}_{scene.name}_{number}",
              frame_1=str(frames / f"{number}.png"),
              frame_2=str(frames / f"{after}.png"),
              flow=str(flow),
          )
      )
  return _flow_set(pairs, folder / "optical_flow" / "TRAIN")


FLOW_SETS = {
    "flying_chairs": flying_chairs,
    "flying_things": flying_things,
    "hd1k": hd1k,
    "kitti_2012": kitti_2012,
    "kitti_2015": kitti_2015,
    "middlebury": middlebury,
    "sintel_clean": sintel_clean,
    "sintel_final": sintel_final,
}


def open_flow_set(name: str, root: flow_io.Path) -> FlowSet:
  """Returns the set of that name under the data root."""
  if name not in FLOW_SETS:
    raise UserError(
        f"flow set: expected one of {', '.join(FLOW_SETS)}, came {name!r}"
    )
  return FLOW_SETS[name](root)
