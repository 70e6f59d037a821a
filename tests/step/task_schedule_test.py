"""Which tasks the steps of a mode train."""

import pytest

from mcjepa_jax.step import task_schedule


@pytest.mark.parametrize("mode", task_schedule.MODES)
def test_batches_before_counts_what_the_kinds_of_steps_read(mode):
  start_step = 3
  counts = {"content": 0, "motion": 0}
  for number in range(12):
    assert task_schedule.batches_before(mode, number, start_step) == counts
    kind = task_schedule.kind_at(mode, number, start_step)
    for task in task_schedule.tasks(kind):
      counts[task] += 1
      assert task in task_schedule.tasks_of_mode(mode)


@pytest.mark.parametrize(
    ("mode", "start_step", "first"),
    [
        ("combined", 3, [3]),
        ("alternate", 3, [4]),
        ("combined", 0, []),
        ("alternate", 0, []),
        ("content", 3, []),
        ("motion", 3, []),
        ("frozen_encoder", 3, []),
    ],
)
def test_flow_begins_with_the_first_step_of_another_kind(
    mode, start_step, first
):
  found = [
      n
      for n in range(9)
      if task_schedule.is_first_with_flow(mode, n, start_step)
  ]
  assert found == first
