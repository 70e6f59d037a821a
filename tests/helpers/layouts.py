"""One tiny example of every motion set, in its official layout.

A frame's red is its number, its green says which of several sets it is of:
1 for the final pass, 2 for the right camera, 4 for a test split, added up.
"""

import pathlib

import h5py
import numpy as np
from PIL import Image

from mcjepa_jax.data.readers import flow_files

SIZE = (4, 6)
FINAL, RIGHT, TEST = 1, 2, 4
_RENDERS = {"clean": 0, "final": FINAL}
_CAMERAS = {"left": 0, "right": RIGHT}


def image(path, number=0, code=0, *, size=SIZE, mode="RGB"):
  """Writes a frame of one colour."""
  path.parent.mkdir(parents=True, exist_ok=True)
  colour = Image.new("RGB", size[::-1], (number, code, 255))
  colour.convert(mode).save(path)


def flow(path, u=1.0, *, size=SIZE, valid=None):
  """Writes a constant flow (u, -2) in the format of the suffix."""
  path.parent.mkdir(parents=True, exist_ok=True)
  values = np.full((*size, 2), (u, -2), np.float32)
  if path.suffix == ".npy":
    np.save(path, values)
  elif path.suffix == ".npz":
    np.savez_compressed(
        path,
        u=values[..., 0].astype(np.float16),
        v=values[..., 1].astype(np.float16),
    )
  elif path.suffix == ".flo5":
    with h5py.File(path, "w") as store:
      store.create_dataset("flow", data=values, compression="gzip")
  else:
    write = {
        ".flo": flow_files.write_flo,
        ".pfm": flow_files.write_pfm,
        ".png": flow_files.write_kitti_flow,
    }[path.suffix]
    write(path, values, valid)


def mask(path, column, *, size=SIZE, colour=(255, 255, 255)):
  """Writes a mask that is black but for one column."""
  path.parent.mkdir(parents=True, exist_ok=True)
  values = np.zeros((*size, 3), np.uint8)
  values[:, column] = colour
  Image.fromarray(values).save(path)


def flying_chairs(root, names=("00001", "00002", "00010")):
  """FlyingChairs without its split file."""
  for name in names:
    for frame in (1, 2):
      image(root / f"{name}_img{frame}.ppm", frame)
    flow(root / f"{name}_flow.flo")


def flying_chairs_2(root):
  """Pairs among masks that are numbered as frames are."""
  for code, split in enumerate(("train", "val")):
    for frame in (0, 1):
      image(root / split / f"0000003-img_{frame}.png", frame, TEST * code)
    for number, kind in ((0, "occ"), (1, "mb"), (2, "oids")):
      for way in ("01", "10"):
        mask(root / split / f"0000003-{kind}_{way}.png", number)
    flow(root / split / "0000003-flow_01.flo", u=1)
    flow(root / split / "0000003-flow_10.flo", u=-1)


def flying_things(root, kind="", suffix="png"):
  """One scene a split, frames 6 to 8, a flow of every frame both ways."""
  for code, split in ((0, "TRAIN"), (TEST, "TEST")):
    for camera, side in _CAMERAS.items():
      for number in (6, 7, 8):
        for render, passed in _RENDERS.items():
          place = f"frames_{render}pass{kind}/{split}/B/0003/{camera}"
          name = f"{number:04d}.{suffix}"
          image(root / place / name, number, code + side + passed)
        for way, u in (("future", 1), ("past", -1)):
          place = f"optical_flow/{split}/B/0003/into_{way}/{camera}"
          name = (
              f"OpticalFlowInto{way.title()}_{number:04d}_{camera[0].upper()}"
          )
          flow(root / place / f"{name}.pfm", u=u)


def flying_things_subset(root):
  """Two scenes of two frames: 0 and 1, 2 and 3."""
  for code, split in ((0, "train"), (TEST, "val")):
    for camera, side in _CAMERAS.items():
      for number in range(4):
        for render, passed in _RENDERS.items():
          place = root / split / f"image_{render}" / camera
          image(place / f"{number:07d}.png", number, code + side + passed)
        way, u = ("past", -1) if number % 2 else ("future", 1)
        place = f"{camera}/into_{way}/{number:07d}"
        flow(root / split / "flow" / f"{place}.flo", u=u)
        mask(root / split / "flow_occlusions" / f"{place}.png", number)


def sintel(root):
  """Scenes of three frames, with truth in training alone."""
  for code, scene in ((0, "training/{}/alley_1"), (TEST, "test/{}/tiger")):
    for render, passed in _RENDERS.items():
      for number in (1, 2, 3):
        name = f"frame_{number:04d}.png"
        image(root / scene.format(render) / name, number, code + passed)
  for number in (1, 2):
    flow(root / f"training/flow/alley_1/frame_{number:04d}.flo", u=number)


