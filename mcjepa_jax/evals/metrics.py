"""Metrics of flow and segmentation: sums, divided once.

Flow metrics are numpy in float64. `valid` is above 0 where a pixel counts; what
the truth holds elsewhere, NaN included, is never read.
"""

from collections.abc import Mapping, Sequence
import dataclasses

from jaxtyping import Bool, Float, Int64, Integer
import numpy as np


def endpoint_error(
    flow: Float[np.ndarray, "*b 2"], truth: Float[np.ndarray, "*b 2"]
) -> Float[np.ndarray, "*b"]:
  """The distance of each vector from the true one, in pixels."""
  return _length(flow.astype(np.float64) - truth)


@dataclasses.dataclass(frozen=True)
class FlowTotals:
  """Sums over the pairs of a set; totals of parts add up with `+`.

  A pair without a valid pixel adds nothing, to no count either.
  """

  pairs: int = 0
  mean_errors: float = 0.0  # Over pairs, of the pair's mean endpoint error.
  pixels: int = 0
  outliers: int = 0
  above_1: int = 0  # pixels off by more than one pixel
  # (sum of endpoint errors, pixels) of each class that has a pixel.
  classes: Mapping[str, tuple[float, int]] = dataclasses.field(
      default_factory=dict
  )

  def __add__(self, other: "FlowTotals") -> "FlowTotals":
    classes = dict(self.classes)
    for name, (errors, pixels) in other.classes.items():
      before = classes.get(name, (0.0, 0))
      classes[name] = (before[0] + errors, before[1] + pixels)
    return FlowTotals(
        self.pairs + other.pairs,
        self.mean_errors + other.mean_errors,
        self.pixels + other.pixels,
        self.outliers + other.outliers,
        self.above_1 + other.above_1,
        classes,
    )

  @property
  def epe(self) -> float:
    """Mean over pairs of the mean endpoint error; NaN of an empty set."""
    return self.mean_errors / self.pairs if self.pairs else float("nan")

  @property
  def fl_all(self) -> float:
    """Outliers among all valid pixels, in percent; NaN of an empty set."""
    return 100 * self.outliers / self.pixels if self.pixels else float("nan")

  @property
  def px1(self) -> float:
    """Pixels off by more than 1 px, in percent; NaN of an empty set."""
    return 100 * self.above_1 / self.pixels if self.pixels else float("nan")

  def class_epes(self) -> dict[str, float]:
    """The mean endpoint error over all pixels of each class that has one."""
    return {
        name: errors / pixels for name, (errors, pixels) in self.classes.items()
    }


def flow_totals(
    flow: Float[np.ndarray, "h w 2"],
    truth: Float[np.ndarray, "h w *k 2"],
    valid: Float[np.ndarray, "h w 1"],
    seen: Bool[np.ndarray, "h w"] | None = None,
) -> FlowTotals:
  """The totals of one pair; `seen` says which pixels both frames see.

  An outlier is off by more than 3 pixels and by more than 5 % of the true
  length, as in KITTI 2015's development kit. Classes are `noc` (seen in both
  frames) and `occ`, and by the true speed `s0_10` (below 10 px), `s10_40` and
  `s40` (above 40 px): the bounds of github.com/haofeixu/gmflow (evaluate.py).

  Of a pixel with several true vectors, as Spring's evaluation counts it
  (github.com/cv-stuttgart/springwebsite, evaluation.py, get_errors_flow), the
  error is the least of those to each, the 5 % are of the longest, the speed is
  their mean length, and 40 px are of `s40`.
  """
  counts = valid[..., 0] > 0
  flow, truth = flow[counts], truth[counts]
  pixels = len(truth)
  if not pixels:
    return FlowTotals()
  # One after another: in float64 all would be 0.13 GB of a frame of Spring.
  each = truth.reshape(pixels, -1, 2).swapaxes(0, 1)
  error = np.min([endpoint_error(flow, t) for t in each], axis=0)
  lengths = np.stack([_length(t.astype(np.float64)) for t in each])
  speed, longest = lengths.mean(axis=0), lengths.max(axis=0)
  # By what is no outlier, so that a NaN is one.
  inlier = (error <= 3) | (error <= 0.05 * longest)
  fast = speed >= 40 if len(each) > 1 else speed > 40
  masks = {
      "s0_10": speed < 10,
      "s10_40": (speed >= 10) & ~fast,
      "s40": fast,
  }
  if seen is not None:
    masks |= {"noc": seen[counts], "occ": ~seen[counts]}
  return FlowTotals(
      pairs=1,
      mean_errors=float(error.mean()),
      pixels=pixels,
      outliers=pixels - int(inlier.sum()),
      above_1=pixels - int((error <= 1).sum()),
      classes={
          name: (float(error[mask].sum()), int(mask.sum()))
          for name, mask in masks.items()
          if mask.any()
      },
  )


