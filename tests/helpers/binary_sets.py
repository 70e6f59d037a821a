"""CIFAR-10 and STL-10 in their binary layouts."""

import numpy as np


def cifar10(folder, counts=(2, 1, 1, 1, 3), labels=lambda i: i % 10):
  """Images whose red is their number, green their row, blue their column."""
  folder.mkdir(exist_ok=True)
  (folder / "batches.meta.txt").write_text(
      "\n".join([*(f"class{i}" for i in range(10)), "", ""])
  )
  names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
  number = 0
  for name, count in zip(names, (*counts, 2), strict=True):
    rows = []
    for _ in range(count):
      planes = np.empty((3, 32, 32), np.uint8)
      planes[0], planes[1], planes[2] = (
          number,
          np.arange(32)[:, None],
          range(32),
      )
      rows.append(bytes([labels(number)]) + planes.tobytes())
      number += 1
    (folder / f"{name}.bin").write_bytes(b"".join(rows))
  return folder


def stl10(folder, labels=(1, 10, 3)):
  """As cifar10, a channel's columns one after another; labels from 1."""
  folder.mkdir(exist_ok=True)
  (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
  planes = np.empty((3, 3, 96, 96), np.uint8)
  planes[:, 0] = np.arange(3)[:, None, None]
  planes[:, 1], planes[:, 2] = np.arange(96)[None], np.arange(96)[:, None]
  for split in ("train", "unlabeled"):
    (folder / f"{split}_X.bin").write_bytes(planes.tobytes())
  (folder / "train_y.bin").write_bytes(bytes(labels))
  return folder
