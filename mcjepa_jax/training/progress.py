"""The bar of a run and its logs."""

from typing import Any

import jax
import tqdm

from mcjepa_jax.distributed import hosts
from mcjepa_jax.runtime import log_files
from mcjepa_jax.step import task_schedule
from mcjepa_jax.storage import local_files
from mcjepa_jax.training import context

_RATED_STEPS = 20  # after which the input's rate is told


class Progress:
  """The bar and the logs; numbers are those of the step before."""

  def __init__(self, run: context.RunContext, start: int):
    config = run.config
    self._run = run
    self._bar = tqdm.tqdm(
        total=config.num_steps, initial=start, unit="step", smoothing=0.1
    )
    self._examples: int | None = None  # of the step before
    self.log = log_files.Journal(
        run.workdir,
        step=start,
        records=config.log_records,
        board=hosts.first(),
    )
    self._quarantine = log_files.Quarantine(
        run.workdir, step=start, limit=config.bad_records
    )
    self._steps = 0
    self._reports = {"content": 0, "motion": 0}  # steps that trained each
    self._before: dict[str, float] = {}  # seconds of steps before the first

  def report(self, number: int, values: dict[str, float]) -> None:
    """Shows what a step logged."""
    config = self._run.config
    self._bar.update()
    losses, examples = [f"loss {values['loss']:.3f}"], 0
    for task in task_schedule.tasks_of_mode(config.mode):
      if f"loss/{task}" in values:
        self._reports[task] += 1
        self._before.setdefault(task, self._run.clock.seconds()["step"])
        losses.append(f"{task} {values[f'loss/{task}']:.3f}")
        examples += config[task].batch_size
    # Where tasks alternate, of two steps.
    before = examples if self._examples is None else self._examples
    self._examples = examples
    rate = (self._bar.format_dict["rate"] or 0.0) * (before + examples) / 2
    self._bar.set_postfix_str(f"{', '.join(losses)}, {rate:.0f} examples/s")
    if number % config.log_every == 0 or number + 1 == config.num_steps:
      seconds = {
          f"seconds/{name}": value
          for name, value in self._run.clock.seconds().items()
      }
      rate = {"examples_per_second": rate}
      replaced = self._quarantine.counts()
      feeds = {
          f"{kind}/{unit}": value
          for unit, rates in self._feeds().items()
          for kind, value in zip(("feed", "step"), rates, strict=True)
      }
      self.log.scalars(
          number,
          values
          | rate
          | seconds
          | replaced
          | feeds
          | self._run.monitor.counts(),
      )
    self._steps += 1
    if self._steps == _RATED_STEPS:
      self._note_feeds()

  def _feeds(self) -> dict[str, tuple[float, float]]:
    """By unit: what this host's workers make a second, what its steps take."""
    spent, feeds = self._run.clock.seconds().get("step", 0.0), {}
    for task, stream in self._run.streams.items():
      rows = self._run.config[task].batch_size / jax.process_count()
      unit = {"content": "images", "motion": "pairs"}[task]
      if self._reports[task] > 1:
        seconds = max(spent - self._before[task], 1e-9)
        taken = (self._reports[task] - 1) / seconds
        feeds[unit] = (rows * stream.rate(), rows * taken)
    return feeds

  def _note_feeds(self) -> None:
    feeds = self._feeds()
    made, taken = (
        ", ".join(f"{rates[i]:.0f} {unit}/s" for unit, rates in feeds.items())
        for i in range(2)
    )
    limits = any(made < taken for made, taken in feeds.values())
    self.note(
        f"This host feeds {made}; the steps take {taken}: the input is"
        f"{'' if limits else ' not'} the limit."
    )

  def quarantine(self, number: int, batch: context.Batch) -> None:
    """Shows the records of a batch that were replaced."""
    for task, faults in batch.faults.items():
      for record, fault in self._quarantine.add(
          number, task, len(batch.records[task]), faults
      ):
        self.note(f"Replaced {record}: {fault}")

  def alarm(self, number: int, name: str, text: str, **more: Any) -> None:
    """Shows what was noticed at a step, and keeps it in alarms.jsonl."""
    self.note(f"Step {number}: {text}")
    line = {"step": number, "alarm": name, "text": text} | more
    local_files.append(self._run.workdir / "alarms.jsonl", line)

  def note(self, text: str) -> None:
    """Prints a line above the bar."""
    self._bar.write(text)

  def close(self) -> None:
    """Ends the bar and the logs."""
    self._bar.close()
    self._quarantine.close()
    self.log.close()
