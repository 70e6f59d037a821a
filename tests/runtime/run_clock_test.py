"""The clock of a run."""

import time

from mcjepa_jax.runtime import run_clock


def test_the_spans_of_a_clock_and_other_add_up_to_the_total(monkeypatch):
  now = iter([0.0, 1.0, 2.0, 5.0, 6.0, 10.0])
  monkeypatch.setattr(run_clock.time, "perf_counter", lambda: next(now))
  clock = run_clock.Clock()
  with clock.span("step"):  # from 1 on
    with clock.span("input"):  # from 2 to 5: it does not count for step
      pass
  seconds = clock.seconds()
  assert seconds == {
      "other": 1.0 + 4.0, "step": 1.0 + 1.0, "input": 3.0, "total": 10.0
  }  # fmt: skip


def test_a_clock_counts_an_earlier_session_too(monkeypatch):
  now = iter([0.0, 1.0, 4.0, 5.0])
  monkeypatch.setattr(run_clock.time, "perf_counter", lambda: next(now))
  clock = run_clock.Clock()
  clock.add({"step": 20.0, "other": 2.0, "total": 22.0})
  with clock.span("step"):
    pass
  assert clock.seconds() == {"other": 4.0, "step": 23.0, "total": 27.0}


def test_what_is_lost_leaves_the_steps_and_the_total_stays(monkeypatch):
  now = iter([0.0, 1.0, 4.0, 4.0, 5.0, 9.0, 9.0, 9.0])
  monkeypatch.setattr(run_clock.time, "perf_counter", lambda: next(now))
  clock = run_clock.Clock()
  with clock.span("step"):  # from 1 to 4
    pass
  saved = clock.seconds()
  with clock.span("step"):  # from 5 to 9
    pass
  clock.lose(saved)
  assert clock.seconds() == {
      "other": 2.0, "step": 3.0, "input": 0.0, "lost": 4.0, "total": 9.0
  }  # fmt: skip


def test_a_process_begins_when_the_script_that_became_it_says(monkeypatch):
  monkeypatch.delenv("MCJEPA_STARTED", raising=False)
  age = time.perf_counter() - run_clock.process_start()
  monkeypatch.setenv("MCJEPA_STARTED", str(time.time()))
  assert time.perf_counter() - run_clock.process_start() < 0.5 < age
  monkeypatch.setenv("MCJEPA_STARTED", "0")  # long before this process
  assert time.perf_counter() - run_clock.process_start() >= age
