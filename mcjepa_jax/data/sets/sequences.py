"""Pairs of frames without labels, out of videos and other sequences.

A pair is {frame_1, frame_2: u8 [h w 3]}, `gap` frames apart in one sequence:
`SequencePairs(videos(path), gaps=(1, 3))`, with the videos of `video_files` or
the images of `frame_folders`.

Change is the mean absolute difference of two 32x32 thumbnails, 0 to 255. From
one frame to the next at 24-30 frames/s it was 0.8 (a fixed camera), 2-7 (hand
held, sports) and at most 9; across a cut 43 to 160. So a cut is where change is
above 40, or above 12 and 4 times the median of the 9 changes around it: fast
motion is as fast a frame later, a cut stands alone. Fades are not found.
"""

from collections.abc import Sequence

from jaxtyping import Bool, Float32, UInt8
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
import tqdm

from mcjepa_jax.errors import UserError

_SURE_CUT = 40.0
_CUT = 12.0
_CUT_RATIO = 4.0
_CUT_WINDOW = 9


class SequencePairs:
  """Pairs out of sequences, for each first frame and each gap of a range.

  With `skip_cuts` no pair spans a cut; the fast motion of a rendered set would
  pass for cuts. A pair whose change is below `min_change` is left out (0.5
  leaves out what stands still). Either asks for the thumbnails.
  """

  def __init__(
      self,
      sequences: Sequence,
      *,
      gaps: tuple[int, int] = (1, 1),
      skip_cuts: bool = False,
      min_change: float = 0.0,
      progress: bool = True,
  ):
    low, high = gaps
    if not 1 <= low <= high:
      raise UserError(f"gaps: expected 1 <= low <= high, came {gaps}")
    self.sequences = list(sequences)
    index = []
    bar = tqdm.tqdm(
        self.sequences, "looking for cuts", delay=2, disable=not progress
    )
    for number, sequence in enumerate(bar):
      looked = skip_cuts or min_change > 0
      small = sequence.thumbnails() if looked else None
      is_cut = cuts(small) if skip_cuts else None
      for gap in range(low, min(high, len(sequence) - 1) + 1):
        first = np.arange(len(sequence) - gap)
        if small is not None:
          keep = change(small[:-gap], small[gap:]) >= min_change
          if is_cut is not None:
            keep &= ~sliding_window_view(is_cut, gap).any(axis=1)
          first = first[keep]
        rows = np.full((len(first), 3), (number, 0, gap), np.int32)
        rows[:, 1] = first
        index.append(rows)
    self._index = np.concatenate(index or [np.empty((0, 3), np.int32)])
    if not len(self._index):
      frames = sum(map(len, self.sequences))
      raise UserError(
          f"expected pairs of frames {low} to {high} apart, came none in "
          f"{frames} frames of {[s.name for s in self.sequences[:9]]}"
      )

  def __len__(self) -> int:
    return len(self._index)

  def record_id(self, index: int) -> str:
    """Returns the first frame's name and the gap."""
    number, first, gap = self._index[index].tolist()
    return f"{self.sequences[number].frame_id(first)}+{gap}"

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    number, first, gap = self._index[index].tolist()
    sequence = self.sequences[number]
    frame_1, frame_2 = sequence.frame(first), sequence.frame(first + gap)
    if frame_1.shape != frame_2.shape:
      ids = sequence.frame_id(first), sequence.frame_id(first + gap)
      raise UserError(
          f"{ids[1]}: expected {frame_1.shape[1]}x{frame_1.shape[0]}, the size "
          f"of {ids[0]}, came {frame_2.shape[1]}x{frame_2.shape[0]}"
      )
    return {"frame_1": frame_1, "frame_2": frame_2}


def change(
    x: UInt8[np.ndarray, "t s s 3"], y: UInt8[np.ndarray, "t s s 3"]
) -> Float32[np.ndarray, " t"]:
  """Returns the mean absolute difference of each two thumbnails, 0 to 255."""
  difference = np.abs(x.astype(np.int16) - y)
  return difference.mean(axis=(1, 2, 3), dtype=np.float32)


def cuts(thumbnails: UInt8[np.ndarray, "t s s 3"]) -> Bool[np.ndarray, " t-1"]:
  """Returns True for each step from a frame to the next that is a cut."""
  steps = change(thumbnails[:-1], thumbnails[1:])
  if not len(steps):
    return np.zeros(0, bool)
  padded = np.pad(steps, _CUT_WINDOW // 2, mode="reflect")
  around = np.median(sliding_window_view(padded, _CUT_WINDOW), axis=1)
  alone = (steps > _CUT) & (steps > _CUT_RATIO * around)
  return alone | (steps > _SURE_CUT)
