"""Masks given once and followed through a sequence by the features alone.

The protocol is DINO's (arXiv 2104.14294; github.com/facebookresearch/dino,
eval_video_segmentation.py): each cell of a frame takes the labels of the most
similar cells near it, in the frames that were given and in those just before.
What counts is the official tool's (`evals.masks`): an object's frames after the
one where it was given, the last annotated frame left out.
"""

from collections import deque
from collections.abc import Callable, Mapping
import functools
from typing import Any

import cv2
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, UInt8
import numpy as np
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.evals import mask_metrics as measures
from mcjepa_jax.ops import flow_ops

# frames u8 [b, h, w, 3] -> features [b, h / stride, w / stride, d], each a unit
# vector
Extractor = Callable[[np.ndarray], Any]

_TILE = 12  # cells a side; 20 took 1.4 times as long, with a radius of 12
_EACH = {"j_and_f": "j_and_f", "j_mean": "j", "f_mean": "f"}  # of a sequence
_EACH_LIMIT = 100  # sets up to here report every sequence


def feature_grid(
    frame: tuple[int, int], *, size: int, multiple: int
) -> tuple[int, int]:
  """(h, w) of a frame whose short side becomes `size`, rounded up."""
  return tuple(
      -(-round(side * size / min(frame)) // multiple) * multiple
      for side in frame
  )


@functools.partial(jax.jit, static_argnames=("grid", "stride"))
def pixel_features(
    frames: UInt8[Array, "n _ _ 3"], *, grid: tuple[int, int], stride: int
) -> Float[Array, "n h w d"]:
  """Unit vectors of each cell's own pixels: what needs no encoder."""
  x = flow_ops.resize(frames.astype(jnp.float32) / 255, grid)
  h, w = grid[0] // stride, grid[1] // stride
  x = x.reshape(-1, h, stride, w, stride, 3).swapaxes(2, 3)
  # Of colours as they are, which have no negative, all would be much alike.
  return unit(x.reshape(-1, h, w, 3 * stride**2) - 0.5)


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
  """The vectors at length 1; zero stays zero."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("radius", "top"))
def nearest(
    query: Float[Array, "h w d"],
    key: Float[Array, "h w d"],
    *,
    radius: int,
    top: int,
) -> tuple[Float[Array, "h w k"], Integer[Array, "h w k"]]:
  """The `top` most similar cells of `key`, at most `radius` rows and columns off.

  (similarities, h * w indices); a similarity is -inf where there is no cell. By
  tiles: of the whole matrix there is never more than a tile and what is near.
  """
  h, w, d = query.shape
  rows, columns = -(-h // _TILE), -(-w // _TILE)
  bottom, right = rows * _TILE - h, columns * _TILE - w
  query = jnp.pad(query, ((0, bottom), (0, right), (0, 0)))
  key = jnp.pad(
      key, ((radius, radius + bottom), (radius, radius + right), (0, 0))
  )
  side = _TILE + 2 * radius
  offset = jnp.arange(side) - jnp.arange(_TILE)[:, None]
  near = (offset >= 0) & (offset <= 2 * radius)
  near = near[:, None, :, None] & near[None, :, None, :]

  def tile(number):
    start = number // columns * _TILE, number % columns * _TILE, 0
    ours = lax.dynamic_slice(query, start, (_TILE, _TILE, d))
    theirs = lax.dynamic_slice(key, start, (side, side, d))
    similarity = jnp.einsum(
        "yxd,ijd->yxij", ours, theirs, precision=lax.Precision.HIGHEST
    )
    y, x = (s - radius + jnp.arange(side) for s in start[:2])
    inside = ((y >= 0) & (y < h))[:, None] & (x >= 0) & (x < w)
    similarity = jnp.where(near & inside, similarity, -jnp.inf)
    best, index = lax.top_k(similarity.reshape(_TILE, _TILE, -1), top)
    # Beyond the edges only where nothing is found there either.
    index = jnp.clip(y[index // side], 0, h - 1) * w + jnp.clip(
        x[index % side], 0, w - 1
    )
    return best, index

  def whole(tiles):
    tiles = tiles.reshape(rows, columns, _TILE, _TILE, top).swapaxes(1, 2)
    return tiles.reshape(rows * _TILE, columns * _TILE, top)[:h, :w]

  best, index = lax.map(tile, jnp.arange(rows * columns))
  return whole(best), whole(index)


class Propagation:
  """Soft masks at the features' resolution, frame after frame.

  Held are the features and masks of the frames in which something was given,
  and of the `context` frames before the next one.
  """

  def __init__(
      self, *, context: int, radius: int, top: int, temperature: float
  ):
    self._nearest = functools.partial(nearest, radius=radius, top=top)
    self._top = top
    self._temperature = temperature
    self._given: list[tuple[Any, np.ndarray]] = []
    self._recent = deque(maxlen=context)

  def step(
      self,
      features: Float[Any, "h w d"],
      given: Float[np.ndarray, "h w c"] | None = None,
  ) -> Float[np.ndarray, "h w c"]:
    """The masks of the next frame; channel 0 is no object.

    `given` is 1 in its object's channel where an object begins, and 0 in all
    channels elsewhere.
    """
    if not self._given:
      if given is None:
        raise ValueError("the first frame is expected with what is given")
      masks = np.zeros(given.shape, np.float32)
      masks[..., 0] = 1
    else:
      masks = self._voted(features)
    if given is None:
      self._recent.append((features, masks))
    else:
      masks = np.where(given.any(-1, keepdims=True), given, masks)
      self._given.append((features, masks))
    return masks

  def _voted(self, features):
    context = [*self._given, *self._recent]
    # All are dispatched before the first is fetched.
    found = [self._nearest(features, key) for key, _ in context]
    best = np.concatenate([np.asarray(similar) for similar, _ in found], -1)
    values = np.concatenate(
        [
            masks.reshape(-1, masks.shape[-1])[np.asarray(index)]
            for (_, index), (_, masks) in zip(found, context, strict=True)
        ],
        axis=-2,
    )
    # Of each frame's nearest, the nearest of all.
    chosen = np.argpartition(-best, self._top - 1, axis=-1)[..., : self._top]
    best = np.take_along_axis(best, chosen, -1)
    values = np.take_along_axis(values, chosen[..., None], -2)
    weight = np.exp((best - best.max(-1, keepdims=True)) / self._temperature)
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("hwk,hwkc->hwc", weight, values)


def hard(
    masks: Float[np.ndarray, "h w c"], size: tuple[int, int]
) -> Integer[np.ndarray, "_ _"]:
  """The channel of each pixel: bilinear, each channel from 0 to 1, the largest."""
  best, channel = np.full(size, -1, np.float32), np.zeros(size, int)
  # One after the other: OpenCV takes no 255 channels, and memory would hold them.
  for i in range(masks.shape[-1]):
    mask = np.ascontiguousarray(masks[..., i])
    mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_LINEAR)
    mask -= mask.min()
    mask /= mask.max() or 1
    channel[mask > best] = i
    np.maximum(best, mask, out=best)
  return channel


def at_cells(
    x: Integer[np.ndarray, "_ _"], size: tuple[int, int]
) -> Integer[np.ndarray, "_ _"]:
  """The values at the middle of each cell."""
  rows, columns = (
      ((np.arange(count) + 0.5) * side / count).astype(int)
      for count, side in zip(size, x.shape, strict=True)
  )
  return x[np.ix_(rows, columns)]


class _Scores:
  """J and F of each object of a sequence, one row a frame, for one method."""

  def __init__(self, count: int):
    self._rows: list[list[tuple[float, float]]] = [[] for _ in range(count)]

  def add(self, channel: int, mask: np.ndarray, truth: np.ndarray) -> None:
    self._rows[channel - 1].append(
        (
            measures.region_similarity(mask, truth),
            measures.boundary_accuracy(mask, truth),
        )
    )

  def objects(self) -> list[dict[str, float]]:
    """What each object that has a frame comes to, in percent."""
    found = []
    for rows in filter(None, self._rows):
      values = {}
      for name, column in zip("jf", np.array(rows).T, strict=True):
        for statistic, value in measures.statistics(column)._asdict().items():
          values[f"{name}_{statistic}"] = 100 * value
      found.append(values)
    return found


def follow(
    sequence: Any,
    extractors: Mapping[str, Extractor],
    *,
    name: str,
    batch: int,
    done: Callable[[int], Any] = lambda frames: None,
    **settings: Any,
) -> dict[str, list[dict[str, float]]]:
  """The statistics of each object, for each extractor and `copy_first`.

  Frames are read `batch` at a time, each once; see `Propagation`. `done` hears
  how many were followed. Under `name` is said which label of a later mask is no
  object's, and so counts as none, and which object no mask shows.
  """
  count = len(sequence.objects)
  channel_of = np.zeros(256, int)
  channel_of[list(sequence.objects)] = np.arange(1, count + 1)
  propagations = {method: Propagation(**settings) for method in extractors}
  scores = {method: _Scores(count) for method in (*extractors, "copy_first")}
  annotated = [i for i, mask in enumerate(sequence.masks) if mask is not None]
  begun: set[int] = set()
  known = {0, *sequence.objects}
  copied = np.zeros(sequence.size, int)
  for start in range(0, len(sequence), batch):
    indices = range(start, min(start + batch, len(sequence)))
    frames = np.stack([sequence.frame(i) for i in indices])
    # Repeats fill the last batch: one shape, one compilation.
    filled = frames[np.arange(batch) % len(frames)]
    features = {
        method: extract(filled) for method, extract in extractors.items()
    }
    for i in indices:
      labels = sequence.labels(i)
      truth = None if labels is None else channel_of[labels]
      shown = set() if labels is None else set(np.unique(labels).tolist())
      for label in sorted(shown - known):
        tqdm.tqdm.write(
            f"{name}: label {label}, from frame {i} on, is not in the first"
            " mask and counts as no object"
        )
      known |= shown
      new = {int(channel_of[label]) for label in shown} - begun - {0}
      if not begun | new:
        continue
      measured = begun if truth is not None and i < annotated[-1] else ()
      given = np.where(np.isin(truth, list(new)), truth, 0) if new else None
      masks = {"copy_first": copied}
      for method, propagation in propagations.items():
        own = features[method][i - start]
        cells = None
        if new:
          cells = np.eye(count + 1, dtype=np.float32)[
              at_cells(given, own.shape[:2])
          ]
          cells[..., 0] = 0
        soft = propagation.step(own, cells)
        if measured:
          masks[method] = hard(soft, sequence.size)
      for channel in measured:
        for method, mask in masks.items():
          scores[method].add(channel, mask == channel, truth == channel)
      if new:
        copied = np.where(given > 0, given, copied)
        begun |= new
    done(len(indices))
  for label in sequence.objects:
    if channel_of[label] not in begun:
      tqdm.tqdm.write(
          f"{name}: no mask shows object {label}, which counts in nothing"
      )
  return {method: score.objects() for method, score in scores.items()}


def run(
    name: str,
    dataset: Any,
    extractors: Mapping[str, Extractor],
    *,
    batch: int = 1,
    context: int = 7,
    radius: int = 12,
    top: int = 5,
    temperature: float = 0.1,
    progress: bool = True,
) -> dict[str, float]:
  """J and F in percent, the mean over objects, keyed `davis/NAME/METRIC`.

  Args:
    name: of the set.
    dataset: as data.mask_datasets.MaskSequences.
    extractors: suffix -> extractor: "" gives `j_and_f`, "pixels" gives
      `j_and_f_pixels`. Masks that stay where they were given are `copy_first`.
    batch: frames that an extractor gets.
    context: frames before each that it takes labels from, beside those given.
    radius: of the neighbourhood, in cells.
    top: cells that a cell takes its labels from.
    temperature: their weights are exp(similarity / temperature).
    progress: shows a bar over all frames, and writes J&F of each sequence.

  Raises:
    UserError: no sequence has anything to measure.
  """
  totals: dict[str, list[dict[str, float]]] = {}
  rows, measured = {}, 0
  with tqdm.tqdm(
      total=sum(dataset.length(i) for i in range(len(dataset))),
      desc=f"davis/{name}",
      unit="frame",
      disable=not progress,
      leave=False,
  ) as bar:
    for i in range(len(dataset)):
      label = f"davis/{name}/{dataset.record_id(i)}"
      bar.set_postfix_str(f"{i + 1}/{len(dataset)} {dataset.record_id(i)}")
      found = follow(
          dataset.sequence(i),
          extractors,
          name=label,
          batch=batch,
          done=bar.update,
          context=context,
          radius=radius,
          top=top,
          temperature=temperature,
      )
      means = {method: _means(objects) for method, objects in found.items()}
      if progress:
        tqdm.tqdm.write(f"{label}: {_line(means)}")
      measured += any(found.values())
      for method, objects in found.items():
        totals[method] = totals.get(method, []) + objects
        for metric, value in means[method].items():
          if metric in _EACH:
            rows[_suffixed(f"{label}/{_EACH[metric]}", method)] = value
  if not measured:
    raise errors.UserError(
        f"davis/{name}: expected an object with an annotated frame between its"
        " first and the last, came none"
    )
  result = {
      _suffixed(f"davis/{name}/{metric}", method): value
      for method, objects in totals.items()
      for metric, value in _means(objects).items()
  }
  result[f"davis/{name}/count"] = measured
  return result | (rows if len(dataset) <= _EACH_LIMIT else {})


def _line(means: Mapping[str, Mapping[str, float]]) -> str:
  """J&F of each method, for people."""
  values = [
      f"{method} {of['j_and_f']:.1f}".strip()
      for method, of in means.items()
      if of
  ]
  return f"J&F {', '.join(values)}" if values else "nothing to measure"


def _suffixed(key: str, method: str) -> str:
  return f"{key}_{method}" if method else key


def _means(objects: list[dict[str, float]]) -> dict[str, float]:
  """The means over objects; nothing of no objects."""
  if not objects:
    return {}
  means = {
      name: float(np.mean([values[name] for values in objects]))
      for name in objects[0]
  }
  return {"j_and_f": (means["j_mean"] + means["f_mean"]) / 2} | means
