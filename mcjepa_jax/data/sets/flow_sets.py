"""Optical flow sets in their official layouts, with and without ground truth.

A labelled example is that of a `flow_pairs.FlowSet`; pairs without ground truth
are left out.

For training without labels the same folders are read as frames: what ends in
`_frames` returns (folder, its subfolders of sequences) for `frame_folders`;
sets of unrelated pairs take `labels=False`, which opens no label. Where a set is
looked for, and what each expects below, stands in `data/catalog`.
"""

import pathlib
import re

from mcjepa_jax.data.readers import image_files
from mcjepa_jax.data.sets import flow_pairs
from mcjepa_jax.data.sets.flow_pairs import FlowPair, FramePairs
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

_CAMERAS = ("left", "right")
_CHAIRS_SPLIT = "FlyingChairs_train_val.txt"
_THINGS = ("FlyingThings3D", "")
# What the archives are called; the left camera's frames: in 2012 in colour where
# colour is there.
_KITTI = {
    "2012": ("stereo", ("colored_0", "image_2", "image_0")),
    "2015": ("scene", ("image_2",)),
}
_HD1K = ("HD1K", "hd1k", "")
_SPRING = ("spring", "Spring", "")
_TARTAN = ("TartanAir", "tartanair", "")
# ENV/Easy/P000 as documented, ENV/ENV/Easy/P000 as the archives unpack.
_TRAJECTORIES = ("*/*/P*", "*/*/*/P*")
_VIPER = ("VIPER", "viper", "")

Frames = tuple[paths.Location, list[paths.Location]]


def _if_file(path: paths.Location) -> paths.Location | None:
  return path if path.is_file() else None


def _next(flow: paths.Location, number: str, step: int = 1) -> str:
  """Returns the number `step` frames later, with as many digits."""
  if not re.fullmatch("[0-9]+", number):
    raise UserError(f"{flow}: expected a frame's number, came {number!r}")
  return f"{int(number) + step:0{len(number)}d}"


def _subfolders(folder: paths.Location, *patterns: str) -> Frames:
  """Returns the folder and those below it that match a pattern, in order."""
  found = [p for glob in patterns for p in sorted(folder.glob(glob))]
  if not found:
    raise UserError(f"{folder}: expected folders {patterns}, came none")
  return folder, found


def flying_chairs(
    root: image_files.Path, split: str, *, labels: bool = True
) -> FramePairs:
  """Returns FlyingChairs: NNNNN_img1.ppm, _img2.ppm, _flow.flo.

  `split` is "training" or "validation" by FlyingChairs_train_val.txt, beside
  the pairs or one folder up: a line a pair, 1 for training, 2 for validation.
  Where there is no such file each is all pairs.
  """
  folder = paths.find(
      root, ("FlyingChairs_release/data", "data", ""), "*_img1.ppm"
  )
  names = _stems(folder, r"([0-9]+)_(img1\.ppm|img2\.ppm|flow\.flo)")
  for above in (folder, folder.parent):
    if (above / _CHAIRS_SPLIT).exists():
      names = _in_split(above / _CHAIRS_SPLIT, names, split)
      break
  pairs = [
      FlowPair(
          name=name,
          frame_1=folder / f"{name}_img1.ppm",
          frame_2=folder / f"{name}_img2.ppm",
          flow=folder / f"{name}_flow.flo",
      )
      for name in names
  ]
  return flow_pairs.checked(pairs, folder, labels=labels)


def _stems(folder: paths.Location, pattern: str) -> list[str]:
  """Returns the first group of the names that match, each once, in order."""
  found = (re.fullmatch(pattern, name) for name in flow_pairs.listing(folder))
  return sorted({match[1] for match in found if match})


