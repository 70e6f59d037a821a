"""The lives of a run's processes: what was after a save, and files of others."""

import json
import time

import pytest

from mcjepa_jax.runtime import process_lifetimes
from mcjepa_jax.storage import run_folder


def _opened(folder, monkeypatch, *, first=True):
  monkeypatch.setattr(process_lifetimes, "WRITE_SECONDS", 0.02)
  run = run_folder.Folder(folder, folder)
  return process_lifetimes.record_lifetime(
      run, time.perf_counter(), first=first
  )


def test_only_what_was_lived_after_the_save_is_lost():
  earlier = [(0.0, 100.0), (150.0, 170.0)]
  assert process_lifetimes.lost_seconds(earlier, 0.0) == 120
  assert process_lifetimes.lost_seconds(earlier, 90.0) == 30
  assert process_lifetimes.lost_seconds(earlier, 120.0) == 20
  assert process_lifetimes.lost_seconds(earlier, 160.0) == 10
  assert (
      process_lifetimes.lost_seconds(earlier, 200.0)
      == process_lifetimes.lost_seconds([], 0.0)
      == 0
  )


def test_each_process_is_seen_for_as_long_as_it_lived(tmp_path, monkeypatch):
  lived = []
  for count in range(2):
    before = time.time()
    with _opened(tmp_path, monkeypatch) as earlier:
      assert len(earlier) == count
      while len(process_lifetimes._read(tmp_path / "lives.json")) <= count:
        time.sleep(0.02)
      time.sleep(0.3)
    lived.append(time.time() - before)
    time.sleep(0.1)  # seen no more
  one, other = json.loads((tmp_path / "lives.json").read_text())
  for (began, seen), seconds in zip((one, other), lived, strict=True):
    assert 0 < seen - began < seconds + 0.05
  assert other[0] > one[1]


def test_of_many_hosts_the_first_one_s_counts(tmp_path, monkeypatch):
  with _opened(tmp_path, monkeypatch, first=False) as earlier:
    time.sleep(0.1)
  assert earlier == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[[1", "{}", "[1]", '[["a", 2]]', "[[NaN, 2]]", "[[1, 1e999]]"]
)
def test_what_is_no_such_file_counts_for_nothing(tmp_path, monkeypatch, text):
  (tmp_path / "lives.json").write_text(text)
  with _opened(tmp_path, monkeypatch) as earlier:
    assert earlier == []


def test_a_folder_that_takes_nothing_ends_no_run(tmp_path, monkeypatch):
  with _opened(tmp_path / "gone", monkeypatch) as earlier:
    time.sleep(0.1)
  assert earlier == []
