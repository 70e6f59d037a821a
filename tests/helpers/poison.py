"""A run with one poisoned record: of one flat colour, where a view is 0 / 0."""

import pathlib

import numpy as np
from PIL import Image

from mcjepa_jax.step import augmentation
from tests.helpers import tiny

# A photometric change would give the flat image a range.
_CONFIG = """
from configs import quickstart
from mcjepa_jax.step import augmentation
from tests.helpers import tiny

augmentation.content_views = tiny.stretched(augmentation.content_views)

def get_config():
  config = tiny.config(quickstart, mode="content", num_steps=8, save_every=2,
                       content__sources=(("images", 1.0),),
                       content__batch_size=4, content__jitter__p=0.0,
                       log_every=1, log_records=True, keep_last=9,
                       alarms__diagnose_every=0, alarms__skips_in_a_row=1)
  return config.lock()
"""
RECORD = "images/flat.png"


def data(folder: pathlib.Path, images: int) -> pathlib.Path:
  """A folder, in which so many images now are; one is flat."""
  for i in range(images - 1):
    tiny.save_image(folder / "images" / f"{i:02d}.png", seed=i)
  flat = np.full((40, 48, 3), 90, np.uint8)
  Image.fromarray(flat).save(folder / RECORD)
  return folder


def run(folder: pathlib.Path, images: int) -> tuple[pathlib.Path, str]:
  """The config of a run that rolls back, and the override that names its data."""
  path = folder / "configs" / "poisoned.py"
  path.parent.mkdir()
  path.write_text(_CONFIG)
  return path, f"--config.data_root={data(folder / 'data', images)}"


def stretch(patch) -> None:
  """Has this process stretch each view to its own range, as that run does."""
  plain = augmentation.content_views
  patch.setattr(augmentation, "content_views", tiny.stretched(plain))
