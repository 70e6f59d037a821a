"""Optical flow on a set with ground truth, beside what needs no learning.

EPE is in pixels of the original image: the mean over pairs of a pair's mean
over valid pixels, KITTI 2012's average. Over all valid pixels of the set are, in
percent, Fl-all, as KITTI 2015's development kit counts it, and px1, the share
off by more than one pixel (the outlier rate that Spring ranks by, arXiv
2303.01943), and the EPE of the classes: `epe_noc` of what both frames see (not
marked as occluded, and moving to a place inside frame 2), `epe_occ` of the rest,
`epe_s0_10`, `epe_s10_40`, `epe_s40` by the true speed in pixels (MPI-Sintel's
classes, averaged as in github.com/haofeixu/gmflow, evaluate.py).

All true vectors of a pixel count, where an example has `flow_all`, as Spring's
(see metrics.flow_totals), and the match map alone says what both frames see.
Constants are fitted to `flow`, one vector a pixel.
"""

from collections.abc import Iterator, Sequence
import time
from typing import Any

import cv2
from jaxtyping import Bool, Float, UInt8
import numpy as np
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.evals import metrics, tiling

_PAIRWISE_LIMIT = 100  # sets up to here report every pair
_CLASSICAL_SIDE = 16  # pixels: OpenCV 5's DIS may crash on lower frames
_HELD_VECTORS = 2**26  # true ones in memory, 0.8 GB: larger sets are thinned
_WAITING = 4  # times the pixels of a batch
_THINNED = 16  # then every so many rows and columns make the set's constant


