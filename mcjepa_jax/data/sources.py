"""The data sets by the names that a config uses, each under one data root.

A set is a name here, facts in `catalog`, a layout in `sets` and, for a format of
its own, a reader in `readers`.

Procedural examples for training and for evaluation come from different seeds;
`labelled`, `flow_pairs` and `mask_sequences` are for evaluation only.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
from typing import Any

from jaxtyping import Integer
import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.data.readers import video_files
from mcjepa_jax.data.sets import (
    cutouts,
    flow_sets,
    frame_folders,
    image_sets,
    mask_sets,
    record_sets,
    segmentation_sets,
    sequences,
    synthetic,
)
from mcjepa_jax.storage import paths

# A training run never sees all: an epoch is longer than the quickstart.
_TRAIN_PAIRS = 1_000_000
_TRAIN_IMAGES = 1_000_000
_STILL = 0.5  # mean change, of 255, under which a filmed pair is left out
# Motion sources whose pairs are of no sequence.
_WITHOUT_SEQUENCES = frozenset(
    (
        "synthetic",
        "cutouts",
        "flying_chairs",
        "flying_chairs_2",
        "flying_things_subset",
        "flying_things_subset_final",
    )
)
# Sets of labelled images that have a split.
_LABEL_PARTS = {
    "cifar10_bin": ("cifar10_bin_train", "cifar10_bin_test"),
    "imagenet": ("imagenet_train", "imagenet_val"),
    "imagenet_records": ("imagenet_train_records", "imagenet_val_records"),
    "imagenet_tfds": ("imagenet_train_tfds", "imagenet_val_tfds"),
    "stl10": ("stl10_train", "stl10_test"),
}
_TESTED_OF = 5  # of a set without a split every fifth image is tested
# Frames 10 and 11 are what kitti_20.. evaluates: neither they nor their
# neighbours are trained on, as in github.com/lliuz/ARFlow (KITTIFlowMV).
_KITTI_EVALUATED = r".*_(09|10|11|12)"
# The extension may be unpacked into the folder of the pairs.
_KITTI_NO_PAIR = r".*_(?!10|11)[0-9]+"


class UnknownName(errors.UserError):
  """No source of a kind is called so; `names` are those that there are."""

  def __init__(self, message: str, names: tuple[str, ...]):
    super().__init__(message)
    self.names = names


def choice(table: dict[str, Any], name: str, key: str) -> Any:
  """The entry of a literal table, or an error that lists its names."""
  if name not in table:
    names = tuple(sorted(table))
    raise UnknownName(
        f"{key}: expected one of {', '.join(names)}, got {name!r}", names
    )
  return table[name]


def sized(
    entries: Sequence[tuple], size: tuple[int, int]
) -> list[tuple[str, float, tuple[int, int]]]:
  """(name, number, (h, w)) of motion's sources; `size` where one names none."""
  return [
      (name, number, tuple(own[0]) if own else tuple(size))
      for name, number, *own in entries
  ]


def motion(
    name: str,
    root: str | paths.Location,
    *,
    seed: int,
    size: tuple[int, int],
    gaps: tuple[int, int] = (1, 1),
) -> Any:
  """The frame pairs of a training source: {frame_1, frame_2}, no labels.

  `gaps` is the range of frames between the two of a pair, in sequences. A set
  with a split is trained on its training part, and a name with `test` in it
  reads frames whose truth is not published.
  """
  make = choice(_motion_table(seed, size, gaps), name, "motion.sources")
  return make(_root(root, name))


