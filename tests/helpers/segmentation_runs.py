"""A config of the segmentation evals, and a CamVid for it."""

import cv2
import numpy as np

from tests.helpers import tiny


def config(root, **changes):
  cfg = tiny.config(
      evals=("segmentation/camvid_val", "upernet/camvid_val"),
      data_root=str(root),
      mesh__devices=2,
      workers=1,
  )
  for kind in ("segmentation", "upernet"):
    part = cfg[kind]
    part.update(crop=32, stride=21, batch_size=2, warmup_steps=1)
    part.sets.camvid_val.update(num_steps=3, short_side=0)
  cfg.upernet.update(channels=4, auxiliary_channels=4)
  for key, value in changes.items():
    *parents, name = key.split("__")
    part = cfg
    for parent in parents:
      part = part[parent]
    part[name] = value
  return cfg


def camvid(root):
  for split in ("train", "val"):
    for i, size in enumerate(((40, 48), (32, 36), (48, 40))):
      name = f"CamVid/{split}/a_{i}.png"
      tiny.save_image(root / name, size, seed=i)
      labels = np.arange(size[0] * size[1]).reshape(size) // 150
      path = root / name.replace(f"{split}/", f"{split}annot/")
      path.parent.mkdir(exist_ok=True)
      cv2.imwrite(str(path), np.minimum(labels, 11).astype(np.uint8))