def _in_split(path: paths.Location, names: list[str], split: str) -> list[str]:
  with image_files.opened(path, "a split file") as (file, size):
    # A digit and a line's end of two bytes; what is longer is another file.
    kinds = file.read(min(size, 3 * len(names) + 4)).split()
  if len(kinds) != len(names) or not {b"1", b"2"}.issuperset(kinds):
    raise UserError(
        f"{path}: expected a 1 or 2 for each of {len(names)} pairs, came "
        f"{len(kinds)} or more lines, {sorted(set(kinds))[:9]}, in {size} bytes"
    )
  kind = {"training": b"1", "validation": b"2"}[split]
  return [n for n, k in zip(names, kinds, strict=True) if k == kind]


def flying_chairs_2(
    root: image_files.Path, split: str, *, labels: bool = True
) -> FramePairs:
  """Returns FlyingChairs2's "train" or "val" pairs, into the future."""
  folder = (
      paths.find(root, ("FlyingChairs2", ""), f"{split}/*-img_0.png") / split
  )
  pairs = [
      FlowPair(
          name=name,
          frame_1=folder / f"{name}-img_0.png",
          frame_2=folder / f"{name}-img_1.png",
          flow=folder / f"{name}-flow_01.flo",
          occlusions=_if_file(folder / f"{name}-occ_01.png"),
      )
      for name in _stems(folder, r"([0-9]+)-(img_[01]\.png|flow_01\.flo)")
  ]
  return flow_pairs.checked(pairs, folder, labels=labels)


def _things_passes(render: str, split: str) -> tuple[str, str]:
  """Returns where a pass lies, as png or, with loss, as webp."""
  return tuple(f"frames_{render}pass{kind}/{split}" for kind in ("", "_webp"))


def flying_things(
    root: image_files.Path,
    split: str,
    *,
    render: str = "clean",
    camera: str = "left",
    direction: str = "future",
) -> FramePairs:
  """Returns FlyingThings3D's "TRAIN" or "TEST" pairs into the future or past."""
  folder = paths.find(root, _THINGS, f"optical_flow/{split}")
  images = paths.find(folder, _things_passes(render, split), "*")
  suffix = "webp" if images.parent.name.endswith("_webp") else "png"
  into, step = {"future": ("Future", 1), "past": ("Past", -1)}[direction]
  pattern = f"*/*/into_{direction}/{camera}/OpticalFlowInto{into}_*.pfm"
  pairs = []
  for flow in sorted((folder / "optical_flow" / split).glob(pattern)):
    scene = flow.parent.parent.parent
    number = flow.stem.split("_")[1]
    frames = images / scene.parent.name / scene.name / camera
    other = frames / f"{_next(flow, number, step)}.{suffix}"
    # A scene's last flow points to a frame that the set does not hold.
    if other.is_file():
      pairs.append(
          FlowPair(
              name=f"{scene.parent.name}_{scene.name}_{number}",
              frame_1=frames / f"{number}.{suffix}",
              frame_2=other,
              flow=flow,
          )
      )
  return flow_pairs.checked(pairs, folder / "optical_flow" / split)


def flying_things_frames(root: image_files.Path, render: str) -> Frames:
  """Returns the folders of FlyingThings3D's training frames, both cameras."""
  passes = _things_passes(render, "TRAIN")
  folder = paths.find(paths.find(root, _THINGS, *passes), passes, "*")
  return _subfolders(folder, *(f"*/*/{camera}" for camera in _CAMERAS))


