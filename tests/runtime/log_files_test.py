"""Tests of the logs of a run."""

import pytest

from mcjepa_jax import errors
from mcjepa_jax.runtime import log_files
from tests.helpers import workdirs


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
