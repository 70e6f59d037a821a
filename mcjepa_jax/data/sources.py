"""The data sets by the names that a config uses, each under one data root.

Procedural examples for training and for evaluation come from different seeds;
`labelled` and `flow_pairs` are for evaluation only.
"""

import functools
import pathlib
from typing import Any

from mcjepa_jax import errors
from mcjepa_jax.data import (
    cutouts,
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
      "cutouts": lambda root: _cutouts(
          root, _train_seed(seed), size, _TRAIN_PAIRS
      ),
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
  """The images of a training source: {image}, labels never read."""
  table = {
      "synthetic": lambda folder: train_images(seed, size, _TRAIN_IMAGES),
      "imagenet": lambda folder: image_datasets.ImageFolder(
          folder / "imagenet" / "train"
      ),
      "images": lambda folder: image_datasets.ImageFolder(folder / "images"),
      "cifar10": lambda folder: image_datasets.NpzImages(
          folder / "cifar10" / "train.npz"
      ),
  }
  make = choice(table, name, "content.source")
  return make(_root(root, name))


def flow_pairs(
    name: str, root: str, *, seed: int, size: tuple[int, int], count: int
) -> Any:
  """A set with true flow: {frame_1, frame_2, flow, valid}.

  `seed`, `size` and `count` are of the procedural set and the cut-outs alone.
  """
  table = {
      set_name: functools.partial(flow_datasets.open_flow_set, set_name)
      for set_name in flow_datasets.FLOW_SETS
  }
  table["synthetic"] = lambda folder: synthetic.Pairs(
      size=size, seed=seed, num_examples=count
  )
  table["cutouts"] = lambda folder: _cutouts(folder, seed, size, count)
  make = choice(table, name, "evals: flow")
  return make(_root(root, name))


def labelled(name: str, root: str, *, seed: int, size: int, count: int) -> Any:
  """A set of images with labels: {image, label}."""
  table = {
      "synthetic": lambda folder: synthetic.Images(
          size=(size, size), seed=seed, num_examples=count
      ),
      "cifar10": lambda folder: image_datasets.NpzImages(
          folder / "cifar10" / "train.npz"
      ),
  }
  make = choice(table, name, "evals: knn")
  return make(_root(root, name))


def train_images(seed: int, size: int, count: int) -> Any:
  """The first procedural training images, with labels: kNN's bank."""
  return synthetic.Images(
      size=(size, size), seed=_train_seed(seed), num_examples=count
  )


def train_pairs(seed: int, size: tuple[int, int], count: int) -> Any:
  """The first procedural training pairs, with flow: the mean motion's source."""
  return synthetic.Pairs(size=size, seed=_train_seed(seed), num_examples=count)


def _cutouts(
    root: pathlib.Path, seed: int, size: tuple[int, int], count: int
) -> cutouts.Pairs:
  """Scenes out of root/images: other seeds share photographs, but no motion."""
  photographs = image_datasets.ImageFolder(
      root / "images", min_side=2 * max(size)
  )
  return cutouts.Pairs(photographs, size=size, seed=seed, num_examples=count)


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
