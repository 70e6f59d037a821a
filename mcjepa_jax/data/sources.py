"""The data sets by the names that a config uses, each under one data root.

Procedural examples for training and for evaluation come from different seeds;
`labelled` and `flow_pairs` are for evaluation only.
"""

import functools
import pathlib
from typing import Any

from mcjepa_jax import errors
from mcjepa_jax.data import (
    array_records,
    flow_datasets,
    image_datasets,
    synthetic,
    video,
)

# A training run never sees all: an epoch is longer than the quickstart.
_TRAIN_PAIRS = 1_000_000
_TRAIN_IMAGES = 1_000_000
_STILL = 0.5  # mean change, of 255, under which a video's pair is left out


def choice(table: dict[str, Any], name: str, key: str) -> Any:
  """The entry of a literal table, or an error that lists its names."""
  if name not in table:
    raise errors.UserError(
        f"{key}: expected one of {', '.join(sorted(table))}, got {name!r}"
    )
  return table[name]


def motion(
    name: str,
    root: str,
    *,
    seed: int,
    size: tuple[int, int],
    gaps: tuple[int, int] = (1, 1),
) -> Any:
  """The frame pairs of a training source: {frame_1, frame_2}, no labels.

  `gaps` is the range of frames between the two of a pair, in sequences.
  """

  def folders(*parts):
    return lambda root: video.SequencePairs(
        video.frame_folders(root.joinpath(*parts)), gaps=gaps
    )

  table = {
      "synthetic": lambda root: train_pairs(seed, size, _TRAIN_PAIRS),
      "video": lambda root: video.SequencePairs(
          video.videos(root / "video"), gaps=gaps, min_change=_STILL
      ),
      "frames": folders("frames"),
      "davis": folders("DAVIS", "JPEGImages", "480p"),
      "sintel_clean": folders("MPI-Sintel", "training", "clean"),
      "sintel_final": folders("MPI-Sintel", "training", "final"),
      # Unrelated pairs: each is a sequence of two.
      "flying_chairs": lambda root: video.SequencePairs(
          video.frame_folders(root / "FlyingChairs_release" / "data"),
          skip_cuts=False,
      ),
  }
  make = choice(table, name, "motion.sources")
  return make(_root(root, name))


def images(name: str, root: str, *, seed: int, size: int) -> Any:
  """The images of a training source: {image}, labels never read.

  The frames are those of the motion sources: one domain for both tasks.
  """

  def frames(*parts):
    return lambda root: image_datasets.SequenceFrames(
        video.frame_folders(root.joinpath(*parts))
    )

  table = {
      "synthetic": lambda root: train_images(seed, size, _TRAIN_IMAGES),
      "imagenet": lambda root: image_datasets.ImageFolder(
          root / "imagenet" / "train"
      ),
      "imagenet_tfds": lambda root: _tfds(root / "imagenet2012", "train"),
      "imagenet_records": lambda root: array_records.ConvertedImages(
          root / "imagenet_records" / "train"
      ),
      "images": lambda root: image_datasets.ImageFolder(root / "images"),
      "records": lambda root: array_records.ConvertedImages(root / "records"),
      "cifar10": lambda root: image_datasets.NpzImages(
          root / "cifar10" / "train.npz"
      ),
      "cifar10_bin": lambda root: image_datasets.cifar10_binary(
          root / "cifar-10-batches-bin", "train"
      ),
      "stl10": lambda root: image_datasets.stl10_binary(
          root / "stl10_binary", "unlabeled"
      ),
      "video_frames": lambda root: image_datasets.SequenceFrames(
          video.videos(root / "video")
      ),
      "folder_frames": frames("frames"),
      "davis_frames": frames("DAVIS", "JPEGImages", "480p"),
      "sintel_clean_frames": frames("MPI-Sintel", "training", "clean"),
      "sintel_final_frames": frames("MPI-Sintel", "training", "final"),
      "flying_chairs_frames": frames("FlyingChairs_release", "data"),
  }
  make = choice(table, name, "content.source")
  return make(_root(root, name))


def _tfds(folder: pathlib.Path, split: str) -> array_records.TfdsImages:
  """A split of the one version of a set that tfds has prepared."""
  found = sorted(folder.glob("*/dataset_info.json"))
  if len(found) != 1:
    versions = [path.parent.name for path in found] or "none"
    raise errors.UserError(
        f"{folder}: expected one version prepared by tfds, such as 5.1.0, with"
        f" its dataset_info.json, came {versions}"
    )
  return array_records.TfdsImages(found[0].parent, split)


def flow_pairs(
    name: str, root: str, *, seed: int, size: tuple[int, int], count: int
) -> Any:
  """A set with true flow: {frame_1, frame_2, flow, valid}.

  `seed`, `size` and `count` are of the procedural set alone.
  """
  table = {
      set_name: functools.partial(flow_datasets.open_flow_set, set_name)
      for set_name in flow_datasets.FLOW_SETS
  }
  table["synthetic"] = lambda folder: synthetic.Pairs(
      size=size, seed=seed, num_examples=count
  )
  make = choice(table, name, "evals: flow")
  return make(_root(root, name))


def labelled(name: str, root: str, *, seed: int, size: int, count: int) -> Any:
  """A set of images with labels: {image, label}.

  Sorted by label: folders, records (in each shard) and cifar10, the .npz. Not
  sorted: synthetic, cifar10_bin and tfds, which shuffles as it writes. Of
  STL-10 its page does not say.
  """
  table = {
      "synthetic": lambda root: synthetic.Images(
          size=(size, size), seed=seed, num_examples=count
      ),
      "cifar10": lambda root: image_datasets.NpzImages(
          root / "cifar10" / "train.npz"
      ),
      "imagenet_val": lambda root: image_datasets.ImageFolder(
          root / "imagenet" / "val"
      ),
      "imagenet_val_tfds": lambda root: _tfds(
          root / "imagenet2012", "validation"
      ),
      "imagenet_val_records": lambda root: array_records.ConvertedImages(
          root / "imagenet_records" / "val"
      ),
      "cifar10_bin_train": lambda root: image_datasets.cifar10_binary(
          root / "cifar-10-batches-bin", "train"
      ),
      "cifar10_bin_test": lambda root: image_datasets.cifar10_binary(
          root / "cifar-10-batches-bin", "test"
      ),
      "stl10_train": lambda root: image_datasets.stl10_binary(
          root / "stl10_binary", "train"
      ),
      "stl10_test": lambda root: image_datasets.stl10_binary(
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


def train_images(seed: int, size: int, count: int) -> Any:
  """The first procedural training images, with labels: kNN's bank."""
  return synthetic.Images(
      size=(size, size), seed=_train_seed(seed), num_examples=count
  )


def train_pairs(seed: int, size: tuple[int, int], count: int) -> Any:
  """The first procedural training pairs, with flow: the mean motion's source."""
  return synthetic.Pairs(size=size, seed=_train_seed(seed), num_examples=count)


def _train_seed(seed: int) -> int:
  """Even, where held-out seeds are odd: the two never meet."""
  return 2 * seed


def held_out_seed(eval_seed: int) -> int:
  """The generator's seed of held-out examples, never one of training's."""
  return 2 * eval_seed + 1


def _root(root: str, name: str) -> pathlib.Path:
  if name != "synthetic" and not root:
    raise errors.UserError(
        f"data_root: expected the folder that holds {name!r}, got nothing;"
        " pass --config.data_root=FOLDER"
    )
  return pathlib.Path(root).expanduser()
