"""Whether true flow fits its frames, and if not, by which fault.

Frame 2 warped by the flow is held against frame 1, and so is frame 2 warped by
what the flow would be if a reader had confused axes, signs, rows, scale or the
order of the frames: the one under which the frames agree best is what the data
are. An error is a mean absolute difference of grey levels, of 255, over pixels
that count and are seen in both frames, that the flow moves by more than a pixel
and that it keeps inside. Errors are divided by those of no motion on the same
pixels, and the median over a sample of pairs is judged.

As measured on real pairs (4 of Sintel in each pass, 4 of FlyingChairs, 4 of
Middlebury) the flow as given leaves 0.10 to 0.47 of the error of no motion, and
the next best of all other readings 0.44 to 0.77, of each pair 1.6 times as much
at least.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import cv2
from jaxtyping import Bool, Float, UInt8
import numpy as np

AS_GIVEN = "as given"
# Of the error as given: another reading must leave less to be the better one.
_BETTER = 0.8
# Of the error of no motion: what leaves more does not fit.
_FITS = 0.9
_MOVED = 1.0  # pixels
_LEAST_CHANGE = 1.0  # grey levels by which the moved pixels change, to judge
_LEAST_POINTS = 100
_POINTS = 2**16  # looked at in a frame, about
# Grey levels are smoothed: where frame 2 is sampled between pixels it is smoother
# than frame 1, by which the frames' order could be taken for another.
_BLUR = 1.5

_Grey = Float[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class _Reading:
  """A flow on the grid of `first` that points into `second`."""

  flow: Float[np.ndarray, "h w 2"]
  counts: Bool[np.ndarray, "h w"]
  first: _Grey
  second: _Grey


def _times(u: float, v: float):
  factor = np.array((u, v), np.float32)
  return lambda r: dataclasses.replace(r, flow=r.flow * factor)


# What the data would be, by the fault that made them what they are.
_READINGS = {
    AS_GIVEN: lambda r: r,
    "u and v swapped": lambda r: dataclasses.replace(r, flow=r.flow[..., ::-1]),
    "negated": _times(-1.0, -1.0),
    "u negated": _times(-1.0, 1.0),
    "v negated": _times(1.0, -1.0),
    # A flow of the other direction lives on frame 2 and points into frame 1.
    "frames exchanged, or the other direction's flow": (
        lambda r: dataclasses.replace(r, first=r.second, second=r.first)
    ),
    "rows flipped": lambda r: dataclasses.replace(
        r, flow=r.flow[::-1], counts=r.counts[::-1]
    ),
    "twice too long": _times(0.5, 0.5),
    "half too long": _times(2.0, 2.0),
}


def _grey(frame: UInt8[np.ndarray, "h w 3"]) -> _Grey:
  grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
  return cv2.GaussianBlur(grey, (0, 0), _BLUR)


def _share_left(reading: _Reading) -> float:
  """Returns the error left by the flow, of that of no motion; inf if unknown."""
  height, width = reading.first.shape
  step = max(1, math.isqrt(height * width // _POINTS))
  thin = (slice(None, None, step),) * 2
  y, x = np.mgrid[:height:step, :width:step].astype(np.float32)
  flow, first = reading.flow[thin], reading.first[thin]
  x, y = x + flow[..., 0], y + flow[..., 1]
  inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
  counts = reading.counts[thin] & inside
  if counts.sum() < _LEAST_POINTS:
    return math.inf
  warped = cv2.remap(reading.second, x, y, cv2.INTER_LINEAR)
  still = np.abs(first - reading.second[thin])[counts].mean()
  return float(np.abs(first - warped)[counts].mean() / max(still, 1e-3))


class Judge:
  """What a sample of labelled pairs says of their flow."""

  def __init__(self):
    self._shares: list[dict[str, float]] = []
    self._still: list[float] = []
    self._lengths: list[tuple[float, float, float]] = []
    self._valid: list[float] = []
    self._unknown = 0  # pairs whose flow is nowhere known

  def add(self, example: Mapping[str, Any]) -> float:
    """Returns the error left by the pair's flow, 0 where little moves."""
    flow, valid = example["flow"], example["valid"][..., 0] > 0
    self._valid.append(float(valid.mean()))
    if not valid.any() or not np.isfinite(flow[valid]).all():
      self._unknown += 1
      return math.inf
    length = np.linalg.norm(flow, axis=-1)
    diagonal = math.hypot(*valid.shape)
    self._lengths.append(
        (
            float(length[valid].mean()),
            float(length[valid].max()),
            float(np.percentile(length[valid], 95)) / diagonal,
        )
    )
    counts = valid & (length > _MOVED)
    # The generated sets call it visible_1.
    visible = example.get("visible", example.get("visible_1"))
    if visible is not None:
      counts &= visible[..., 0] > 0
    first, second = _grey(example["frame_1"]), _grey(example["frame_2"])
    if counts.sum() < _LEAST_POINTS:
      return 0.0
    still = float(np.abs(first - second)[counts].mean())
    if still < _LEAST_CHANGE:
      return 0.0
    # What does not count is no number, at times.
    flow = np.where(valid[..., None], flow, 0).astype(np.float32)
    given = _Reading(flow, counts, first, second)
    self._still.append(still)
    self._shares.append(
        {name: _share_left(read(given)) for name, read in _READINGS.items()}
    )
    return self._shares[-1][AS_GIVEN]

  def _medians(self) -> dict[str, float]:
    return {
        name: float(np.median([share[name] for share in self._shares]))
        for name in _READINGS
    }

  def explanation(self) -> str | None:
    """Returns what the flow is best read as; None where too little moves."""
    if not self._shares:
      return None
    shares = self._medians()
    best = min(shares, key=shares.get)
    return best if shares[best] < _BETTER * shares[AS_GIVEN] else AS_GIVEN

  def warp(self) -> dict[str, float | int | str | None]:
    """Returns the median errors, in grey levels of 255, and the explanation."""
    if not self._shares:
      return dict(
          error_still=None, error_warped=None, best_explanation=None, pairs=0
      )
    warped = [
        still * share[AS_GIVEN]
        for still, share in zip(self._still, self._shares, strict=True)
    ]
    return dict(
        error_still=float(np.median(self._still)),
        error_warped=_finite(np.median(warped)),
        best_explanation=self.explanation(),
        pairs=len(self._shares),
    )

  def flow(self) -> dict[str, float | None]:
    """Returns the longest and mean length, in pixels, and the share valid."""
    mean, longest, _ = np.array(self._lengths).reshape(-1, 3).T
    return dict(
        max=float(longest.max()) if len(longest) else None,
        mean=float(mean.mean()) if len(mean) else None,
        valid=float(np.mean(self._valid)) if self._valid else None,
    )

  def faults(self) -> list[str]:
    """Returns all that is wrong with the flow, a line each."""
    faults = []
    if self._unknown:
      faults.append(
          "expected finite flow, valid somewhere, in every pair; came none in"
          f" {self._unknown} of {len(self._valid)}"
      )
    relative = [length for _, _, length in self._lengths]
    if relative and np.median(relative) > 1:
      faults.append(
          "expected flow shorter than the frame's diagonal; came a twentieth"
          f" of it longer than {np.median(relative):.1f} of them"
      )
    return faults + self.misreadings()

  def misreadings(self, *, certain: bool = False) -> list[str]:
    """Returns that the flow does not fit its frames, where it does not.

    If `certain`, only where another reading fits and this one does not.
    """
    best = self.explanation()
    if best is None:
      return []
    shares = self._medians()
    told = (
        f"warped by it, frame 2 differs from frame 1 by {shares[AS_GIVEN]:.2f}"
        f" of what it does without motion (median of {len(self._shares)} pairs)"
    )
    if shares[best] > _FITS:
      nothing = "the flow does not fit its frames, nor does another reading"
      return [] if certain else [f"{nothing}: {told}"]
    # Where too little was left to judge, the share is infinite.
    doubtful = shares[AS_GIVEN] <= _FITS or math.isinf(shares[AS_GIVEN])
    if best != AS_GIVEN and not (certain and doubtful):
      return [f"the flow seems {best}: {told}, read so by {shares[best]:.2f}"]
    return []


def _finite(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None