def flying_things_subset(
    root: image_files.Path,
    split: str,
    *,
    render: str = "clean",
    cameras: tuple[str, ...] = ("left",),
    direction: str = "future",
    labels: bool = True,
) -> FramePairs:
  """Returns FlyingThings3D's DispNet/FlowNet2 subset, "train" or "val".

  Its scenes follow each other in one folder, so the names of the flow files
  tell also without labels which frames are neighbours.
  """
  probe = f"{split}/flow/{cameras[0]}/into_{direction}"
  folder = paths.find(root, ("FlyingThings3D_subset", ""), probe) / split
  pairs = []
  for camera in cameras:
    frames = folder / f"image_{render}" / camera
    kind = pathlib.Path(camera, f"into_{direction}")
    for number in _stems(folder / "flow" / kind, r"([0-9]+)\.flo"):
      flow = folder / "flow" / kind / f"{number}.flo"
      after = _next(flow, number, {"future": 1, "past": -1}[direction])
      occlusions = folder / "flow_occlusions" / kind / f"{number}.png"
      pairs.append(
          FlowPair(
              name=f"{camera}_{number}",
              frame_1=frames / f"{number}.png",
              frame_2=frames / f"{after}.png",
              flow=flow,
              occlusions=_if_file(occlusions),
          )
      )
  return flow_pairs.checked(pairs, folder / "flow", labels=labels)


def sintel(root: image_files.Path, render: str) -> FramePairs:
  """Returns MPI-Sintel's training scenes in the "clean" or "final" pass."""
  folder = paths.find(root, ("MPI-Sintel/training", "training"), "flow")
  pairs = []
  for flow in sorted(folder.glob("flow/*/frame_*.flo")):
    scene, number = flow.parent.name, flow.stem.removeprefix("frame_")
    frames = folder / render / scene
    masks = f"{scene}/frame_{number}.png"
    pairs.append(
        FlowPair(
            name=f"{scene}_{number}",
            frame_1=frames / f"frame_{number}.png",
            frame_2=frames / f"frame_{_next(flow, number)}.png",
            flow=flow,
            occlusions=_if_file(folder / "occlusions" / masks),
            invalid=_if_file(folder / "invalid" / masks),
        )
    )
  return flow_pairs.checked(pairs, folder / "flow")


def sintel_frames(root: image_files.Path, split: str, render: str) -> Frames:
  """Returns the scenes of MPI-Sintel's "training" or "test" in one pass."""
  folder = paths.find(root, (f"MPI-Sintel/{split}", split), f"{render}/*")
  return _subfolders(folder / render, "*")


def middlebury(root: image_files.Path) -> FramePairs:
  """Returns Middlebury's other-data: frame10, frame11 and flow10."""
  folder = paths.find(root, ("middlebury", ""), "other-gt-flow")
  pairs = []
  for flow in sorted(folder.glob("other-gt-flow/*/flow10.flo")):
    frames = folder / "other-data" / flow.parent.name
    pairs.append(
        FlowPair(
            name=flow.parent.name,
            frame_1=frames / "frame10.png",
            frame_2=frames / "frame11.png",
            flow=flow,
        )
    )
  return flow_pairs.checked(pairs, folder / "other-gt-flow")


def middlebury_frames(root: image_files.Path) -> Frames:
  """Returns the scenes of Middlebury's other-data, as many frames as are there."""
  folder = paths.find(root, ("middlebury", ""), "other-data")
  return _subfolders(folder / "other-data", "*")


def pairs(root: image_files.Path) -> FramePairs:
  """Returns any pairs with flow: NAME_img1, NAME_img2 and NAME_flow below pairs.

  Frames end as images do, flow as one of flow_files.FLOW_READERS; NAME_occ.png, if
  it is there, is not black where frame 2 does not show the pixel. All four lie
  in one folder, which may be below `pairs`.
  """
  folder = paths.find(root, ("pairs",), "**/*_flow.*")
  found = []
  for flow in sorted(folder.glob("**/*_flow.*")):
    stem = flow.stem.removesuffix("_flow")
    name = (flow.parent / stem).relative_to(folder).as_posix()
    found.append(
        FlowPair(
            name=name.replace("/", "_"),
            frame_1=_image(flow.parent, f"{stem}_img1"),
            frame_2=_image(flow.parent, f"{stem}_img2"),
            flow=flow,
            occlusions=_if_file(flow.parent / f"{stem}_occ.png"),
        )
    )
  return flow_pairs.checked(found, folder)


