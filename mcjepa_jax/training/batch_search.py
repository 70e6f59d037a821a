"""The largest batch that fits: foretold from two compiles, confirmed by a third.

A device holds what the batch does not change, the train state and its gradient,
and what is in proportion to the batch. One compile that keeps all activations
and one that keeps only the inputs of the encoder's blocks (remat=block) give the
two proportions, and what the second costs.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from mcjepa_jax import errors
from mcjepa_jax.training import validation

POLICIES = ("none", "block")
_MARGIN = 0.95  # of what a program may use: the foretold is not exact
# Parameters and two moments are the state; the gradient is one of the three.
_GRADIENT = 1 / 3


class BatchSize(NamedTuple):
  """Images and pairs of a step, of all devices together."""

  images: int
  pairs: int


def with_batch(config: Any, batch: BatchSize, policy: str) -> Any:
  """The config with another batch and another rematerialisation."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.content.batch_size, config.motion.batch_size = batch
    config.remat = policy
  return config


def smallest(config: Any, devices: int) -> BatchSize:
  """The smallest batch in the config's proportion that the devices divide.

  Raises:
    UserError: not even the config's own does.
  """
  images, pairs = config.content.batch_size, config.motion.batch_size
  parts = math.gcd(images, pairs)
  for part in range(1, parts + 1):
    batch = BatchSize(images // parts * part, pairs // parts * part)
    faults = validation.faults(
        with_batch(config, batch, config.remat), devices=devices
    )
    if not faults:
      return batch
  raise errors.UserError(*faults)


def foretold(
    report: dict[str, Any],
    batch: BatchSize,
    larger: tuple[int, dict[str, Any]] | None = None,
) -> dict[str, Any]:
  """The largest batch by the report on one: `times` it, and the memory then.

  With the report on one so many times `larger`, by the line through both.
  """
  fixed, least = (1 + _GRADIENT) * report["state_gib"], int(report["fits"])
  each = report["gib_per_device"] - fixed
  if larger is not None:
    more, other = larger
    each = (other["gib_per_device"] - report["gib_per_device"]) / (more - 1)
    fixed = report["gib_per_device"] - each
    least = more if other["fits"] else least
  each = max(each, 2.0**-20)
  times = int((_MARGIN * report["gib_limit"] - fixed) / each)
  times = max(times, least)  # what was compiled wants no margin
  return {
      "times": times,
      "images": times * batch.images,
      "pairs": times * batch.pairs,
      "gib_per_device": fixed + times * each,
  }


def search(
    config: Any,
    devices: int,
    compiled: Callable[[Any, str], dict[str, Any]],
) -> dict[str, Any]:
  """What fits: `foretold` by policy, the `remat` chosen, the `confirmed` report.

  `corrected` is what that report and the policy's first one foretell together.
  The policy is the one with the larger batch; of equal ones none. `compiled`
  gives preflight's report on a config; it is told what it compiles. What fits no
  more than once is confirmed by its own first report.

  Raises:
    UserError: the config does not fit the devices.
    Stop: not even the smallest batch fits.
  """
  batch = smallest(config, devices)
  reports = {
      policy: compiled(
          with_batch(config, batch, policy),
          f"{policy}, {batch.images}+{batch.pairs}",
      )
      for policy in POLICIES
  }
  rows = {policy: foretold(report, batch) for policy, report in reports.items()}
  flops = reports["none"]["flops_per_step"]
  for policy, row in rows.items():
    own = reports[policy]["flops_per_step"]
    row["flops"] = own / flops if own and flops else None
  policy = max(POLICIES, key=lambda name: rows[name]["times"])
  times = rows[policy]["times"]
  if not times:
    raise errors.Stop(
        1,
        f"Does not fit: {batch.images} images and {batch.pairs} pairs, which the"
        " devices divide, take"
        f" {reports['block']['gib_per_device']:.2f} GiB of"
        f" {reports['block']['gib_limit']:.2f} with remat=block.",
    )
  first = report = reports[policy]
  corrected = rows[policy]
  if times > 1:  # else the report is on that batch already
    many = BatchSize(times * batch.images, times * batch.pairs)
    report = compiled(
        with_batch(config, many, policy),
        f"{policy}, {many.images}+{many.pairs}",
    )
    corrected = foretold(first, batch, (times, report))
  return {
      "foretold": rows,
      "remat": policy,
      "confirmed": report,
      "corrected": corrected,
  }
