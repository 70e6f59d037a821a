"""What is wrong with a config, all of it, before anything is compiled."""

from typing import Any

import jax

from mcjepa_jax import objective, step
from mcjepa_jax.models import convnext

# Keys that a resumed run may change: they do not touch what is learned.
OPERATIONAL = frozenset(
    {
        "task",
        "name",
        "data_root",
        "checkpoint",
        "results",
        "compilation_cache",
        "eval_seed",
        "eval_every",
        "eval_batch_size",
        "eval_max_pixels",
        "evals",
        "best_is_larger",
        "best_metric",
        "keep_best",
        "keep_last",
        "knn_size",
        "log_every",
        "log_records",
        "mesh",
        "panel_every",
        "prefetch",
        "save_every",
        "workers",
    }
)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
  """The leaves of a nested config, keyed `part.key`."""
  flat = {}
  for key, value in config.items():
    if hasattr(value, "items"):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def faults(config: Any, *, devices: int | None = None) -> list[str]:
  """One message for each fault: the key, what was expected, what came."""
  found = []

  def expect(key, holds, expected):
    value = config
    for part in key.split("."):
      value = value[part]
    if not holds(value):
      found.append(f"{key}: expected {expected}, got {value!r}")

  def positive(value):
    return value > 0

  def not_negative(value):
    return value >= 0

  def one_of(*names):
    return lambda value: value in names, "one of " + ", ".join(names)

  expect("mode", *one_of(*step.MODES))
  expect("task", *one_of("train", "evaluate"))
  expect("model.encoder.stem", *one_of("split", "patch"))
  expect("model.encoder.kernel_init", *one_of("normal", "fan_in"))
  expect("model.dtype", *one_of("float32", "bfloat16"))
  expect("motion.occlusion", *one_of("none", "forward_backward", "range_map"))
  expect("motion.geometry", *one_of("crop", "resize"))
  expect("motion.smoothness.form", *one_of("arflow", "uflow"))
  expect("motion.smoothness.order", lambda x: x in (1, 2), "1 or 2")
  for key in ("num_steps", "accumulate", "motion.batch_size",
              "content.batch_size", "content.size", "log_every", "save_every",
              "keep_last", "prefetch", "eval_batch_size",
              "eval_max_pixels", "knn_size",
              "model.estimator.factor", "model.estimator.projection"):  # fmt: skip
    expect(key, positive, "a positive number")
  for key in ("seed", "eval_seed", "workers", "eval_every", "panel_every",
              "motion.start_step", "motion.ramp_steps", "motion.weight",
              "motion.occlusion_start", "optimizer.clip_norm", "keep_best"):  # fmt: skip
    expect(key, not_negative, "0 or more")
  for key in ("encoder", "estimator"):
    expect(f"optimizer.{key}.learning_rate", positive, "a positive number")
    expect(f"optimizer.{key}.weight_decay", not_negative, "0 or more")
  reads = (
      () if config.mode not in step.MODES else step.tasks_of_mode(config.mode)
  )
  found += _size_faults(config, reads)
  found += _weight_faults(config)
  if devices:
    found += _batch_faults(config, reads, devices)
  return found


def _strides(config: Any) -> tuple[int, ...]:
  encoder = config.model.encoder
  return convnext.ConvNeXt(
      depths=tuple(encoder.depths), dims=tuple(encoder.dims), stem=encoder.stem
  ).strides


def _size_faults(config: Any, reads: tuple[str, ...]) -> list[str]:
  found = []
  encoder = config.model.encoder
  if len(encoder.depths) != len(encoder.dims):
    return [
        "model.encoder.depths: expected as many as dims,"
        f" {len(encoder.dims)}, got {encoder.depths!r}"
    ]
  strides = _strides(config)
  coarsest = strides[-1]
  size = tuple(config.motion.size)
  if "motion" in reads and (
      len(size) != 2 or any(s <= 0 or s % coarsest for s in size)
  ):
    found.append(
        f"motion.size: expected (height, width), multiples of {coarsest},"
        f" the encoder's coarsest stride, got {size}"
    )
  if "content" in reads and config.content.size % coarsest:
    found.append(
        f"content.size: expected a multiple of {coarsest}, the encoder's"
        f" coarsest stride, got {config.content.size}"
    )
  finest = config.model.estimator.finest_stride
  if finest not in strides:
    found.append(
        "model.estimator.finest_stride: expected one of"
        f" {strides}, got {finest}"
    )
  return found


def _weight_faults(config: Any) -> list[str]:
  found = []
  strides = _strides(config)
  for kind, weights in config.motion.terms.items():
    for name, weight in weights.items():
      if not weight:
        continue
      stride = objective.stride_of(name)
      of_features = kind not in ("reconstruction", "smoothness")
      if of_features and stride not in strides:
        found.append(
            f"motion.terms.{kind}.{name}: the encoder's strides are {strides};"
            f" got a weight of {weight}"
        )
      if weight < 0:
        found.append(
            f"motion.terms.{kind}.{name}: expected 0 or more, got {weight}"
        )
  return found


def _batch_faults(
    config: Any, reads: tuple[str, ...], devices: int
) -> list[str]:
  """Motion is sharded by frame, so pairs may be half as many as devices."""
  found = []
  parts = config.accumulate
  for task in reads:
    batch = config[task].batch_size
    if batch % parts:
      found.append(
          f"{task}.batch_size: expected a multiple of accumulate, {parts}, got"
          f" {batch}"
      )
    elif 2 * (batch // parts) % devices:
      noun = "frames" if task == "motion" else "views"
      found.append(
          f"{task}.batch_size: {batch} give {2 * batch // parts} {noun}"
          f" a micro-batch, which {devices} devices do not divide"
      )
  return found


def device_count(config: Any) -> int:
  """How many devices the mesh of this config has here."""
  return jax.device_count() if config.mesh.devices < 0 else config.mesh.devices