def kitti(root, images="image_2"):
  """Two scenes with a pair each, as either year's archive unpacks."""
  known = np.zeros((*SIZE, 1), np.float32)
  known[:, :3] = 1
  seen = known.copy()
  seen[:, 2] = 0
  for name in ("000000", "000007"):
    for code, split in ((0, "training"), (TEST, "testing")):
      for frame in (10, 11):
        image(root / split / images / f"{name}_{frame}.png", frame, code)
    flow(root / "training/flow_occ" / f"{name}_10.png", valid=known)
    flow(root / "training/flow_noc" / f"{name}_10.png", valid=seen)


def kitti_multiview(root, images="image_2"):
  """One scene, frames 7 to 14."""
  for code, split in ((0, "training"), (TEST, "testing")):
    for frame in range(7, 15):
      image(root / split / images / f"000000_{frame:02d}.png", frame, code)


def hd1k(root):
  """A sequence of two frames, and one of one."""
  for name in ("000000_0010", "000000_0020", "000001_0010"):
    number = int(name[-2:])
    image(root / "hd1k_input/image_2" / f"{name}.png", number)
    image(root / "hd1k_challenge/image_2" / f"{name}.png", number, TEST)
    flow(root / "hd1k_flow_gt/flow_occ" / f"{name}.png")


def spring(root):
  """A scene a split; flow of twice the frames' height and width."""
  for camera, side in _CAMERAS.items():
    for number in (1, 2, 3):
      name = f"frame_{camera}/frame_{camera}_{number:04d}.png"
      image(root / "train/0001" / name, number, side)
      image(root / "test/0003" / name, number, side + TEST)
    for way, numbers, u in (("FW", (1, 2), 1), ("BW", (2, 3), -1)):
      for number in numbers:
        kind = f"flow_{way}_{camera}"
        path = root / "train/0001" / kind / f"{kind}_{number:04d}.flo5"
        flow(path, u=u, size=(8, 12))
        name = f"matchmap_{kind}/matchmap_{kind}_{number:04d}.png"
        green = (0, 255, 0)
        mask(root / "train/0001/maps" / name, number, colour=green)


def middlebury(root):
  """Two scenes, one without ground truth."""
  for scene in ("Beanbags", "RubberWhale"):
    for frame in (10, 11):
      image(root / "other-data" / scene / f"frame{frame}.png", frame)
  valid = np.ones((*SIZE, 1), np.float32)
  valid[1, 2] = 0
  flow(root / "other-gt-flow/RubberWhale/flow10.flo", valid=valid)


def tartanair(root):
  """A trajectory of three frames."""
  place = root / "office/Easy/P000"
  for number in range(3):
    for camera, side in _CAMERAS.items():
      name = f"image_{camera}/{number:06d}_{camera}.png"
      image(place / name, number, side)
  for number in range(2):
    pair = place / "flow" / f"{number:06d}_{number + 1:06d}"
    flow(pair.with_name(f"{pair.name}_flow.npy"))
    wrong = np.zeros(SIZE, np.uint8)
    wrong[:, :3] = (1, 10, 100)
    np.save(pair.with_name(f"{pair.name}_mask.npy"), wrong)


def viper(root):
  """Frames that come in pairs, ten apart, and a flow file that is empty."""
  for code, split in ((0, "train"), (TEST, "val"), (TEST, "test")):
    for number in (10, 11, 20, 21):
      image(root / split / "img/002" / f"002_{number:05d}.jpg", number, code)
    if split != "test":
      flow(root / split / "flow/002/002_00010.npz")
      (root / split / "flow/002/002_00020.npz").write_bytes(b"")


def davis(root):
  """A sequence of two frames beside its masks."""
  for number in (0, 1):
    name = f"480p/bear/{number:05d}"
    image(root / "JPEGImages" / f"{name}.jpg", number)
    mask(root / "Annotations" / f"{name}.png", number)


def write(root: pathlib.Path):
  """Writes all of them below one data root."""
  flying_chairs(root / "FlyingChairs_release/data")
  split = root / "FlyingChairs_release/FlyingChairs_train_val.txt"
  split.write_text("1\n2\n1\n")
  flying_chairs_2(root / "FlyingChairs2")
  flying_things(root / "FlyingThings3D")
  flying_things_subset(root / "FlyingThings3D_subset")
  sintel(root / "MPI-Sintel")
  kitti(root / "kitti/data_stereo_flow", "colored_0")
  kitti(root / "kitti/data_scene_flow")
  kitti_multiview(root / "kitti/data_stereo_flow_multiview", "colored_0")
  kitti_multiview(root / "kitti/data_scene_flow_multiview")
  hd1k(root / "HD1K")
  spring(root / "spring")
  middlebury(root / "middlebury")
  tartanair(root / "TartanAir")
  viper(root / "VIPER")
  davis(root / "DAVIS")


def whole_kitti_2012_test(root):
  """KITTI 2012's test set, its 195 pairs of small noise."""
  for i in range(195):
    for number in (10, 11):
      image(
          root / "kitti/data_stereo_flow/testing/colored_0"
          / f"{i:06d}_{number}.png",
          i, number, size=(16, 24),
      )  # fmt: skip


