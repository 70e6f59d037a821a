"""The two parts of a small labelled set, as features."""

import numpy as np
import pytest

from mcjepa_jax.data.sets import synthetic
from mcjepa_jax.evals import frozen_features


def _label_oracle(images):
  """An embedder that knows the label of each of some images."""

  def embed(x):
    every = np.stack([images[i]["image"] for i in range(len(images))])
    labels = [images[i]["label"] for i in range(len(images))]
    index = [np.flatnonzero((every == image).all((1, 2, 3)))[0] for image in x]
    return np.eye(synthetic.NUM_CLASSES, dtype=np.float32)[labels][index]

  return embed


def _corner(images):
  return images[:, 0, 0].astype(np.float32)


@pytest.fixture(scope="module")
def parts():
  """260 and 20 procedural images as features; labels are the encoder's."""
  made = []
  for seed, count in ((0, 260), (1, 20)):
    images = synthetic.Images(size=(32, 32), seed=seed, num_examples=count)
    embedders = {"": _label_oracle(images), "random_init": _corner}
    made.append(
        frozen_features.extract(
            images, embedders, size=32, name="", progress=False
        )
    )
  return made