def _image(folder: paths.Location, stem: str) -> paths.Location:
  """Returns the image file of that stem; that of a .png if there is none."""
  candidates = [folder / f"{stem}{suffix}" for suffix in image_files.SUFFIXES]
  return next((path for path in candidates if path.is_file()), candidates[0])


def _kitti_images(folder: paths.Location, year: str) -> paths.Location:
  names = _KITTI[year][1]
  for name in names:
    if (folder / name).is_dir():
      return folder / name
  raise UserError(
      f"{folder / names[0]}: not found; expected a folder of frames "
      f"({' or '.join(names)})"
  )


def _kitti_places(year: str, part: str, split: str) -> tuple[str, ...]:
  archive = f"kitti/data_{_KITTI[year][0]}_flow{part}/{split}"
  return archive, f"kitti/{year}{part}/{split}", split


def kitti(
    root: image_files.Path, year: str, *, truth: str = "flow_occ"
) -> FramePairs:
  """Returns KITTI "2012"'s or "2015"'s training pairs.

  With `truth="flow_noc"` only what both frames see is valid.
  """
  folder = paths.find(root, _kitti_places(year, "", "training"), truth)
  frames = _kitti_images(folder, year)
  pairs = [
      FlowPair(
          name=name,
          frame_1=frames / f"{name}_10.png",
          frame_2=frames / f"{name}_11.png",
          flow=folder / truth / f"{name}_10.png",
          flow_visible=_if_file(folder / "flow_noc" / f"{name}_10.png"),
      )
      for name in _stems(folder / truth, r"([0-9]+)_10\.png")
  ]
  return flow_pairs.checked(pairs, folder / truth)


def kitti_frames(
    root: image_files.Path, year: str, split: str, *, multiview: bool = False
) -> Frames:
  """Returns the left camera's frames, "training" or "testing".

  With `multiview` they are of the multi-view extension.
  """
  part = "_multiview" if multiview else ""
  folder = paths.find(root, _kitti_places(year, part, split), "*_[02]")
  frames = _kitti_images(folder, year)
  return frames, [frames]


def hd1k(root: image_files.Path) -> FramePairs:
  """Returns HD1K: each frame with the next one of its sequence."""
  folder = paths.find(root, _HD1K, "hd1k_flow_gt/flow_occ")
  frames = folder / "hd1k_input" / "image_2"
  names = sorted(
      n for n in flow_pairs.listing(frames) if re.fullmatch(r"\d+_\d+.png", n)
  )
  pairs = []
  for name, after in zip(names, names[1:], strict=False):
    flow = _if_file(folder / "hd1k_flow_gt" / "flow_occ" / name)
    # The last frame of a sequence has a flow, but its second frame is not here.
    if flow is not None and name.split("_")[0] == after.split("_")[0]:
      pairs.append(
          FlowPair(
              name=name.removesuffix(".png"),
              frame_1=frames / name,
              frame_2=frames / after,
              flow=flow,
          )
      )
  return flow_pairs.checked(pairs, folder / "hd1k_flow_gt" / "flow_occ")


def hd1k_frames(root: image_files.Path, part: str) -> Frames:
  """Returns the frames of "hd1k_input" (training) or "hd1k_challenge" (test)."""
  folder = paths.find(root, _HD1K, f"{part}/image_2") / part
  return _subfolders(folder, "image_2")


