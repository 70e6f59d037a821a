"""What is wrong with a config, all of it, before anything is compiled."""

from collections.abc import Callable
import math
import pathlib
from typing import Any

from mcjepa_jax import errors
from mcjepa_jax.data import sources
from mcjepa_jax.losses import motion_objective
from mcjepa_jax.models import convnext
from mcjepa_jax.runtime import config_files
from mcjepa_jax.step import task_schedule
from mcjepa_jax.storage import local_files
from mcjepa_jax.training import alarms

# Keys that a resumed run may change: they do not touch what is learned.
OPERATIONAL = frozenset(
    {
        "task",
        "name",
        "alarms",
        "bad_records",
        "data_cache",
        "data_root",
        "checkpoint",
        "results",
        "compilation_cache",
        "davis",
        "eval_seed",
        "eval_every",
        "eval_limit",
        "eval_batch_size",
        "eval_max_pixels",
        "evals",
        "finetune",
        "best_is_larger",
        "best_metric",
        "keep_best",
        "hang_seconds",
        "keep_hours",
        "keep_last",
        "knn_size",
        "linear",
        "log_every",
        "log_records",
        "mesh",
        "panel_every",
        "prefetch",
        "remat",
        "save_every",
        "segmentation",
        "upernet",
        "workers",
    }
)


def faults(config: Any, *, devices: int | None = None) -> list[str]:
  """One message for each fault: the key, what was expected, what came."""
  found = []
  values = config_files.leaves(config)

  def expect(key, holds, expected):
    if not holds(values[key]):
      found.append(f"{key}: expected {expected}, got {values[key]!r}")

  def positive(value):
    return value > 0

  def not_negative(value):
    return value >= 0

  def one_of(*names):
    return lambda value: value in names, "one of " + ", ".join(names)

  expect("data_cache", lambda x: "://" not in x, "a local folder")
  expect("mode", *one_of(*task_schedule.MODES))
  expect("task", *one_of("train", "evaluate"))
  expect("alarms.action", *one_of(*alarms.ACTIONS))
  expect("model.encoder.stem", *one_of("split", "patch"))
  expect("model.encoder.kernel_init", *one_of("normal", "fan_in"))
  expect("model.dtype", *one_of("float32", "bfloat16"))
  expect("motion.occlusion", *one_of("none", "forward_backward", "range_map"))
  expect("motion.geometry", *one_of("crop", "resize"))
  expect("accumulation", *one_of("plain", "exact"))
  expect("remat", *one_of(*convnext.REMAT))
  for task in ("motion", "content"):
    expect(f"{task}.mixing", *one_of("weights", "repetitions"))
  expect("motion.smoothness.form", *one_of("arflow", "uflow"))
  expect("motion.smoothness.order", lambda x: x in (1, 2), "1 or 2")
  for key in ("num_steps", "accumulate", "motion.batch_size",
              "content.batch_size", "content.size", "log_every", "save_every",
              "keep_last", "prefetch", "eval_batch_size",
              "eval_max_pixels", "knn_size", "davis.stride",
              "davis.temperature", "davis.batch", "linear.epochs",
              "linear.batch_size", "finetune.epochs", "finetune.batch_size",
              "alarms.skips_in_a_row", "alarms.skips", "alarms.window",
              "alarms.diagnoses",
              "model.estimator.factor", "model.estimator.projection"):  # fmt: skip
    expect(key, positive, "a positive number")
  for key in ("workers", "eval_every", "eval_limit", "panel_every",
              "linear.weight_decay", "finetune.weight_decay",
              "alarms.rollbacks", "alarms.dumps", "alarms.warm_up",
              "alarms.diagnose_every",
              "motion.start_step", "motion.ramp_steps", "motion.weight",
              "motion.occlusion_start", "optimizer.clip_norm", "keep_best",
              "davis.context"):  # fmt: skip
    expect(key, not_negative, "0 or more")
  for key in ("encoder", "estimator"):
    expect(f"optimizer.{key}.weight_decay", not_negative, "0 or more")
  _expect_ranges(expect)
  if found:  # what follows reads values that are well formed
    return found
  if config.data_cache:
    cache = pathlib.Path(config.data_cache).expanduser()
    found += errors.collect(
        lambda: local_files.check_writable(cache, "data_cache")
    )
  reads = task_schedule.tasks_of_mode(config.mode)
  found += _size_faults(config, reads)
  found += _weight_faults(config)
  found += _nothing_to_learn(config, reads)
  if config.keep_best and not any(
      config.best_metric.startswith(f"{entry}/") for entry in config.evals
  ):
    found.append(
        "best_metric: with keep_best expected a result of one of evals,"
        f" {tuple(config.evals)}, got {config.best_metric!r}"
    )
  if devices:
    found += _batch_faults(config, reads, devices)
  return found


