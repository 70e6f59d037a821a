"""Small segmentation sets in their official layouts."""

import numpy as np
from PIL import Image

from tests.helpers import tiny
from tests.helpers.layouts import SIZE


def label_map(path, values, *, palette=False, size=SIZE):
  """Writes a label map that holds `values` in turn; returns them as an array."""
  path.parent.mkdir(parents=True, exist_ok=True)
  values = np.resize(np.array(values, np.uint8), size)
  image = Image.fromarray(values)
  if palette:
    image.putpalette(np.random.default_rng(0).bytes(768))
  image.save(path)
  return values


def voc(root):
  base = root / "VOCdevkit/VOC2012"
  for name in ("2007_01", "2007_02", "2008_03"):
    tiny.save_image(base / f"JPEGImages/{name}.jpg", SIZE)
  for name in ("2007_01", "2007_02"):
    label_map(
        base / f"SegmentationClass/{name}.png", (0, 20, 255), palette=True
    )
  # Of a name in both, VOC's own is read.
  for name in ("2007_01", "2008_03"):
    label_map(base / f"SegmentationClassAug/{name}.png", (5,))
  lists = base / "ImageSets/Segmentation"
  lists.mkdir(parents=True)
  for split, names in (
      ("train", ["2007_01"]),
      ("val", ["2007_02"]),
      ("trainaug", ["2008_03", "2007_01"]),
  ):
    (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
  return base


def cityscapes(root, kind="labelIds", values=(0, 7, 33)):
  for split, city in (("train", "aachen"), ("train", "bremen"), ("val", "ulm")):
    stem = f"{split}/{city}/{city}_000000_000019"
    tiny.save_image(
        root / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png", SIZE
    )
    # Others of the archive's kinds lie beside.
    label_map(root / f"cityscapes/gtFine/{stem}_gtFine_instanceIds.png", (1,))
    label_map(root / f"cityscapes/gtFine/{stem}_gtFine_{kind}.png", values)


def ade20k(root):
  base = root / "ADEChallengeData2016"
  for split, short in (("training", "train"), ("validation", "val")):
    name = f"ADE_{short}_00000001"
    tiny.save_image(base / f"images/{split}/{name}.jpg", SIZE)
    label_map(base / f"annotations/{split}/{name}.png", (0, 1, 150))


def camvid(root):
  for split in ("train", "val", "test"):
    tiny.save_image(root / f"CamVid/{split}/0001TP_1.png", SIZE)
    label_map(root / f"CamVid/{split}annot/0001TP_1.png", (0, 10, 11))