def spring(
    root: image_files.Path, *, camera: str = "left", direction: str = "future"
) -> FramePairs:
  """Returns Spring's training pairs, on the grid of the frames.

  The flow has twice the frames' height and width, and is in the frames' pixels:
  `flow` is the upper left of each 2x2 vectors, not scaled, as Spring's own
  loader has it (github.com/cv-stuttgart/spring_utils, dataloader.py), `flow_all`
  all four, which its evaluation reads. The match map, at the frames' size, is
  not black where a pixel has no match, hidden or out of the frame.
  """
  folder = paths.find(root, _SPRING, "train/*/frame_left") / "train"
  code, step = {"future": ("FW", 1), "past": ("BW", -1)}[direction]
  kind = f"flow_{code}_{camera}"
  pairs = []
  for flow in sorted(folder.glob(f"*/{kind}/{kind}_*.flo5")):
    scene, number = flow.parent.parent, flow.stem.removeprefix(f"{kind}_")
    frames = scene / f"frame_{camera}"
    match = f"matchmap_{kind}"
    pairs.append(
        FlowPair(
            name=f"{scene.name}_{number}",
            frame_1=frames / f"frame_{camera}_{number}.png",
            frame_2=frames / f"frame_{camera}_{_next(flow, number, step)}.png",
            flow=flow,
            occlusions=_if_file(
                scene / "maps" / match / f"{match}_{number}.png"
            ),
            flow_scale=2,
        )
    )
  return flow_pairs.checked(pairs, folder)


def spring_frames(root: image_files.Path, split: str) -> Frames:
  """Returns the scenes of Spring's "train" or "test", of both cameras."""
  folder = paths.find(root, _SPRING, f"{split}/*/frame_left") / split
  return _subfolders(folder, *(f"*/frame_{camera}" for camera in _CAMERAS))


def tartanair(root: image_files.Path) -> FramePairs:
  """Returns TartanAir's pairs of the left camera, valid where the mask is 0.

  The mask marks what is occluded, leaves the picture or moves by itself, whose
  flow is wrong, as one; so `visible` is not told apart.
  """
  folder = paths.find(
      root, _TARTAN, *(f"{t}/image_left" for t in _TRAJECTORIES)
  )
  pairs = []
  for trajectories in _TRAJECTORIES:
    for path in sorted(folder.glob(trajectories)):
      name = path.relative_to(folder).as_posix().replace("/", "_")
      for stem in _stems(path / "flow", r"([0-9]+_[0-9]+)_flow\.npy"):
        first, second = stem.split("_")
        pairs.append(
            FlowPair(
                name=f"{name}_{first}",
                frame_1=path / "image_left" / f"{first}_left.png",
                frame_2=path / "image_left" / f"{second}_left.png",
                flow=path / "flow" / f"{stem}_flow.npy",
                invalid=path / "flow" / f"{stem}_mask.npy",
            )
        )
  return flow_pairs.checked(pairs, folder)


def tartanair_frames(root: image_files.Path) -> Frames:
  """Returns TartanAir's trajectories, of both cameras."""
  folder = paths.find(
      root, _TARTAN, *(f"{t}/image_left" for t in _TRAJECTORIES)
  )
  return _subfolders(folder, *(f"{t}/image_*" for t in _TRAJECTORIES))


def viper(root: image_files.Path, split: str) -> FramePairs:
  """Returns VIPER's "train" or "val" pairs, each frame with the next."""
  folder = paths.find(root, _VIPER, f"{split}/flow") / split
  pairs = []
  for scene in sorted((folder / "flow").glob("*")):
    frames = folder / "img" / scene.name
    # Frames are published as png and, a tenth of the size, as jpg.
    suffix = "png" if any(frames.glob("*.png")) else "jpg"
    for flow in sorted(scene.glob("*_*.npz")):
      number = flow.stem.split("_")[1]
      # Some of the published files are empty, as 041_01849.npz.
      if flow.stat().st_size:
        after = f"{scene.name}_{_next(flow, number)}.{suffix}"
        pairs.append(
            FlowPair(
                name=flow.stem,
                frame_1=frames / f"{flow.stem}.{suffix}",
                frame_2=frames / after,
                flow=flow,
            )
        )
  return flow_pairs.checked(pairs, folder / "flow")


def viper_frames(root: image_files.Path, split: str) -> Frames:
  """Returns the sequences of VIPER's "train", "val" or "test" frames."""
  folder = paths.find(root, _VIPER, f"{split}/img") / split
  return _subfolders(folder / "img", "*")
