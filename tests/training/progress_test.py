"""The bar of a run."""

import time
import types

import pytest

from mcjepa_jax.runtime import run_clock
from mcjepa_jax.training import alarms, context, progress
from tests.helpers import tiny, workdirs


@pytest.mark.parametrize(("made", "words"), [(0.5, "is"), (200.0, "is not")])
def test_a_line_says_whether_the_input_is_the_limit(
    tmp_path, capsys, made, words
):
  stream = types.SimpleNamespace(rate=lambda: made)
  config = tiny.config(mode="motion")
  run = object.__new__(context.RunContext)  # no model, no checkpoints
  vars(run).update(
      config=config,
      workdir=tmp_path,
      monitor=alarms.AlarmMonitor(config),
      clock=run_clock.Clock(),
      streams={"motion": stream},
  )
  shown = progress.Progress(run, 0)
  for number in range(20):
    with run.clock.span("step"):
      time.sleep(0.02)
      shown.report(number, dict.fromkeys(("loss", "loss/motion"), 1.0))
  shown.close()
  (line,) = [x for x in capsys.readouterr().out.splitlines() if "feeds" in x]
  assert f"feeds {4 * made:.0f} pairs/s; the steps take" in line
  assert f"the input {words} the limit" in line
  last = workdirs.lines(tmp_path / "metrics.jsonl")[-1]
  assert last["feed/pairs"] == 4 * made and last["step/pairs"] < 200
