"""What a run notices of itself: rules over running windows of what it logs."""

import collections
from collections.abc import Mapping
import dataclasses
import math
import statistics
from typing import Any

from mcjepa_jax.step import task_schedule

# What is counted where it happens, and no rule judges.
EVENTS = ("not_finite", "rollback", "recompilation", "checkpoint")
ACTIONS = ("log", "stop", "rollback")


@dataclasses.dataclass(frozen=True)
class Rule:
  """Fires where the median of the last `window` values lies outside a range.

  `metric` is a logged name, or ends in `_` and means all that begin so. From
  step `start` on it is judged; what is not finite lies outside.
  """

  name: str
  metric: str
  start: int
  window: int
  least: float = -math.inf
  most: float = math.inf
  every: int = 1  # steps between two values

  @property
  def lasts(self) -> int:
    """How many steps a full window spans."""
    return self.window * self.every

  def watches(self, metric: str) -> bool:
    """Whether this is a quantity of the rule's."""
    if self.metric.endswith("_"):
      return metric.startswith(self.metric)
    return metric == self.metric


@dataclasses.dataclass(frozen=True)
class Alarm:
  """A rule that began to fire."""

  rule: Rule
  metric: str
  value: float

  def __str__(self) -> str:
    rule = self.rule
    expected = []
    if rule.least > -math.inf:
      expected.append(f"at least {rule.least:g}")
    if rule.most < math.inf:
      expected.append(f"at most {rule.most:g}")
    return (
        f"{rule.name}: {self.metric} has a median of {self.value:.4g} over"
        f" {rule.window}, expected {' and '.join(expected)}"
    )


def rules(config: Any) -> list[Rule]:
  """The rules of `config.alarms`, for the tasks that the mode trains."""
  alarms = config.alarms
  reads = set(task_schedule.tasks_of_mode(config.mode))
  starts = {"content": 0, "motion": 0}
  if len(reads) > 1:
    # Of both tasks: from the later one's start on.
    starts["motion"] = starts["both"] = config.motion.start_step
    reads.add("both")

  def rule(name, metric, task, *, delay=0, window=alarms.window, **bounds):
    start = starts.get(task, 0) + delay + alarms.warm_up
    return task, Rule(name, metric, start, window, **bounds)

  def diagnosed(name, metric, task, **bounds):
    return rule(
        name,
        f"diagnosis/{metric}",
        task,
        window=alarms.diagnoses,
        every=alarms.diagnose_every,
        **bounds,
    )

  least_occluded, most_occluded = alarms.occluded
  least_norm, most_norm = alarms.gradient_norm
  found = (
      rule(
          "embedding_std",
          "feature_std/embedding",
          "content",
          least=alarms.least_embedding_std,
      ),
      diagnosed("rank_me", "rank_me", "content", least=alarms.least_rank_me),
      diagnosed(
          "correlation", "correlation", "content", most=alarms.most_correlation
      ),
      rule(
          "feature_std",
          "feature_std/stride_",
          "motion",
          least=alarms.least_feature_std,
      ),
      rule(
          "zero_flow", "flow/mean_magnitude", "motion", least=alarms.least_flow
      ),
      rule("constant_flow", "flow/std", "motion", least=alarms.least_flow_std),
      rule(
          "occluded",
          "flow/occluded",
          "motion",
          delay=config.motion.occlusion_start,
          least=least_occluded,
          most=most_occluded,
      ),
      rule(
          "photometric",
          "flow/zero_ratio",
          "motion",
          most=alarms.most_zero_ratio,
      ),
      *(
          diagnosed(
              "gradient_norm",
              f"gradient_norm_{task}",
              task,
              least=least_norm,
              most=most_norm,
          )
          for task in ("content", "motion")
      ),
      diagnosed(
          "gradient_share",
          "gradient_share",
          "both",
          least=alarms.least_gradient_share,
      ),
      diagnosed(
          "gradient_cosine",
          "gradient_cosine",
          "both",
          least=alarms.least_gradient_cosine,
      ),
  )
  return [one for task, one in found if task in reads]


class AlarmMonitor:
  """Judges what each step logs, and counts what was noticed."""

  def __init__(self, config: Any):
    self._config = config.alarms
    self._rules = rules(config)
    self._windows: dict[str, collections.deque[float]] = {}
    self._outside: set[str] = set()
    self._counts = dict.fromkeys(
        (*EVENTS, *(rule.name for rule in self._rules)), 0
    )
    self.skipped_in_a_row = 0  # updates skipped since the last that was not

  def judge(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
    """The alarms that begin to fire with what a step logged."""
    fired = []
    for rule in self._rules:
      if step < rule.start:
        continue
      for metric in filter(rule.watches, values):
        key = f"{rule.name} {metric}"
        window = self._windows.setdefault(
            key, collections.deque(maxlen=rule.window)
        )
        value = values[metric]
        window.append(value if math.isfinite(value) else math.inf)
        median = statistics.median_low(window)
        if len(window) < rule.window:
          continue
        if math.isfinite(median) and rule.least <= median <= rule.most:
          self._outside.discard(key)
        elif key not in self._outside:
          self._outside.add(key)
          self.count(rule.name)
          fired.append(Alarm(rule, metric, median))
    return fired

  def skip(self) -> int:
    """How many updates were skipped, with the one that this counts."""
    self.skipped_in_a_row += 1
    return self.count("not_finite")

  def count(self, name: str) -> int:
    """How often this was noticed, with the time that this counts."""
    self._counts[name] += 1
    return self._counts[name]

  def counts(self) -> dict[str, float]:
    """How often each was noticed, as `alarm/NAME`."""
    return {f"alarm/{name}": float(n) for name, n in self._counts.items()}

  def forget(self) -> None:
    """Empties the windows: what they hold was rolled back."""
    self.skipped_in_a_row = 0
    self._windows.clear()
    self._outside.clear()

  def state(self) -> dict[str, Any]:
    """All of it as JSON, for a run that resumes."""
    return {
        "row": self.skipped_in_a_row,  # as earlier checkpoints have it
        "counts": dict(self._counts),
        "outside": sorted(self._outside),
        "windows": {key: list(w) for key, w in self._windows.items()},
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from a state; rules that are new since then start empty."""
    self.skipped_in_a_row = state["row"]
    self._counts |= {
        k: n for k, n in state["counts"].items() if k in self._counts
    }
    self._outside = set(state["outside"])
    for rule in self._rules:
      for key, values in state["windows"].items():
        if key.startswith(f"{rule.name} "):
          self._windows[key] = collections.deque(values, maxlen=rule.window)
