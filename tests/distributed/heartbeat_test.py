"""Hosts that end, vanish, fall silent or have another time are told by name."""

import socket
import threading
import time

import pytest

from mcjepa_jax import errors
from mcjepa_jax.distributed import heartbeat


class _Run:
  """The lines of some hosts, all in this process."""

  def __init__(self, count, **options):
    pairs = [socket.socketpair() for _ in range(count - 1)]
    self.near = {i + 1: pair[0] for i, pair in enumerate(pairs)}
    self.far = {i + 1: pair[1] for i, pair in enumerate(pairs)}
    self.left = {}  # exit codes of those that a line ended
    names = [f"host-{i}" for i in range(count)]
    self.lines = [
        heartbeat.Heartbeat(
            i,
            names,
            {0: self.far[i]} if i else self.near,
            leave=lambda code, i=i: self.left.setdefault(i, code),
            **dict(silence=6.0, grace=0.2) | options,
        )
        for i in range(count)
    ]

  def end(self, codes, reason=""):
    """What the hosts that end by themselves end with, at the same time."""
    results = {}

    def one(i, code):
      self.lines[i].reason = reason
      results[i] = self.lines[i].end(code)

    threads = [threading.Thread(target=one, args=x) for x in codes.items()]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(10)
    return results

  def wait(self, count):
    """The exit codes of as many hosts as a line has to end."""
    deadline = time.monotonic() + 10
    while len(self.left) < count and time.monotonic() < deadline:
      time.sleep(0.01)
    return self.left


def test_hosts_that_all_finish_end_with_0(capsys):
  run = _Run(3)
  assert run.end({0: 0, 1: 0, 2: 0}) == {0: 0, 1: 0, 2: 0}
  assert not run.left and not capsys.readouterr().err


def test_one_that_finishes_early_waits_for_the_others():
  run = _Run(2, silence=1.0)
  early = threading.Thread(target=run.end, args=({1: 0},))
  early.start()
  time.sleep(1.5)  # longer than a host may be silent
  assert early.is_alive() and not run.left
  assert run.end({0: 0}) == {0: 0}
  early.join(10)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_host_whose_connection_closes_is_lost_and_named(
    capfd, monkeypatch, lost
):
  run = _Run(3)
  # What is killed says no more of others, and the kernel closes what it had.
  monkeypatch.setattr(run.lines[lost], "_send", lambda *_, **__: None)
  for ends in [run.near.values()] if not lost else [[run.far[lost]]]:
    for connection in ends:
      connection.shutdown(socket.SHUT_RDWR)
  began = time.monotonic()
  others = {0, 1, 2} - {lost}
  while not others <= run.wait(2).keys():
    assert time.monotonic() < began + 10
  assert {run.left[i] for i in others} == {errors.EXIT_LOST}
  text = f"process {lost} (host-{lost}) is lost: its connection was closed;"
  assert capfd.readouterr().err.count(text) >= 2


def test_a_silent_host_is_lost(capfd, monkeypatch):
  run = _Run(2, silence=1.0)
  monkeypatch.setattr(run.lines[1], "_send", lambda *_, **__: None)
  assert run.wait(2)[0] == errors.EXIT_LOST
  assert "host-1) is lost: nothing came from it for" in capfd.readouterr().err


@pytest.mark.parametrize("which", [0, 1])
def test_one_hosts_fault_ends_the_others_with_its_code_and_reason(capfd, which):
  run = _Run(3)
  assert run.end({which: 2}, "a.png is bad") == {which: 2}
  others = {0, 1, 2} - {which}
  assert run.wait(2) == dict.fromkeys(others, 2)
  text = (
      f"error: process {which} (host-{which}) ended with exit code 2: a.png is"
      " bad\n"
  )
  assert capfd.readouterr().err.count(text) == 2


def test_hosts_that_all_fail_tell_their_own_fault_alone(capfd):
  run = _Run(3, grace=5.0)
  codes = {0: 2, 1: 2, 2: 2}
  assert run.end(codes) == codes
  assert not run.left and not capfd.readouterr().err


def test_one_that_has_finished_ends_with_what_another_failed_with(capsys):
  run = _Run(2)
  assert run.end({0: 0, 1: 76}, "collapse") == {0: 76, 1: 76}
  assert "host-1) ended with exit code 76: collapse" in capsys.readouterr().err


def test_hosts_that_stop_are_given_time_to_save(capfd):
  run = _Run(2)
  early = threading.Thread(target=run.end, args=({1: 75},))
  early.start()
  time.sleep(0.6)  # longer than the grace
  assert not run.left
  assert run.end({0: 75}) == {0: 75}
  early.join(10)
  assert not capfd.readouterr().err


def test_an_error_that_comes_of_another_hosts_end_tells_that(monkeypatch):
  run = _Run(2, grace=5.0)
  monkeypatch.setattr(heartbeat, "_heartbeat", run.lines[0])
  failing = threading.Thread(target=run.end, args=({1: 2}, "disk full"))
  failing.start()
  with pytest.raises(errors.Stop, match="host-1.*disk full") as caught:
    with heartbeat.report_failures():
      raise ValueError("Gloo AllGather failed")
  assert caught.value.code == 2
  assert run.end({0: caught.value.code}) == {0: 2}
  failing.join(10)
  assert not run.left


def test_an_error_of_ones_own_is_kept_for_the_others(monkeypatch, capsys):
  run = _Run(2)
  monkeypatch.setattr(heartbeat, "_heartbeat", run.lines[0])
  monkeypatch.setattr(heartbeat, "_CAUSE", 0.1)
  with pytest.raises(errors.UserError), heartbeat.report_failures():
    raise errors.UserError("one", "two")
  assert run.lines[0].reason == "one; two"
  with pytest.raises(errors.Stop, match="KeyError: 'x'") as caught:
    with heartbeat.report_failures():
      raise KeyError("x")
  assert caught.value.code == 1
  assert "Traceback" in capsys.readouterr().err
  run.end({0: 0, 1: 0})


def test_another_time_is_told_once_with_both_hosts(capsys, monkeypatch):
  monkeypatch.setattr(heartbeat, "CLOCK_SECONDS", -1.0)  # all clocks differ
  run = _Run(2, silence=1.2)
  time.sleep(0.5)
  run.end({0: 0, 1: 0})
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("warning: clock: process 1 (host-1) is 0 s ")
  assert " process 0 (host-0): " in line


def test_alone_nothing_is_told():
  assert heartbeat.end(3) == 3
  assert heartbeat.name(2) == "process 2"
  with pytest.raises(KeyError), heartbeat.report_failures():
    raise KeyError("x")