def _motion_table(
    seed: int, size: tuple[int, int], gaps: tuple[int, int]
) -> dict[str, Callable[[paths.Location], Any]]:

  def in_sequence(find, *args, leave_out="", **options):
    def make(root):
      found = find(root, *args, **options)
      folders = frame_folders.frame_folders(*found, leave_out=leave_out)
      return sequences.SequencePairs(folders, gaps=gaps)

    return make

  def filmed(found):
    return sequences.SequencePairs(
        found, gaps=gaps, skip_cuts=True, min_change=_STILL
    )

  # Pairs that belong to no sequence: `gaps` says nothing about them.
  def pairs(find, split, **options):
    return lambda root: find(root, split, labels=False, **options)

  def kitti(year):
    name = f"kitti_{year}"
    frames = functools.partial(in_sequence, flow_sets.kitti_frames, year)
    return {
        name: frames("training", leave_out=_KITTI_NO_PAIR),
        f"{name}_test": frames("testing", leave_out=_KITTI_NO_PAIR),
        f"{name}_multiview": frames(
            "training", multiview=True, leave_out=_KITTI_EVALUATED
        ),
        f"{name}_multiview_test": frames("testing", multiview=True),
    }

  flows = flow_sets
  both = ("left", "right")
  return {
      "synthetic": lambda root: train_pairs(seed, size, _TRAIN_PAIRS),
      "cutouts": lambda root: _cutouts(
          root, _train_seed(seed), size, _TRAIN_PAIRS
      ),
      "video": lambda root: filmed(video_files.videos(root / "video")),
      "frames": lambda root: filmed(
          frame_folders.frame_folders(root / "frames")
      ),
      "davis": in_sequence(lambda root: (root / "DAVIS/JPEGImages/480p",)),
      "flying_chairs": pairs(flows.flying_chairs, "training"),
      "flying_chairs_2": pairs(flows.flying_chairs_2, "train"),
      "flying_things": in_sequence(flows.flying_things_frames, "clean"),
      "flying_things_final": in_sequence(flows.flying_things_frames, "final"),
      "flying_things_subset": pairs(
          flows.flying_things_subset, "train", cameras=both
      ),
      "flying_things_subset_final": pairs(
          flows.flying_things_subset, "train", cameras=both, render="final"
      ),
      "hd1k": in_sequence(flows.hd1k_frames, "hd1k_input"),
      "hd1k_test": in_sequence(flows.hd1k_frames, "hd1k_challenge"),
      **kitti("2012"),
      **kitti("2015"),
      "middlebury": in_sequence(flows.middlebury_frames),
      "sintel_clean": in_sequence(flows.sintel_frames, "training", "clean"),
      "sintel_final": in_sequence(flows.sintel_frames, "training", "final"),
      "sintel_test_clean": in_sequence(flows.sintel_frames, "test", "clean"),
      "sintel_test_final": in_sequence(flows.sintel_frames, "test", "final"),
      "spring": in_sequence(flows.spring_frames, "train"),
      "spring_test": in_sequence(flows.spring_frames, "test"),
      "tartanair": in_sequence(flows.tartanair_frames),
      "viper": in_sequence(flows.viper_frames, "train"),
      "viper_test": in_sequence(flows.viper_frames, "test"),
  }


def images(
    name: str, root: str | paths.Location, *, seed: int, size: int
) -> Any:
  """The images of a training source: {image}, labels never read.

  The name of a motion source that has sequences gives all their frames: one
  domain for both tasks.
  """

  def frames(pairs):
    return lambda root: image_sets.SequenceFrames(pairs(root).sequences)

  table = {
      motion_name: frames(make)
      for motion_name, make in _motion_table(seed, (size, size), (1, 1)).items()
      if motion_name not in _WITHOUT_SEQUENCES
  } | {
      "synthetic": lambda root: train_images(seed, size, _TRAIN_IMAGES),
      "imagenet": lambda root: image_sets.ImageFolder(
          root / "imagenet" / "train"
      ),
      "imagenet_tfds": lambda root: _tfds(root / "imagenet2012", "train"),
      "imagenet_records": lambda root: record_sets.ConvertedImages(
          root / "imagenet_records" / "train"
      ),
      "images": lambda root: image_sets.ImageFolder(root / "images"),
      "records": lambda root: record_sets.ConvertedImages(root / "records"),
      "cifar10": lambda root: image_sets.NpzImages(
          root / "cifar10" / "train.npz"
      ),
      "cifar10_bin": lambda root: image_sets.cifar10_binary(
          root / "cifar-10-batches-bin", "train"
      ),
      "stl10": lambda root: image_sets.stl10_binary(
          root / "stl10_binary", "unlabeled"
      ),
      # Where nothing moves too, of which there are no pairs.
      "video": lambda root: image_sets.SequenceFrames(
          video_files.videos(root / "video")
      ),
      "frames": lambda root: image_sets.SequenceFrames(
          frame_folders.frame_folders(root / "frames")
      ),
  }
  make = choice(table, name, "content.sources")
  return make(_root(root, name))


def _tfds(folder: paths.Location, split: str) -> record_sets.TfdsImages:
  """A split of the one version of a set that tfds has prepared."""
  found = sorted(folder.glob("*/dataset_info.json"))
  if len(found) != 1:
    versions = [path.parent.name for path in found] or "none"
    raise errors.UserError(
        f"{folder}: expected one version prepared by tfds, such as 5.1.0, with"
        f" its dataset_info.json, came {versions}"
    )
  return record_sets.TfdsImages(found[0].parent, split)


