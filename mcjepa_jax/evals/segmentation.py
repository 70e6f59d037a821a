"""Semantic segmentation: training of a head, and the sliding-window test.

Accuracy and intersection over union are of all labelled pixels of a set, at the
size of its label maps, in percent.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
from typing import Any, NamedTuple

import cv2
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
import numpy as np
import optax
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.data.pipeline import labelled_crops
from mcjepa_jax.data.pipeline.labelled_crops import VOID
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import metrics
from mcjepa_jax.ops import flow_ops
from mcjepa_jax.step import optimizer

_PIXELS_STRIDE = 4  # of the finest stage, and so of raw pixels in its place
_WARMUP_FRACTION = 1e-6  # of the learning rate, at the first step
# ConvNeXt's six layers of rates: a stage's is decay^(6 - its number), that of
# the stem and of downsampling decay^7.
_DECAY_LAYERS = 6

Params = Any
# windows u8 [n, s, s, 3] -> {name: logits f32 [n, r, r, k]}
Predictor = Callable[[np.ndarray], dict[str, np.ndarray]]


class Network(NamedTuple):
  """What is trained, as a function and its arrays."""

  # (params, stats, fixed, images in [0, 1], key or None for the test)
  # -> ({name: [logits, *auxiliary logits]}, stats)
  forward: Callable[..., tuple[dict[str, list[Array]], Any]]
  params: Params
  stats: Params
  fixed: Params  # arrays that no step changes
  rates: Params  # of the learning rate, one a leaf of params
  decayed: Callable[[Params], Any] | None  # which leaves decay; None: all


def _stages(pyramid, encoder):
  return pyramid[-len(encoder.depths) :]


def linear_network(
    encoder: nn.Module,
    encoders: Mapping[str, Params],
    head: nn.Module,
    *,
    size: int,
    seed: int,
) -> Network:
  """A head on each frozen encoder of `encoders` and, as `pixels`, on the image.

  All are trained by the same crops; no gradient reaches an encoder.
  """

  def stages(fixed, images):
    side = images.shape[1] // _PIXELS_STRIDE
    found = {
        name: _stages(encoder.apply({"params": params}, images), encoder)
        for name, params in fixed.items()
    }
    found["pixels"] = [flow_ops.resize(images, (side, side))]
    return lax.stop_gradient(found)

  def forward(params, stats, fixed, images, key):
    outputs, updated = {}, {}
    for name, levels in stages(fixed, images).items():
      outputs[name], updated[name] = head.apply(
          {"params": params[name], "batch_stats": stats[name]},
          levels,
          train=key is not None,
          mutable=["batch_stats"],
      )
    return outputs, {k: v["batch_stats"] for k, v in updated.items()}

  fixed = dict(encoders)
  blank = jnp.zeros((1, size, size, 3))
  shapes = jax.eval_shape(stages, fixed, blank)
  key = jax.random.key(seed)
  variables = {
      name: _init(head, key, levels) for name, levels in shapes.items()
  }
  params = {name: v["params"] for name, v in variables.items()}
  stats = {name: v["batch_stats"] for name, v in variables.items()}
  # All decay, as in VICRegL's configs: the gains of the norm too.
  rates = jax.tree.map(_one, params)
  return Network(forward, params, stats, fixed, rates, decayed=None)


def _init(head, key, levels):
  def init():
    zeros = [jnp.zeros(x.shape, x.dtype) for x in levels]
    return head.init(key, zeros, train=False)

  return sharding.call_once(init)


def _one(leaf):
  del leaf
  return 1.0


def tuned_network(
    encoder: nn.Module,
    params: Params,
    head: nn.Module,
    *,
    size: int,
    seed: int,
    layer_decay: float,
) -> Network:
  """A head on an encoder that is trained with it, as ``.

  The encoder's learning rates decay by stage, as in ConvNeXt's fine-tuning.
  """

  def forward(params, stats, fixed, images, key):
    del fixed
    train = key is not None
    keys = jax.random.split(key) if train else (None, None)
    pyramid = encoder.apply(
        {"params": params["encoder"]},
        images,
        deterministic=not train,
        rngs={"drop_path": keys[0]} if train else None,
    )
    logits, updated = head.apply(
        {"params": params["head"], "batch_stats": stats},
        _stages(pyramid, encoder),
        train=train,
        mutable=["batch_stats"],
        rngs={"dropout": keys[1]} if train else None,
    )
    return {"": logits}, updated["batch_stats"]

  blank = jnp.zeros((1, size, size, 3))
  shapes = jax.eval_shape(lambda: encoder.apply({"params": params}, blank))
  variables = _init(head, jax.random.key(seed), _stages(shapes, encoder))
  params = {"encoder": params, "head": variables["params"]}
  rates = jax.tree_util.tree_map_with_path(
      lambda path, _: layer_decay ** _depth([entry.key for entry in path]),
      params,
  )
  stats = variables["batch_stats"]
  decayed = optimizer.decay_mask
  return Network(forward, params, stats, {}, rates, decayed)


def _depth(path: list[str]) -> int:
  """How many times the learning rate of a parameter decays."""
  if path[0] == "head" or path[1] == "norm":
    return 0
  if path[1].startswith("stages_") and path[2].startswith("blocks_"):
    return _DECAY_LAYERS - int(path[1].removeprefix("stages_"))
  return _DECAY_LAYERS + 1


def poly_schedule(
    learning_rate: float, num_steps: int, warmup_steps: int
) -> optax.Schedule:
  """The rate of each update: falls linearly to 0 behind a linear warm-up.

  mmsegmentation's poly of power 1: the warm-up is a factor on what it falls to.
  """

  def rate(count):
    part = jnp.minimum(1.0, count / warmup_steps) if warmup_steps else 1.0
    warm = _WARMUP_FRACTION + (1 - _WARMUP_FRACTION) * part
    return learning_rate * warm * (1 - count / num_steps)

  return rate


def cross_entropy(
    logits: Float[Array, "n r r k"], labels: UInt8[Array, "n s s"]
) -> Float[Array, ""]:
  """Mean over labelled pixels, the logits resized to the labels."""
  logits = flow_ops.resize(logits, labels.shape[1:])
  valid = labels != VOID
  losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.where(valid, labels, 0).astype(jnp.int32)
  )
  return jnp.sum(losses * valid) / jnp.maximum(jnp.sum(valid), 1)


def fit(
    network: Network,
    batches: Iterator[UInt8[np.ndarray, "n s s 4"]],
    mesh: jax.sharding.Mesh,
    *,
    name: str,
    num_steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    seed: int,
    auxiliary_weight: float = 0.0,
) -> Network:
  """The network trained by AdamW on `num_steps` batches.

  Raises:
    UserError: the loss is not finite.
  """
  tx = optax.chain(
      optax.scale_by_adam(),
      optax.add_decayed_weights(weight_decay, mask=network.decayed),
      optax.stateless(
          lambda updates, _: jax.tree.map(jnp.multiply, updates, network.rates)
      ),
      optax.scale_by_learning_rate(
          poly_schedule(learning_rate, num_steps, warmup_steps)
      ),
  )
  replicated = sharding.replicated(mesh)
  root = jax.random.key(seed)

  @functools.partial(
      jax.jit,
      in_shardings=(replicated, None, sharding.batch_sharding(mesh)),
      out_shardings=(replicated, replicated),
      donate_argnums=0,
  )
  def step(state, fixed, batch):
    params, stats, opt_state, count = state
    images, labels = _unpacked(batch)

    def loss_fn(params):
      outputs, updated = network.forward(
          params, stats, fixed, images, jax.random.fold_in(root, count)
      )
      losses = [
          (auxiliary_weight if i else 1.0) * cross_entropy(logits, labels)
          for each in outputs.values()
          for i, logits in enumerate(each)
      ]
      return sum(losses), updated

    (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, stats, opt_state, count + 1), loss

  # Copies: the step gives its arguments' memory away.
  state = jax.tree.map(
      jnp.array,
      (network.params, network.stats, tx.init(network.params), 0),
  )
  state, fixed = jax.device_put((state, network.fixed), replicated)
  previous = None
  with tqdm.tqdm(total=num_steps, desc=name, unit="step", leave=False) as bar:
    for number in range(num_steps):
      state, loss = step(state, fixed, next(batches))
      # One step late, so that the host prepares a batch meanwhile.
      if previous is not None:
        _show(bar, name, number - 1, previous)
      previous = loss
    _show(bar, name, num_steps - 1, previous)
  return network._replace(params=state[0], stats=state[1], fixed=fixed)


def _unpacked(batch):
  return batch[..., :3].astype(jnp.float32) / 255, batch[..., 3]


def _show(bar, name, number, loss):
  loss = float(loss)
  if not np.isfinite(loss):
    raise errors.UserError(
        f"{name}: expected a finite loss, got {loss} at step {number} of the"
        " head's training; a lower learning_rate may cure it"
    )
  bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
  bar.update()


def predictor(network: Network, mesh: jax.sharding.Mesh) -> Predictor:
  """A function from u8 windows to the main logits on the finest stage's grid."""
  batch = sharding.batch_sharding(mesh)

  @functools.partial(jax.jit, in_shardings=(None, None, None, batch))
  def forward(params, stats, fixed, windows):
    images = windows.astype(jnp.float32) / 255
    outputs, _ = network.forward(params, stats, fixed, images, None)
    return {name: logits[0] for name, logits in outputs.items()}

  def predict(windows):
    # Padded with repeats up to what the devices divide; the rest is dropped.
    count = -(-len(windows) // mesh.size) * mesh.size
    rows = np.arange(count) % len(windows)
    outputs = forward(
        network.params, network.stats, network.fixed, windows[rows]
    )
    return {k: np.asarray(x)[: len(windows)] for k, x in outputs.items()}

  return predict


def starts(length: int, window: int, stride: int) -> list[int]:
  """Where windows begin: `stride` apart, the last one at the end."""
  last = max(length - window, 0)
  return [min(at, last) for at in range(0, last + stride, stride)]


def slide(
    images: Iterable[UInt8[np.ndarray, "_ _ 3"]],
    predict: Predictor,
    *,
    window: int,
    stride: int,
    batch_size: int,
) -> Iterator[dict[str, Float[np.ndarray, "k _ _"]]]:
  """Yields each image's logits, the mean of the windows that see a pixel.

  Windows of neighbouring images share a batch, and the last one is filled with
  repeats: one shape is compiled. One image's logits are held at a time.
  """
  held: list[tuple[np.ndarray, tuple[int, int], tuple[int, int], bool]] = []
  sums: dict[str, np.ndarray] = {}
  visits = np.zeros((0, 0), np.float32)

  def flush():
    nonlocal sums, visits
    rows = np.arange(batch_size) % len(held)
    outputs = predict(np.stack([held[row][0] for row in rows]))
    for row, (_, size, (top, left), last) in enumerate(held):
      if not sums:
        sums = {
            name: np.zeros((x.shape[-1], *size), np.float32)
            for name, x in outputs.items()
        }
        visits = np.zeros(size, np.float32)
      # What pads a small image is cut off.
      height, width = (min(window, side) for side in size)
      place = np.s_[top : top + height, left : left + width]
      for name, x in outputs.items():
        for total, logits in zip(
            sums[name], np.moveaxis(x[row], -1, 0), strict=True
        ):
          total[place] += _resized(logits, (window, window))[:height, :width]
      visits[place] += 1
      if last:
        for total in sums.values():
          total /= visits
        yield sums
        sums = {}
    held.clear()

  for image in images:
    size = image.shape[:2]
    image = labelled_crops.padded(image, window)
    places = [
        (top, left)
        for top in starts(size[0], window, stride)
        for left in starts(size[1], window, stride)
    ]
    for top, left in places:
      cut = image[top : top + window, left : left + window]
      held.append((cut, size, (top, left), (top, left) == places[-1]))
      if len(held) == batch_size:
        yield from flush()
  if held:
    yield from flush()


def _resized(map_, size):
  if map_.shape == size:
    return map_
  map_ = np.ascontiguousarray(map_)
  return cv2.resize(map_, size[::-1], interpolation=cv2.INTER_LINEAR)


def classified(
    logits: Float[np.ndarray, "k r c"], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w"]:
  """The class of the highest logit at each pixel of a map of `size`."""
  best = np.full(size, -np.inf, np.float32)
  result = np.zeros(size, np.uint8)
  # Class by class: 150 maps of a large photograph would be gigabytes.
  for number, map_ in enumerate(logits):
    map_ = _resized(map_, size)
    np.copyto(result, number, where=map_ > best)
    np.maximum(best, map_, out=best)
  return result


def confusion_matrices(
    dataset: Any,
    predict: Predictor,
    *,
    name: str,
    short_side: int,
    window: int,
    stride: int,
    batch_size: int,
    max_pixels: int,
) -> dict[str, np.ndarray]:
  """The confusion matrix of each of the predictor's names over a set.

  Raises:
    UserError: no pixel of the set is labelled, or an image is too large: its
      logits are held for every class.
  """
  classes = len(dataset.classes)
  matrices: dict[str, np.ndarray] = {}
  truths: list[np.ndarray] = []

  def images():
    for i in range(len(dataset)):
      example = dataset[i]
      if (example["labels"] == VOID).all():
        tqdm.tqdm.write(
            f"{name}: {dataset.record_id(i)} has no labelled pixel and counts"
            " in nothing"
        )
      image = labelled_crops.fitted(example["image"], short_side)
      height, width = image.shape[:2]
      if height * width > max_pixels:
        raise errors.UserError(
            f"{name}: {dataset.record_id(i)}: expected an image of at most"
            f" {max_pixels} pixels (eval_max_pixels), got {width}x{height}"
        )
      truths.append(example["labels"])
      yield image

  scores = slide(
      images(), predict, window=window, stride=stride, batch_size=batch_size
  )
  bar = tqdm.tqdm(
      scores, desc=name, total=len(dataset), unit="image", leave=False
  )
  for each in bar:
    truth = truths.pop(0)
    for key, logits in each.items():
      matrix = metrics.confusion(
          truth, classified(logits, truth.shape), classes
      )
      matrices[key] = matrices.get(key, 0) + matrix
  if not any(matrix.any() for matrix in matrices.values()):
    raise errors.UserError(
        f"{name}: expected label maps with classes, got {len(dataset)} in which"
        " every pixel is void"
    )
  return matrices


def results(
    name: str, classes: tuple[str, ...], matrices: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """mIoU, accuracy and each class's IoU, keyed `NAME/METRIC_SUFFIX`.

  The mean is over the classes that occur in the truth.
  """
  found: dict[str, float] = {}
  for suffix, matrix in matrices.items():
    end = f"_{suffix}" if suffix else ""
    each = metrics.iou(matrix)
    found[f"{name}/miou{end}"] = float(np.nanmean(each))
    found[f"{name}/accuracy{end}"] = float(
        100 * np.trace(matrix) / matrix.sum()
    )
    found |= {
        f"{name}/{label}/iou{end}": float(value)
        for label, value in zip(classes, each, strict=True)
        if not np.isnan(value)
    }
  return found