def best_constant_flow(
    truths: Sequence[Float[np.ndarray, "_ _ 2"]],
    valids: Sequence[Float[np.ndarray, "_ _ 1"]],
    *,
    tolerance: float = 1e-6,
    max_steps: int = 200,
) -> Float[np.ndarray, "2"]:
  """The constant flow (u, v) with the least EPE over the pairs given.

  That is the geometric median of all valid vectors, each weighing 1 / (its
  pair's number of valid pixels), by Weiszfeld's iteration with Vardi and
  Zhang's step at a data point (PNAS 97, 2000); it ends when a step is shorter
  than `tolerance` pixels. Zero where no pixel is valid: nothing counts it then.
  """
  # In the files' float32: all of Sintel is 3.7 GB of it.
  samples = [
      np.ascontiguousarray(truth[valid[..., 0] > 0].T)
      for truth, valid in zip(truths, valids, strict=True)
      if np.any(valid > 0)
  ]
  if not samples:
    return np.zeros(2)
  means = [sample.mean(axis=1, dtype=np.float64) for sample in samples]
  median = np.mean(means, axis=0)
  for _ in range(max_steps):
    pull, stiffness, held = np.zeros(2), 0.0, 0.0
    for sample in samples:
      offset = sample - median[:, None]
      distance = np.sqrt(offset[0] ** 2 + offset[1] ** 2)
      here = distance == 0
      inverse = 1 / np.where(here, np.inf, distance)
      pull += offset @ inverse / len(inverse)
      stiffness += inverse.mean()
      held += here.mean()
    strength = np.hypot(*pull)
    # Vectors equal to the median resist the others' pull with their weight.
    if strength <= held:
      break
    step = pull / stiffness * (1 - held / strength)
    median = median + step
    if np.hypot(*step) < tolerance:
      break
  return median


def correct(
    scores: Float[np.ndarray, "n k"],
    labels: Integer[np.ndarray, "n"],
    *,
    top: int = 1,
) -> Bool[np.ndarray, "n"]:
  """Whether each label is among the `top` highest scores.

  Ties and NaN count against the label, so that constant scores are never right.
  """
  own = np.take_along_axis(scores, labels[:, None], axis=1)
  return np.sum(~(scores < own), axis=1) <= top


def confusion(
    truth: Integer[np.ndarray, "*n"],
    predicted: Integer[np.ndarray, "*n"],
    classes: int,
) -> Int64[np.ndarray, "k k"]:
  """How many pixels of each true class (row) were given each class (column).

  Only pixels whose truth is a class count. Matrices of parts add up.
  """
  counts = truth < classes
  pairs = truth[counts].astype(np.int64) * classes + predicted[counts]
  return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def iou(matrix: Int64[np.ndarray, "k k"]) -> Float[np.ndarray, "k"]:
  """Each class's intersection over union in percent; NaN without true pixels.

  The mean leaves such a class out, whatever was predicted, so that it is over
  the same classes for every prediction.
  """
  hits, true = np.diagonal(matrix), matrix.sum(axis=1)
  union = matrix.sum(axis=0) + true - hits
  return 100 * hits / np.where(true, union, np.nan)


def _length(vector: Float[np.ndarray, "*b 2"]) -> Float[np.ndarray, "*b"]:
  return np.sqrt(np.sum(np.square(vector), axis=-1))
