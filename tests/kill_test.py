"""The benchmark that kills runs: what it calls exact, torn and a write."""

import json
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from benchmarks import kill
from mcjepa_jax import errors
from tests.helpers import saved_states, workdirs


def _kill(complete):
  return kill.Kill(1, 3.0, "write", complete, aimed=False)


@pytest.mark.parametrize(
    "complete, event, exact, torn",
    [
        ([4, 8], {"restored": 8, "digest": "b"}, True, False),
        ([4, 8], {"restored": 8, "digest": "a"}, False, False),
        ([4, 8], {"restored": 4, "digest": "a"}, False, False),
        ([4], {"restored": 8, "digest": "b"}, False, True),
        ([4], {"restored": None}, False, False),
        ([], {"restored": None}, True, False),
        ([], {"restored": 4, "digest": "a"}, False, True),
    ],
)
def test_the_newest_complete_step_as_it_was_is_exact(
    complete, event, exact, torn
):
  one = _kill(complete)
  assert not one.exact  # until a start has restored something
  one.settle(event, {4: "a", 8: "b"})
  assert (one.exact, one.torn) == (exact, torn)
  assert one.row()["exact"] == ("yes" if exact else "NO")


def test_a_digest_is_of_every_bit_and_the_same_from_the_disk(tmp_path):
  state = saved_states.make_state()
  plain = kill.digest(state, saved_states.STREAMS)
  saved_states.save(tmp_path, (3,), state=state)
  assert kill.digest(*workdirs.saved(tmp_path, 3)) == plain
  kernel = state.params["encoder"]["kernel"]
  params = dict(state.params)
  params["encoder"] = params["encoder"] | {
      "kernel": kernel.at[0, 0].set(jnp.nextafter(kernel[0, 0], jnp.inf))
  }
  others = (
      (state.replace(params=params), saved_states.STREAMS),
      (state.replace(step=state.step - 1), saved_states.STREAMS),
      (state, {"motion": {"next_batch": 8}}),
  )
  assert len({plain, *(kill.digest(*other) for other in others)}) == 4