def no_way_back(config: Any) -> list[str]:
  """Alarms that are to roll back, to checkpoints that are gone by then.

  Of a run; its config as such has no fault.
  """
  if config.alarms.action != "rollback" or config.keep_hours:
    return []
  lasts = max((rule.lasts for rule in alarms.rules(config)), default=0)
  # One is of the step from which there is flow, where that is none of the others.
  start = config.motion.start_step
  extra = any(
      task_schedule.is_first_with_flow(config.mode, n, start)
      and n % config.save_every
      for n in (start, start + 1)
  )
  reach = (config.keep_last - 1 - extra) * config.save_every
  if reach >= lasts:
    return []
  return [
      "alarms.action: rollback goes back to before what was judged, as many as"
      f" {lasts} steps: expected (keep_last - {1 + extra}) * save_every of as"
      f" much, or keep_hours, got ({config.keep_last} - {1 + extra}) *"
      f" {config.save_every}"
  ]


def _numbers(value: Any) -> bool:
  return all(type(x) in (int, float) and abs(x) < math.inf for x in value)


def _widths(value: Any) -> bool:
  return len(value) > 0 and all(type(x) is int and x > 0 for x in value)


def _is_size(value: Any) -> bool:
  return isinstance(value, tuple) and len(value) == 2 and _widths(value)


def _weighted(value: Any) -> bool:
  return len(value) > 0 and all(
      isinstance(x, tuple)
      and len(x) == 2
      and isinstance(x[0], str)
      and _numbers(x[1:])
      and x[1] > 0
      for x in value
  )


def _weighted_or_sized(value: Any) -> bool:
  return all(
      isinstance(x, tuple) and (len(x) < 3 or _is_size(x[2])) for x in value
  ) and _weighted(tuple(x[:2] if len(x) == 3 else x for x in value))