def farneback(frame_1: UInt8[np.ndarray, "h w 3"],
              frame_2: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 2"]:  # fmt: skip
  """OpenCV's Farneback flow at its tutorial's settings."""
  return cv2.calcOpticalFlowFarneback(
      _gray(frame_1), _gray(frame_2), None, 0.5, 3, 15, 3, 5, 1.2, 0
  )


def dis(frame_1: UInt8[np.ndarray, "h w 3"],
        frame_2: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 2"]:  # fmt: skip
  """OpenCV's DIS flow, its medium preset."""
  method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
  return method.calc(_gray(frame_1), _gray(frame_2), None)


def _gray(image):
  return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def batches(
    dataset: Any, *, batch_size: int, max_pixels: int
) -> Iterator[list[dict[str, Any]]]:
  """Runs of examples of one shape, each example once, each shape in order.

  At most `batch_size` examples and `max_pixels` pixels of frame 1 in each; a
  larger pair is alone. A batch that is not full waits for more of its shape
  while what waits is below four times `max_pixels`.
  """
  held: dict[tuple[int, ...], list[dict[str, Any]]] = {}
  waiting = 0
  for i in range(len(dataset)):
    example = {"record": dataset.record_id(i), **dataset[i]}
    shape = example["frame_1"].shape
    group, pixels = held.setdefault(shape, []), shape[0] * shape[1]
    group.append(example)
    waiting += pixels
    if len(group) == batch_size or (len(group) + 1) * pixels > max_pixels:
      ready = shape
    elif waiting >= _WAITING * max_pixels:
      ready = next(iter(held))
    else:
      continue
    waiting -= len(held[ready]) * ready[0] * ready[1]
    yield held.pop(ready)
  yield from held.values()


def seen_in_both(example: dict[str, Any]) -> Bool[np.ndarray, "h w"] | None:
  """Where a pixel of frame 1 is in frame 2 too; None if no mask says so.

  What leaves the frame is not: MPI-Sintel's occlusions do not mark it, Spring's
  map does.
  """
  # The generated sets call it visible_1.
  visible = example.get("visible", example.get("visible_1"))
  if visible is None:
    return None
  if "flow_all" in example:
    return visible[..., 0] > 0
  height, width = visible.shape[:2]
  x = np.arange(width) + example["flow"][..., 0]
  y = np.arange(height)[:, None] + example["flow"][..., 1]
  inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
  return inside & (visible[..., 0] > 0)


class _Timed:
  """A predictor that checks what it gives and counts the seconds of a pair.

  The first call of each shape compiles, and is not counted.
  """

  def __init__(self, predictor: tiling.Predictor, max_pixels: int):
    self._predictor, self._max_pixels = predictor, max_pixels
    self._shapes: set[tuple[int, ...]] = set()
    self._seconds, self._pairs = 0.0, 0
    self._frames = np.zeros(0)

  def __call__(
      self, frames: np.ndarray, records: Sequence[str]
  ) -> Float[np.ndarray, "b _ _ 2"]:
    started = time.perf_counter()
    flows = tiling.predict(self._predictor, frames, self._max_pixels)
    if frames.shape in self._shapes:
      self._seconds += time.perf_counter() - started
      self._pairs += len(records)
    self._shapes.add(frames.shape)
    self._frames = frames
    wanted = (len(records), *frames.shape[1:3], 2)
    if flows.shape != wanted:
      raise errors.UserError(
          f"{records[0]}: expected flow of its frames' size, {wanted}, came"
          f" {flows.shape}"
      )
    for record, flow in zip(records, flows, strict=True):
      if not np.isfinite(flow).all():
        raise errors.UserError(
            f"{record}: expected finite flow of the checkpoint, came NaN or inf"
        )
    return flows

  def seconds_per_pair(self) -> float:
    """Wall time of a pair; of the last batch, once more, if none was counted."""
    if not self._pairs:
      self(self._frames, [""] * (len(self._frames) // 2))
    return self._seconds / self._pairs


def run(
    name: str,
    dataset: Any,
    predictors: dict[str, tiling.Predictor],
    *,
    batch_size: int = 8,
    max_pixels: int = 2_097_152,
    classical: bool = True,
    train_flows: Sequence[Float[np.ndarray, "h w 2"]] = (),
    progress: bool = True,
) -> dict[str, float]:
  """The module's metrics and their references, keyed `flow/NAME/METRIC`.

  A class of pixels that the set does not have has no key. `epe_constant` of a
  set of more than 2^26 true vectors is fitted to, and measured on, every 16th
  row and column of pixels, every 32nd where each has 2x2 vectors.

  Args:
    name: of the set.
    dataset: of frame_1, frame_2, flow, valid, perhaps visible and flow_all.
    predictors: suffix -> predictor: "" gives `epe` and all else, "random_init"
      gives `epe_random_init`.
    batch_size: pairs of one shape.
    max_pixels: of frame 1 in a batch; larger frames are cut into tiles.
    classical: also Farneback and DIS, of pairs whose sides they can take.
    train_flows: their mean, one constant vector, gives `epe_train_mean`.
    progress: shows a bar.

  Raises:
    UserError: flow that is not finite or of another size, or no valid pixel.
  """
  totals: dict[str, metrics.FlowTotals] = {}
  rows: dict[str, float] = {}
  truths, valids, records = [], [], []
  train_mean = thin = None
  if len(train_flows):
    train_mean = np.mean([f.mean(axis=(0, 1)) for f in train_flows], axis=0)
  timed = {suffix: _Timed(p, max_pixels) for suffix, p in predictors.items()}

  def add(record, metric, flow, truth, valid, seen=None):
    pair = metrics.flow_totals(
        np.broadcast_to(np.asarray(flow, np.float32), (*truth.shape[:2], 2)),
        *(truth, valid, seen),
    )
    totals[metric] = totals.get(metric, metrics.FlowTotals()) + pair
    if pair.pairs:
      rows[f"flow/{name}/{record}/{metric}"] = pair.epe

  bar = tqdm.tqdm(
      total=len(dataset), desc=f"flow/{name}", disable=not progress, leave=False
  )
  for group in batches(dataset, batch_size=batch_size, max_pixels=max_pixels):
    names = [example["record"] for example in group]
    frames = np.stack(
        [example[k] for example in group for k in ("frame_1", "frame_2")]
    )
    flows = {
        f"epe_{suffix}" if suffix else "epe": predict(frames, names)
        for suffix, predict in timed.items()
    }
    for i, example in enumerate(group):
      record, one = example["record"], example["flow"]
      truth = example.get("flow_all", one[:, :, None, None])
      valid, seen = example["valid"], seen_in_both(example)
      _expect_size(record, one, example["frame_1"])
      if not np.any(valid):
        tqdm.tqdm.write(
            f"flow/{name}: {record} has no valid pixel: not counted"
        )
      if thin is None:
        large = truth[..., 0].size * len(dataset) > _HELD_VECTORS
        thin = slice(None, None, _THINNED * truth.shape[2] if large else None)
      truths.append(np.ascontiguousarray(truth[thin, thin]))
      valids.append(np.ascontiguousarray(valid[thin, thin]))
      records.append(record)
      for metric, flow in flows.items():
        add(record, metric, flow[i], truth, valid, seen)
      add(record, "epe_zero", np.zeros(2), truth, valid)
      constant = metrics.best_constant_flow([one], [valid])
      add(record, "epe_pair_constant", constant, truth, valid)
      if train_mean is not None:
        add(record, "epe_train_mean", train_mean, truth, valid)
      if classical and min(truth.shape[:2]) >= _CLASSICAL_SIDE:
        for metric, method in (("epe_farneback", farneback), ("epe_dis", dis)):
          flow = method(example["frame_1"], example["frame_2"])
          add(record, metric, flow, truth, valid)
    bar.update(len(group))
  bar.close()
  total = totals["epe"]
  if not total.pairs:
    raise errors.UserError(
        f"flow/{name}: expected a valid pixel in one of {len(dataset)} pairs at"
        " least, came none"
    )
  constant = metrics.best_constant_flow([t[:, :, 0, 0] for t in truths], valids)
  for record, truth, valid in zip(records, truths, valids, strict=True):
    add(record, "epe_constant", constant, truth, valid)
  result = {f"flow/{name}/{m}": t.epe for m, t in totals.items() if t.pairs}
  result |= {f"flow/{name}/epe_{k}": v for k, v in total.class_epes().items()}
  result |= {
      f"flow/{name}/fl_all": total.fl_all,
      f"flow/{name}/px1": total.px1,
      f"flow/{name}/seconds_per_pair": timed[""].seconds_per_pair(),
      f"flow/{name}/count": len(dataset),
  }
  if total.pairs < len(dataset):
    result[f"flow/{name}/count_all_invalid"] = len(dataset) - total.pairs
  if len(dataset) <= _PAIRWISE_LIMIT:
    result |= rows
  return result


def _expect_size(record, truth, frame):
  if truth.shape[:2] != frame.shape[:2]:
    raise errors.UserError(
        f"{record}: expected true flow of {frame.shape[1]}x{frame.shape[0]}, as"
        f" its frames, came {truth.shape[1]}x{truth.shape[0]}"
    )
