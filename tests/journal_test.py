"""Tests of the logs, the clock and the pictures of a run."""

import json
import time
import types

import numpy as np
from PIL import Image
import pytest
from tensorboardX.proto import event_pb2

from mcjepa_jax import errors
from mcjepa_jax.runtime import log_files, process_memory, run_clock
from mcjepa_jax.storage import local_files
from mcjepa_jax.training import alarms, build, context, pictures, progress
from tests import tiny, workdirs


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


def test_a_log_opened_at_a_step_drops_what_follows_and_a_torn_line(tmp_path):
  log = log_files.Journal(tmp_path, step=0, records=True)
  for step in range(4):
    log.scalars(step, {"loss": 1.0})
    log.records(step, {"motion": [f"a/{step}"]})
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "lo')
  log = log_files.Journal(tmp_path, step=2, records=True)
  log.scalars(2, {"loss": 0.5})
  log.close()
  assert workdirs.lines(tmp_path / "metrics.jsonl") == [
      {"step": 0, "loss": 1.0},
      {"step": 1, "loss": 1.0},
      {"step": 2, "loss": 0.5},
  ]
  records = workdirs.lines(tmp_path / "records.jsonl")
  assert [line["step"] for line in records] == [0, 1]


def test_a_quarantine_names_each_record_once_and_forgets_what_is_redone(
    tmp_path,
):
  kept = log_files.Quarantine(tmp_path, step=0, limit=0.01)
  assert kept.add(0, "motion", 8, [("a", "cut"), ("b", "gone")]) == [
      ("a", "cut"), ("b", "gone")
  ]  # fmt: skip
  assert kept.add(3, "motion", 8, [("a", "cut"), ("c", "cut")]) == [
      ("c", "cut")
  ]
  assert kept.counts() == {"quarantined/motion": 3}
  kept.close()
  kept = log_files.Quarantine(tmp_path, step=3, limit=0.01)
  assert kept.counts() == {"quarantined/motion": 2}
  assert kept.add(3, "motion", 8, [("c", "cut")]) == [("c", "cut")]
  kept.close()
  lines = workdirs.lines(tmp_path / "quarantine.jsonl")
  assert [line["record"] for line in lines] == ["a", "b", "c"]


def test_too_many_unreadable_records_end_the_run_with_their_list(tmp_path):
  kept = log_files.Quarantine(tmp_path, step=0, limit=0.002)
  kept.add(0, "content", 500, [("a", "cut"), ("b", "cut")])
  kept.add(1, "motion", 500, [("x", "cut"), ("y", "cut")])
  with pytest.raises(errors.UserError) as caught:
    kept.add(2, "content", 500, [("c", "gone")])
  assert caught.value.messages == (
      "bad_records: expected at most 0.20% of content's records to be"
      f" unreadable, got 3 of 1000; see {tmp_path / 'quarantine.jsonl'}",
      "a: cut", "b: cut", "c: gone",
  )  # fmt: skip


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


def test_tensorboard_has_the_numbers_and_the_pictures(tmp_path):
  log = log_files.Journal(tmp_path, step=0, records=False)
  log.scalars(7, {"loss/motion": 0.25})
  log.picture(7, "flow", np.full((8, 12, 3), 200, np.uint8))
  log.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  values = {}
  for data in _records(path.read_bytes()):
    event = event_pb2.Event.FromString(data)
    for value in event.summary.value:
      values[value.tag] = event.step, value
  step, scalar = values["loss/motion"]
  assert (step, scalar.simple_value) == (7, 0.25)
  assert (values["flow"][1].image.height, values["flow"][1].image.width) == (
      8,
      12,
  )
  assert Image.open(tmp_path / "pictures" / "flow.png").size == (12, 8)


def test_events_of_a_full_disk_are_told_where_they_are_written(tmp_path):
  log = log_files.Journal(tmp_path, step=0, records=False)
  log._board._file.close()
  log._board._file = open("/dev/full", "wb")
  with pytest.raises(errors.UserError, match="workdir: .*No space left on dev"):
    with local_files.refusal_told(tmp_path):
      for step in range(2_000):
        log.scalars(step, {f"loss/{i}": 1.0 for i in range(100)})


def test_a_run_that_goes_on_hides_later_events_and_keeps_the_file(tmp_path):
  for step in (0, 4):
    log = log_files.Journal(tmp_path, step=step, records=False)
    log.scalars(step + 3, {"loss": 1.0})
    log.close()
  first, second = sorted((tmp_path / "tensorboard").iterdir())
  events = [
      [event_pb2.Event.FromString(data) for data in _records(path.read_bytes())]
      for path in (first, second)
  ]
  assert [event.step for event in events[0]] == [0, 3]
  assert [event.step for event in events[1]] == [4, 4, 7]
  assert events[1][1].session_log.status == event_pb2.SessionLog.START


def _records(data):
  """The payloads of a TFRecord file: u64 length, u32, payload, u32."""
  while data:
    length = int.from_bytes(data[:8], "little")
    yield data[12 : 12 + length]
    data = data[16 + length :]


def test_a_json_file_is_replaced_whole(tmp_path):
  path = tmp_path / "results.json"
  local_files.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    local_files.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}


def test_curves_show_each_group_of_terms_that_was_logged():
  lines = [
      {"step": 0, "content/variance": 1.0, "motion/cycle/stride_4": 2.0},
      {"step": 5, "content/variance": 0.5},
  ]
  drawn = pictures.of_logs(lines)
  assert set(drawn) == {"curves_content", "curves_motion"}
  assert all(p.dtype == np.uint8 and p.ndim == 3 for p in drawn.values())


def test_pictures_of_a_state_show_flow_and_features():
  cfg = tiny.config()
  state, _, mesh = tiny.state_and_step(cfg, "both")
  batch = tiny.batch()
  arrays = {
      "motion": {"frames": batch["frames"]},
      "content": {"views": batch["views"]},
  }
  drawn = pictures.of_state(build.model(cfg), state.params, mesh, arrays)
  assert set(drawn) == {"flow", "features"}
  for picture in drawn.values():
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3
    assert picture.std() > 5


def test_a_process_begins_when_the_script_that_became_it_says(monkeypatch):
  monkeypatch.delenv("MCJEPA_STARTED", raising=False)
  age = time.perf_counter() - run_clock.process_start()
  monkeypatch.setenv("MCJEPA_STARTED", str(time.time()))
  assert time.perf_counter() - run_clock.process_start() < 0.5 < age
  monkeypatch.setenv("MCJEPA_STARTED", "0")  # long before this process
  assert time.perf_counter() - run_clock.process_start() >= age


def test_without_proc_the_peak_of_memory_is_this_process_s(monkeypatch):
  def none(*_, **__):
    raise FileNotFoundError

  whole = process_memory.peak_rss_gb()
  monkeypatch.setattr(log_files.pathlib.Path, "read_text", none)
  assert 0.5 * whole <= process_memory.peak_rss_gb() <= 1.1 * whole