def test_what_a_run_comes_to_leaves_out_its_times(tmp_path):
  saved_states.save(tmp_path, (3,))
  line = {"step": 2, "loss": 1.5, "seconds/step": 3.0, "feed/images": 9.0}
  (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  losses, records, last = kill.outcome(tmp_path)
  assert losses == [{"step": 2, "loss": 1.5}] and records == []
  assert last == kill.digest(*workdirs.saved(tmp_path, 3))


# A run that tells its phase, opens a checkpoint and stands still.
_STANDS = """
import pathlib, sys, time
told, folder, made = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]
pathlib.Path(told, "phase").write_text("evaluation".ljust(16))
for name in made:
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.touch()
pathlib.Path(told, "ready").touch()
time.sleep(60)
"""
_PART = "8.orbax-checkpoint-tmp"


@pytest.mark.parametrize(
    "made, phase",
    [
        ((), "evaluation"),
        ((f"{_PART}/state.orbax-checkpoint-tmp/d",), "write"),
        ((f"{_PART}/state.orbax-checkpoint-tmp/_METADATA",), "commit"),
        ((f"{_PART}/state/_METADATA",), "commit"),
        (("4/state/_METADATA",), "evaluation"),
    ],
)
def test_a_kill_falls_where_the_run_was(tmp_path, monkeypatch, made, phase):
  workdir, told = tmp_path / "run", tmp_path / "run.told"
  # What an earlier life left is not this one's.
  (workdir / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
  time.sleep(0.05)
  popen = subprocess.Popen

  def stands(command, **options):
    del command
    script = [sys.executable, "-c", _STANDS, told, workdir / "checkpoints"]
    return popen([*script, *made], **options)

  monkeypatch.setattr(subprocess, "Popen", stands)
  life = kill.Life(workdir)
  while not (told / "ready").exists():
    assert not life.ends(0.02)
  assert life.commits() is False if phase == "commit" else not life.ends(0)
  assert life.kill() == phase
  assert kill.complete(workdir) == ([4] if "4/" in "".join(made) else [])


@pytest.mark.proof
@pytest.mark.slow
def test_a_run_killed_in_commits_ends_as_if_it_were_not(
    tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(kill, "_AIMED", 2)
  monkeypatch.setenv("XLA_FLAGS", "")
  path = tmp_path / "kill.json"
  kill.main(["--kills=4", "--seed=3", f"--json={path}", f"--dir={tmp_path}"])
  found = json.loads(path.read_text())
  assert capsys.readouterr().out.splitlines()[-1] == "exact 4/4", found
  assert found["meta"]["phases"]["commit"] >= 2
  assert found["meta"]["torn"] == 0 and len(found["rows"]) == 4
  assert found["meta"]["seconds_to_write"] > 0


class _Life:
  """A life that is killed, or ends, as a list says; then the run is done."""

  def __init__(self, script):
    self._ends, self._event = script.pop(0)
    self.log = "log"

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    pass

  def ends(self, seconds):
    return self._ends

  def kill(self):
    return "step"

  def events(self, kind):
    return [{"restored": self._event}] if self._event != "none" else []


def test_a_run_that_does_not_go_on_makes_its_kills_inexact(
    tmp_path, monkeypatch
):
  class Broken(_Life):

    def ends(self, seconds):
      if self._ends is None:
        raise errors.UserError("a run that was not killed ended with 1")
      return self._ends

  script = [(False, None), (False, None), (None, None)]
  monkeypatch.setattr(kill, "Life", lambda workdir, own_cache: Broken(script))
  monkeypatch.setattr(kill, "undisturbed", lambda *_, **__: ({}, 60.0))
  monkeypatch.setattr(kill, "outcome", lambda workdir: "as it should be")
  monkeypatch.setattr(kill, "seconds_to_write", lambda workdir: 1.0)
  monkeypatch.setattr(
      kill, "complete", lambda path: [4] if path.name == "again" else []
  )
  monkeypatch.setattr(kill.shutil, "rmtree", lambda path, **_: None)
  kills, _ = kill.kills_of(tmp_path, 2, seed=1)
  assert [one.exact for one in kills] == [False, False]


def test_a_kill_when_all_was_done_is_drawn_again(tmp_path, monkeypatch):
  # Killed as it exits; the next life finds a finished run and tells nothing.
  script = [(False, None), (False, "none"), (True, "none")]
  cold = []

  def life(workdir, own_cache):
    cold.append(own_cache)
    return _Life(script)

  monkeypatch.setattr(kill, "Life", life)
  made = []
  draws = iter([(1.0, False)] * 3)
  kills = [*kill.killed_run(tmp_path, 1, draws, made, {})]
  assert kills == [] and made == []
  # A fresh start, killed, and a fresh start that ends: settled.
  script += [(False, None), (True, None)]
  draws = iter([(1.0, False)] * 2)
  (one,) = kill.killed_run(tmp_path, 3, draws, made, {})
  assert one.exact and made == [one]
  assert cold == [False] * 3 + [True] * 2  # a third run compiles for itself


def _made_up(monkeypatch, phases, *, ends_alike):
  """Has the benchmark judge kills of these phases, each exact by itself."""

  def killed_run(workdir, run, draws, made, digests):
    workdir.mkdir()
    for at, aimed in draws:
      if run % 2 or len(made) == len(phases):  # it ends before
        return
      one = kill.Kill(run, at, phases[len(made)], [4], aimed)
      one.settle({"restored": 4, "digest": digests[4]}, digests)
      made.append(one)
      yield one

  def outcome(workdir):
    return workdir.name if "killed" in workdir.name and not ends_alike else ""

  monkeypatch.setattr(kill, "undisturbed", lambda _, **k: ({4: "a"}, 10.0))
  monkeypatch.setattr(kill, "seconds_to_write", lambda _: 1.5)
  monkeypatch.setattr(kill, "complete", lambda _: [4])
  monkeypatch.setattr(kill, "outcome", outcome)
  monkeypatch.setattr(kill, "killed_run", killed_run)


@pytest.mark.parametrize(
    "phases, ends_alike, exact, code",
    [
        (["step", "write", "step", "step"], True, 4, 0),
        (["step", "write", "step", "step"], False, 0, 1),
        (["step"] * 4, True, 4, 1),  # too few in a write
    ],
)
def test_the_last_line_and_the_code_say_whether_all_were_exact(
    monkeypatch, capsys, tmp_path, phases, ends_alike, exact, code
):
  _made_up(monkeypatch, phases, ends_alike=ends_alike)
  arguments = ["--kills=4", "--seed=1", f"--json={tmp_path / 'kill.json'}"]
  assert kill.main(arguments) == code
  assert capsys.readouterr().out.splitlines()[-1] == f"exact {exact}/4"
  meta = json.loads((tmp_path / "kill.json").read_text())["meta"]
  assert meta["exact"] == exact and meta["kills"] == 4


def test_wrong_numbers_are_told(capsys):
  assert kill.main(["--kills=many"]) == 2
  assert "--kills: expected a number from 1" in capsys.readouterr().err