def flow_pairs(
    name: str,
    root: str | paths.Location,
    *,
    seed: int,
    size: tuple[int, int],
    count: int,
) -> Any:
  """A set with true flow: {frame_1, frame_2, flow, valid}.

  A set with a split is evaluated on its validation or test part, as far as that
  has truth. Without more in the name it is the clean pass of the left camera,
  into the future. `seed`, `size` and `count` are of the procedural set and the
  cut-outs alone.
  """
  flows, only = flow_sets, functools.partial
  things = only(flows.flying_things, split="TEST")
  subset = only(flows.flying_things_subset, split="val")
  final = dict(render="final")
  right, past = dict(camera="right"), dict(direction="past")
  rights = dict(cameras=("right",))
  table = {
      "synthetic": lambda folder: synthetic.Pairs(
          size=size, seed=seed, num_examples=count
      ),
      "cutouts": lambda folder: _cutouts(folder, seed, size, count),
      "flying_chairs": only(flows.flying_chairs, split="validation"),
      "flying_chairs_2": only(flows.flying_chairs_2, split="val"),
      "flying_things": things,
      "flying_things_past": only(things, **past),
      "flying_things_right": only(things, **right),
      "flying_things_right_past": only(things, **right, **past),
      "flying_things_final": only(things, **final),
      "flying_things_final_past": only(things, **final, **past),
      "flying_things_final_right": only(things, **final, **right),
      "flying_things_final_right_past": only(things, **final, **right, **past),
      "flying_things_subset": subset,
      "flying_things_subset_past": only(subset, **past),
      "flying_things_subset_right": only(subset, **rights),
      "flying_things_subset_right_past": only(subset, **rights, **past),
      "flying_things_subset_final": only(subset, **final),
      "flying_things_subset_final_past": only(subset, **final, **past),
      "flying_things_subset_final_right": only(subset, **final, **rights),
      "flying_things_subset_final_right_past": only(
          subset, **final, **rights, **past
      ),
      "hd1k": flows.hd1k,
      "kitti_2012": only(flows.kitti, year="2012"),
      "kitti_2012_noc": only(flows.kitti, year="2012", truth="flow_noc"),
      "kitti_2015": only(flows.kitti, year="2015"),
      "kitti_2015_noc": only(flows.kitti, year="2015", truth="flow_noc"),
      "middlebury": flows.middlebury,
      "pairs": flows.pairs,
      "sintel_clean": only(flows.sintel, render="clean"),
      "sintel_final": only(flows.sintel, render="final"),
      "spring": flows.spring,
      "spring_past": only(flows.spring, **past),
      "spring_right": only(flows.spring, **right),
      "spring_right_past": only(flows.spring, **right, **past),
      "tartanair": flows.tartanair,
      "viper": only(flows.viper, split="val"),
  }
  make = choice(table, name, "evals: flow")
  return make(_root(root, name))


def labelled(
    name: str,
    root: str | paths.Location,
    *,
    seed: int,
    size: int,
    count: int,
) -> Any:
  """A set of images with labels: {image, label}.

  Sorted by label: folders, records (in each shard) and cifar10, the .npz. Not
  sorted: synthetic, cifar10_bin and tfds, which shuffles as it writes. Of
  STL-10 its page does not say.
  """
  table = {
      "synthetic": lambda root: synthetic.Images(
          size=(size, size), seed=seed, num_examples=count
      ),
      "cifar10": lambda root: image_sets.NpzImages(
          root / "cifar10" / "train.npz"
      ),
      "imagenet_train": lambda root: image_sets.ImageFolder(
          root / "imagenet" / "train"
      ),
      "imagenet_train_tfds": lambda root: _tfds(root / "imagenet2012", "train"),
      "imagenet_train_records": lambda root: record_sets.ConvertedImages(
          root / "imagenet_records" / "train"
      ),
      "imagenet_val": lambda root: image_sets.ImageFolder(
          root / "imagenet" / "val"
      ),
      "imagenet_val_tfds": lambda root: _tfds(
          root / "imagenet2012", "validation"
      ),
      "imagenet_val_records": lambda root: record_sets.ConvertedImages(
          root / "imagenet_records" / "val"
      ),
      "cifar10_bin_train": lambda root: image_sets.cifar10_binary(
          root / "cifar-10-batches-bin", "train"
      ),
      "cifar10_bin_test": lambda root: image_sets.cifar10_binary(
          root / "cifar-10-batches-bin", "test"
      ),
      "stl10_train": lambda root: image_sets.stl10_binary(
          root / "stl10_binary", "train"
      ),
      "stl10_test": lambda root: image_sets.stl10_binary(
          root / "stl10_binary", "test"
      ),
  }
  make = choice(table, name, "evals: knn")
  examples = make(_root(root, name))
  if name != "synthetic" and not examples.classes:
    raise errors.UserError(
        f"{name}: expected images with labels, a folder for each class, came"
        " images without"
    )
  return examples


def segmentation(
    name: str, root: str | paths.Location
) -> segmentation_sets.Parts:
  """The parts of a set with label maps: {image, labels}, to train and to test."""
  sets, only = segmentation_sets, functools.partial
  table = {
      "ade20k": sets.ade20k,
      "ade20k_sample": sets.ade20k_sample,
      "camvid": sets.camvid,
      "camvid_val": only(sets.camvid, test="val"),
      "cityscapes": sets.cityscapes,
      "voc2012": sets.voc_2012,
      "voc2012_aug": only(sets.voc_2012, augmented=True),
  }
  make = choice(table, name, "evals: segmentation")
  return make(_root(root, name))


