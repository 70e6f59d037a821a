"""Optical flow on a set with ground truth, beside what needs no learning.

EPE is in pixels of the original image: the mean over pairs of a pair's mean
over valid pixels. Fl-all is over all valid pixels of the set, in percent.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
from jaxtyping import Float, UInt8
import numpy as np
import tqdm

from mcjepa_jax import errors, metrics

# (frames u8 [2b, h, w, 3], interleaved) -> flow_12 [b, h, w, 2]
Predictor = Callable[[np.ndarray], np.ndarray]

_PAIRWISE_LIMIT = 100  # sets up to here report every pair
_HELD_PIXELS = 2**26  # of truths in memory, 0.8 GB: larger sets are thinned
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
  """Runs of neighbouring examples of one shape, each example once.

  At most `batch_size` examples and `max_pixels` pixels of frame 1 in each.

  Raises:
    UserError: a single pair has more pixels.
  """
  held: list[dict[str, Any]] = []
  for i in range(len(dataset)):
    example = {"record": dataset.record_id(i), **dataset[i]}
    shape = example["frame_1"].shape
    if shape[0] * shape[1] > max_pixels:
      raise errors.UserError(
          f"{example['record']}: expected a pair of at most {max_pixels} pixels"
          f" (eval_max_pixels), got {shape[1]}x{shape[0]}"
      )
    if held and (
        held[0]["frame_1"].shape != shape
        or len(held) == batch_size
        or (len(held) + 1) * shape[0] * shape[1] > max_pixels
    ):
      yield held
      held = []
    held.append(example)
  if held:
    yield held


def run(
    name: str,
    dataset: Any,
    predictors: dict[str, Predictor],
    *,
    batch_size: int = 8,
    max_pixels: int = 2_097_152,
    classical: bool = True,
    train_flows: Sequence[Float[np.ndarray, "h w 2"]] = (),
    progress: bool = True,
) -> dict[str, float]:
  """EPE, Fl-all and their references, keyed `flow/NAME/METRIC`.

  `epe_constant` of a set of more than 2^26 pixels is fitted to, and measured on,
  every 16th row and column.

  Args:
    name: of the set.
    dataset: elements hold frame_1, frame_2, flow, valid.
    predictors: suffix -> predictor: "" gives `epe` and `fl_all`,
      "random_init" gives `epe_random_init`.
    batch_size: pairs of one shape.
    max_pixels: of frame 1 in a batch.
    classical: also Farneback and DIS.
    train_flows: their mean, one constant vector, gives `epe_train_mean`.
    progress: shows a bar.
  """
  totals: dict[str, metrics.FlowTotals] = {}
  rows: dict[str, float] = {}
  truths, valids, records = [], [], []
  train_mean = thin = None
  if len(train_flows):
    train_mean = np.mean([f.mean(axis=(0, 1)) for f in train_flows], axis=0)

  def add(record, metric, flow, truth, valid):
    pair = metrics.flow_totals(
        np.broadcast_to(np.asarray(flow, np.float32), truth.shape), truth, valid
    )
    totals[metric] = totals.get(metric, metrics.FlowTotals()) + pair
    rows[f"flow/{name}/{record}/{metric}"] = pair.epe

  bar = tqdm.tqdm(
      total=len(dataset), desc=f"flow/{name}", disable=not progress, leave=False
  )
  for group in batches(dataset, batch_size=batch_size, max_pixels=max_pixels):
    frames = np.stack(
        [example[k] for example in group for k in ("frame_1", "frame_2")]
    )
    flows = {
        f"epe_{suffix}" if suffix else "epe": predict(frames)
        for suffix, predict in predictors.items()
    }
    for i, example in enumerate(group):
      record, truth = example["record"], example["flow"]
      valid = example["valid"]
      if thin is None:
        large = truth[..., 0].size * len(dataset) > _HELD_PIXELS
        thin = slice(None, None, _THINNED if large else None)
      truths.append(np.ascontiguousarray(truth[thin, thin]))
      valids.append(np.ascontiguousarray(valid[thin, thin]))
      records.append(record)
      for metric, flow in flows.items():
        add(record, metric, flow[i], truth, valid)
      add(record, "epe_zero", np.zeros(2), truth, valid)
      constant = metrics.best_constant_flow([truth], [valid])
      add(record, "epe_pair_constant", constant, truth, valid)
      if train_mean is not None:
        add(record, "epe_train_mean", train_mean, truth, valid)
      if classical:
        for metric, method in (("epe_farneback", farneback), ("epe_dis", dis)):
          flow = method(example["frame_1"], example["frame_2"])
          add(record, metric, flow, truth, valid)
    bar.update(len(group))
  bar.close()
  constant = metrics.best_constant_flow(truths, valids)
  for record, truth, valid in zip(records, truths, valids, strict=True):
    add(record, "epe_constant", constant, truth, valid)
  result = {f"flow/{name}/{m}": t.epe for m, t in totals.items()}
  result[f"flow/{name}/fl_all"] = totals["epe"].fl_all
  result[f"flow/{name}/count"] = len(dataset)
  if len(dataset) <= _PAIRWISE_LIMIT:
    result |= rows
  return result