def _expect_ranges(expect: Callable[..., None]) -> None:
  """Lengths, kinds of elements and ranges of tuples and probabilities."""

  def up_to(most):
    return lambda x: 0 <= x <= most, f"0 to {most}"

  def interval(most=math.inf):
    return (
        lambda x: len(x) == 2 and _numbers(x) and 0 < x[0] <= x[1] <= most,
        "(least, most), above 0" + (f" and up to {most}" if most == 1 else ""),
    )

  for key in ("seed", "eval_seed"):
    expect(key, *up_to(2**31 - 1))
  # What is beyond overflows where it is used: after the first save, step.
  for key in ("keep_hours", "hang_seconds"):
    expect(key, *up_to(10**6))
  expect(
      "evals",
      lambda x: all(isinstance(name, str) for name in x),
      "names, as 'flow/synthetic'",
  )
  expect(
      "linear.learning_rates",
      lambda x: len(x) > 0 and _numbers(x) and min(x) > 0,
      "positive numbers",
  )
  expect("finetune.learning_rate", lambda x: 0 < x < math.inf, "positive")
  for key in ("encoder.depths", "encoder.dims", "expander.widths",
              "estimator.channels"):  # fmt: skip
    expect(f"model.{key}", _widths, "positive integers")
  expect("model.encoder.drop_path", lambda x: 0 <= x < 1, "0 to below 1")
  expect("model.encoder.layer_scale", lambda x: x >= 0, "0 or more")
  for key in ("radius", "max_flow"):
    expect(f"model.estimator.{key}", lambda x: x > 0, "a positive number")
  expect("motion.size", _is_size, "(height, width), two positive integers")
  expect(
      "motion.sources",
      _weighted_or_sized,
      "(name, positive number) or (name, positive number, (height, width))",
  )
  expect("content.sources", _weighted, "(name, positive number) pairs")
  expect("bad_records", *up_to(1))
  for key in ("occluded", "gradient_norm"):
    expect(
        f"alarms.{key}",
        lambda x: len(x) == 2 and _numbers(x) and x[0] <= x[1],
        "(least, most)",
    )
  expect("motion.downscale", *interval())
  expect(
      "motion.rotation",
      lambda x: len(x) == 2 and _numbers(x) and -180 <= x[0] <= x[1] <= 180,
      "(least, most), degrees from -180 to 180",
  )
  expect("motion.relative_rotation", *up_to(180))
  expect("motion.relative_scale", lambda x: 1 <= x < 4, "1 to below 4")
  expect("motion.relative_shift", *up_to(1024))
  expect(
      "motion.gaps",
      lambda x: len(x) == 2 and _widths(x) and x[0] <= x[1],
      "(least, most), integers from 1 on",
  )
  expect("content.scale", *interval(1))
  expect("content.ratio", *interval())
  # A tile of the affinity has 144 cells and their neighbourhoods.
  for key, most in (("size", 4096), ("radius", 64), ("top", 100)):
    expect(f"davis.{key}", lambda x, most=most: 1 <= x <= most, f"1 to {most}")
  for key in ("content.gray", "motion.erase"):
    expect(key, *up_to(1))
  for key in ("content.blur", "content.solarize"):
    expect(
        key,
        lambda x: len(x) == 2 and _numbers(x) and 0 <= min(x) <= max(x) <= 1,
        "two of 0 to 1",
    )
  for task in ("motion", "content"):
    for key in ("brightness", "contrast", "saturation", "p"):
      expect(f"{task}.jitter.{key}", *up_to(1))
    expect(f"{task}.jitter.hue", *up_to(0.5))
  for key in ("motion.photometric.l1", "motion.photometric.l2",
              "motion.photometric.ssim", "motion.photometric.census",
              "content.terms.invariance", "content.terms.variance",
              "content.terms.covariance"):  # fmt: skip
    expect(key, lambda x: 0 <= x < math.inf, "0 or more")
  for key in ("encoder", "estimator"):
    expect(
        f"optimizer.{key}.learning_rate",
        lambda x: 0 < x < math.inf,
        "a positive number",
    )


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
  if "motion" in reads:
    sized = sources.sized(config.motion.sources, config.motion.size)
    of_sources = {size: f"motion.sources: {name}" for name, _, size in sized}
    sizes = of_sources | {tuple(config.motion.size): "motion.size"}
    found += [
        f"{key}: expected (height, width), multiples of {coarsest}, the"
        f" encoder's coarsest stride, got {size}"
        for size, key in sizes.items()
        if any(side % coarsest for side in size)
    ]
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
  followed = any(name.startswith("davis/") for name in config.evals)
  # An evaluation's encoder is the checkpoint's, and is looked at there.
  if config.task == "train" and followed and config.davis.stride not in strides:
    found.append(
        f"davis.stride: expected one of {strides}, the encoder's strides, got"
        f" {config.davis.stride}"
    )
  return found


def _weight_faults(config: Any) -> list[str]:
  found = []
  strides = _strides(config)
  for kind, weights in config.motion.terms.items():
    for name, weight in weights.items():
      if not weight:
        continue
      stride = motion_objective.stride_of(name)
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


def _nothing_to_learn(config: Any, reads: tuple[str, ...]) -> list[str]:
  """A task of the mode without a single weight."""
  weights = {
      "motion": [
          config.motion.weight * w
          for kind in config.motion.terms.values()
          for w in kind.values()
      ],
      "content": list(config.content.terms.values()),
  }
  return [
      f"{task}: mode {config.mode} trains it, and all its weights are 0"
      for task in reads
      if not any(weights[task])
  ]


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