def mask_sequences(
    name: str, root: str | paths.Location
) -> mask_sets.MaskSequences:
  """A set of sequences with masks of their objects."""
  davis = mask_sets.davis
  table = {
      "2016": functools.partial(davis, year="2016"),
      "2017": functools.partial(davis, year="2017"),
      "youtube_vos": mask_sets.youtube_vos,
  }
  make = choice(table, name, "evals: davis")
  return make(_root(root, name))


class Subset:
  """The examples of a set at some indices."""

  def __init__(self, dataset: Any, indices: Integer[np.ndarray, "n"]):
    self._dataset, self._indices = dataset, indices

  @property
  def classes(self) -> list[str]:
    """Returns the set's, where it has labels."""
    return self._dataset.classes

  def __len__(self) -> int:
    return len(self._indices)

  def record_id(self, index: int) -> str:
    """Returns the example's name in the set."""
    return self._dataset.record_id(int(self._indices[index]))

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._dataset[int(self._indices[index])]


def evenly_spaced(dataset: Any, limit: int) -> Any:
  """At most `limit` examples, spread over the set; all of them if it is 0."""
  if not 0 < limit < len(dataset):
    return dataset
  return Subset(
      dataset, np.linspace(0, len(dataset) - 1, limit).round().astype(int)
  )


def label_parts(name: str) -> tuple[str, ...]:
  """The names, as `labelled` takes them, of a set's training and test part.

  One name where the set has no split of its own.
  """
  return _LABEL_PARTS.get(name, (name,))


def labelled_split(
    name: str,
    root: str | paths.Location,
    *,
    seed: int,
    eval_seed: int,
    size: int,
    counts: tuple[int, int],
) -> tuple[Any, Any]:
  """The training and the test part of a set of images with labels.

  The set's own, or else four fifths and a fifth of it, taken turn by turn: such
  sets are sorted by label. `counts` are of the procedural set alone.
  """
  if name == "synthetic":
    options = dict(seed=eval_seed, size=size, count=counts[1])
    test = labelled(name, root, **options)
    return train_images(seed, size, counts[0]), test
  try:
    parts = [
        labelled(part, root, seed=eval_seed, size=size, count=counts[1])
        for part in label_parts(name)
    ]
  except UnknownName as error:
    names = dict.fromkeys((*error.names, *_LABEL_PARTS))
    choice(names, name, "evals: knn, linear, finetune, rankme")
    raise
  if len(parts) == 1:
    index = np.arange(len(parts[0]))
    tested = index % _TESTED_OF == 0
    return tuple(Subset(parts[0], index[rows]) for rows in (~tested, tested))
  train, test = parts
  if train.classes != test.classes:
    differ = sorted(set(train.classes) ^ set(test.classes))[:5]
    raise errors.UserError(
        f"{name}: expected the same classes in training and test, came"
        f" {len(train.classes)} and {len(test.classes)}, not in both {differ}"
    )
  return train, test


def train_images(seed: int, size: int, count: int) -> Any:
  """The first procedural training images, with labels: kNN's bank."""
  return synthetic.Images(
      size=(size, size), seed=_train_seed(seed), num_examples=count
  )


def train_pairs(seed: int, size: tuple[int, int], count: int) -> Any:
  """The first procedural training pairs, with flow: the mean motion's source."""
  return synthetic.Pairs(size=size, seed=_train_seed(seed), num_examples=count)


def _cutouts(
    root: paths.Location, seed: int, size: tuple[int, int], count: int
) -> cutouts.Pairs:
  """Scenes out of root/images: other seeds share photographs, but no motion."""
  photographs = image_sets.ImageFolder(root / "images", min_side=2 * max(size))
  return cutouts.Pairs(photographs, size=size, seed=seed, num_examples=count)


def _train_seed(seed: int) -> int:
  """Even, where held-out seeds are odd: the two never meet."""
  return 2 * seed


def held_out_seed(eval_seed: int) -> int:
  """The generator's seed of held-out examples, never one of training's."""
  return 2 * eval_seed + 1


def data_root(folder: str, cache: str) -> str | paths.Location:
  """A config's data_root, as all sources here take it; "" where it is empty."""
  return paths.path(folder, cache) if folder else ""


def _root(root: str | paths.Location, name: str) -> paths.Location:
  if name != "synthetic" and not root:
    raise errors.UserError(
        f"data_root: expected the folder that holds {name!r}, got nothing;"
        " pass --config.data_root=FOLDER"
    )
  if name == "synthetic":
    return pathlib.Path()  # read by nothing
  return paths.require(paths.path(root), "data_root")