# name: how many pairs, the first's name, its two frames, green of all frames.
TRAINED_ON = {
    "davis": (1, "bear/00000+1", (0, 1), {0}),
    "flying_chairs": (2, "00001", (1, 2), {0}),
    "flying_chairs_2": (1, "0000003", (0, 1), {0}),
    "flying_things": (4, "B/0003/left/0006+1", (6, 7), {0, RIGHT}),
    "flying_things_final": (
        *(4, "B/0003/left/0006+1", (6, 7)),
        {FINAL, FINAL + RIGHT},
    ),
    "flying_things_subset": (4, "left_0000000", (0, 1), {0, RIGHT}),
    "flying_things_subset_final": (
        *(4, "left_0000000", (0, 1)),
        {FINAL, FINAL + RIGHT},
    ),
    "hd1k": (1, "image_2/000000_0010+1", (10, 20), {0}),
    "hd1k_test": (1, "image_2/000000_0010+1", (10, 20), {TEST}),
    "kitti_2012": (2, "000000_10+1", (10, 11), {0}),
    "kitti_2012_test": (2, "000000_10+1", (10, 11), {TEST}),
    "kitti_2012_multiview": (2, "000000_07+1", (7, 8), {0}),
    "kitti_2012_multiview_test": (7, "000000_07+1", (7, 8), {TEST}),
    "kitti_2015": (2, "000000_10+1", (10, 11), {0}),
    "kitti_2015_test": (2, "000000_10+1", (10, 11), {TEST}),
    "kitti_2015_multiview": (2, "000000_07+1", (7, 8), {0}),
    "kitti_2015_multiview_test": (7, "000000_07+1", (7, 8), {TEST}),
    "middlebury": (2, "Beanbags/frame10+1", (10, 11), {0}),
    "sintel_clean": (2, "alley_1/frame_0001+1", (1, 2), {0}),
    "sintel_final": (2, "alley_1/frame_0001+1", (1, 2), {FINAL}),
    "sintel_test_clean": (2, "tiger/frame_0001+1", (1, 2), {TEST}),
    "sintel_test_final": (2, "tiger/frame_0001+1", (1, 2), {TEST + FINAL}),
    "spring": (4, "0001/frame_left/frame_left_0001+1", (1, 2), {0, RIGHT}),
    "spring_test": (
        *(4, "0003/frame_left/frame_left_0001+1", (1, 2)),
        {TEST, TEST + RIGHT},
    ),
    "tartanair": (
        *(4, "office/Easy/P000/image_left/000000_left+1", (0, 1)),
        {0, RIGHT},
    ),
    "viper": (2, "002/002_00010+1", (10, 11), {0}),
    "viper_test": (2, "002/002_00010+1", (10, 11), {TEST}),
}
# The same, with u of the flow in place of the frames' green, and that after it.
EVALUATED = {
    "flying_chairs": (1, "00002", (1, 2), 1, 0),
    "flying_chairs_2": (1, "0000003", (0, 1), 1, TEST),
    "hd1k": (1, "000000_0010", (10, 20), 1, 0),
    "kitti_2012": (2, "000000", (10, 11), 1, 0),
    "kitti_2012_noc": (2, "000000", (10, 11), 1, 0),
    "kitti_2015": (2, "000000", (10, 11), 1, 0),
    "kitti_2015_noc": (2, "000000", (10, 11), 1, 0),
    "middlebury": (1, "RubberWhale", (10, 11), 1, 0),
    "sintel_clean": (2, "alley_1_0001", (1, 2), 1, 0),
    "sintel_final": (2, "alley_1_0001", (1, 2), 1, FINAL),
    "spring": (2, "0001_0001", (1, 2), 1, 0),
    "spring_past": (2, "0001_0002", (2, 1), -1, 0),
    "spring_right": (2, "0001_0001", (1, 2), 1, RIGHT),
    "spring_right_past": (2, "0001_0002", (2, 1), -1, RIGHT),
    "tartanair": (2, "office_Easy_P000_000000", (0, 1), 1, 0),
    "viper": (1, "002_00010", (10, 11), 1, TEST),
}
for _name, _green in (
    *(("", 0), ("_right", RIGHT), ("_final", FINAL)),
    ("_final_right", FINAL + RIGHT),
):
  EVALUATED |= {
      f"flying_things{_name}": (2, "B_0003_0006", (6, 7), 1, TEST + _green),
      f"flying_things{_name}_past": (
          *(2, "B_0003_0007", (7, 6), -1),
          TEST + _green,
      ),
      f"flying_things_subset{_name}": (
          *(2, f"{'right' if _green & RIGHT else 'left'}_0000000", (0, 1), 1),
          TEST + _green,
      ),
      f"flying_things_subset{_name}_past": (
          *(2, f"{'right' if _green & RIGHT else 'left'}_0000001", (1, 0), -1),
          TEST + _green,
      ),
  }
