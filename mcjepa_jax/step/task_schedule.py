"""The tasks that each step trains, and the parameters that it moves."""

from mcjepa_jax.models import mcjepa

# What runs in a step, and which groups of parameters it moves.
Kind = tuple[tuple[str, ...], tuple[str, ...]]

KINDS: dict[str, Kind] = {
    "content": (("content",), ("encoder", "expander")),
    "motion": (("motion",), ("encoder", "estimator")),
    "estimator": (("motion",), ("estimator",)),
    "both": (("content", "motion"), mcjepa.GROUPS),
}
MODES = ("combined", "alternate", "frozen_encoder", "content", "motion")


def kind_at(mode: str, step: int, start_step: int) -> str:
  """The kind of a step: a key of `content`, `motion`, `estimator`, `both`."""
  if mode == "content":
    return "content"
  if mode == "motion":
    return "motion"
  if mode == "frozen_encoder":
    return "estimator"
  if step < start_step:
    return "content"
  if mode == "alternate":
    return "content" if (step - start_step) % 2 == 0 else "motion"
  return "both"


def is_first_with_flow(mode: str, step: int, start_step: int) -> bool:
  """Whether a step is the first of its kind, after `start_step` steps without flow."""
  if not 0 < start_step <= step <= start_step + 1:
    return False
  # Where tasks alternate it comes one step later.
  before, now = (kind_at(mode, n, start_step) for n in (step - 1, step))
  return before == "content" != now


def tasks(kind: str) -> tuple[str, ...]:
  """The tasks that a kind of step trains, and so the batches it reads."""
  return KINDS[kind][0]


def tasks_of_mode(mode: str) -> tuple[str, ...]:
  """The tasks that a run in this mode ever trains."""
  if mode in ("combined", "alternate"):
    return ("content", "motion")
  return tasks(kind_at(mode, 0, 0))


def updates(mode: str, num_steps: int, start_step: int) -> dict[str, int]:
  """How many of a run's steps move each group of parameters."""
  batches = batches_before(mode, num_steps, start_step)
  return {
      "encoder": 0 if mode == "frozen_encoder" else num_steps,
      "expander": batches["content"],
      "estimator": batches["motion"],
  }


def batches_before(mode: str, step: int, start_step: int) -> dict[str, int]:
  """How many batches of each task the steps before `step` have consumed."""
  if mode in ("content", "motion", "frozen_encoder"):
    task = "content" if mode == "content" else "motion"
    return {"content": 0, "motion": 0} | {task: step}
  joint = max(step - start_step, 0)
  if mode == "alternate":
    return {
        "content": min(step, start_step) + (joint + 1) // 2,
        "motion": joint // 2,
    }
  return {"content": step, "motion": joint}
