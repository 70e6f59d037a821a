"""Small videos of a moving pattern."""

import cv2
import numpy as np

from mcjepa_jax.data.readers import video_files


def moving(count, *, seed=0, size=(48, 64), speed=2):
  """Frames of smooth noise that moves `speed` pixels a frame."""
  rng = np.random.default_rng(seed)
  height, width = size
  wide = rng.integers(0, 256, (6, 12 + count * speed // 8, 3), np.uint8)
  wide = cv2.resize(wide, (width + count * speed, height))
  return [wide[:, t * speed : t * speed + width] for t in range(count)]


def write_video(path, frames, code="MJPG"):
  size = frames[0].shape[1::-1]
  writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 25, size)
  for frame in frames:
    writer.write(np.ascontiguousarray(frame[..., ::-1]))
  writer.release()
  return path


def open_videos(path, tmp_path, **kwargs):
  return video_files.videos(path, cache_dir=tmp_path / "cache", **kwargs)


def record_ids(pairs):
  return [pairs.record_id(i) for i in range(len(pairs))]
