"""What tests of generated scenes measure with, in numpy."""

import numpy as np


def grid(height: int, width: int) -> np.ndarray:
  """The pixels [h w 2] (x, y)."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  return np.stack((x, y), -1).astype(np.float64)


def sample(images: np.ndarray, points: np.ndarray, kernel) -> np.ndarray:
  """Images [n h w c] at points [n h w 2] (x, y) by a separable 4-tap kernel."""
  n, height, width, _ = images.shape
  corner = np.floor(points).astype(int)
  batch = np.arange(n)[:, None, None]
  out = 0.0
  for dy in range(-1, 3):
    for dx in range(-1, 3):
      tap = corner + (dx, dy)
      weight = kernel(np.abs(points - tap)).prod(-1, keepdims=True)
      x, y = tap[..., 0].clip(0, width - 1), tap[..., 1].clip(0, height - 1)
      out = out + weight * images[batch, y, x]
  return out


def cubic(t: np.ndarray) -> np.ndarray:
  """Keys' kernel, a = -1/2."""
  near = (1.5 * t - 2.5) * t * t + 1
  far = ((-0.5 * t + 2.5) * t - 4) * t + 2
  return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def linear(t: np.ndarray) -> np.ndarray:
  """The tent."""
  return np.maximum(1 - t, 0.0)


def masked_mean(values: np.ndarray, mask: np.ndarray) -> float:
  """Mean of [n h w c] over the pixels of a mask [n h w 1]."""
  return float((values.mean(-1) * mask[..., 0]).sum() / mask.sum())


def flat(record) -> bytes:
  """All bytes of a record."""
  return b"".join(np.asarray(record[key]).tobytes() for key in sorted(record))


def best_constant(flow: np.ndarray) -> np.ndarray:
  """The vector of least mean distance to flow [n 2]: its geometric median."""
  best = flow.mean(0)
  for _ in range(50):  # Weiszfeld's iteration
    weight = 1 / np.maximum(np.linalg.norm(flow - best, axis=-1), 1e-6)
    best = weight @ flow / weight.sum()
  return best
