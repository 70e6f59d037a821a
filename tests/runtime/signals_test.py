"""SIGTERM and the hang timer."""

import os
import signal
import subprocess
import sys

import jax

from mcjepa_jax.runtime import signals
from tests.helpers.repository import ROOT


def test_where_each_may_end_alone_sigterm_is_heard_in_spite_of_jax(monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  heard = []
  before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
  try:
    with signals.on_sigterm(lambda *_: heard.append("together")):
      os.kill(os.getpid(), signal.SIGTERM)
      with signals.on_sigterm(lambda *_: heard.append("alone"), alone=True):
        os.kill(os.getpid(), signal.SIGTERM)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert heard == ["alone"]


def test_after_it_sigterm_ends_the_process_where_jax_had_heard_it(monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  set_to = []
  # As where the handler before is not of Python.
  monkeypatch.setattr(signal, "signal", lambda _, to: set_to.append(to))
  with signals.on_sigterm(print, alone=True):
    pass
  assert set_to == [print, signal.SIG_DFL]


def test_a_late_step_prints_the_stacks():
  script = (
      "import time\nfrom mcjepa_jax.runtime import signals\n"
      "def hang():\n  time.sleep(1.5)\n"
      "timer = signals.HangTimer(0.5)\ntimer.step()\nhang()\ntimer.close()\n"
      "timer = signals.HangTimer(0)\ntimer.step()\ntime.sleep(0.1)\n"
  )
  run = subprocess.run(
      [sys.executable, "-c", script],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=True,
  )
  assert "in hang" in run.stderr and "Timeout" in run.stderr
