"""Damaged files are refused by their name, or read as what they claim to be."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import time
import warnings

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from benchmarks import fuzz, fuzz_formats
from mcjepa_jax.data.readers import (
    array_records,
    flow_files,
    image_files,
    video_files,
)
from mcjepa_jax.data.sets import record_sets
from mcjepa_jax.errors import UserError
from tests.helpers.repository import ROOT

_FORMATS = pytest.mark.parametrize("name", list(fuzz_formats.FORMATS))
# The same cases on every run, so that a change alone can make one fail.
_SETTINGS = hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=12,
    suppress_health_check=list(hypothesis.HealthCheck),
)
_WHOLE = {}


def _whole(name):
  if name not in _WHOLE:
    _WHOLE[name] = fuzz_formats.seeds(name)
  return _WHOLE[name]


def _read(name, files, tmp_path):
  kind = fuzz_formats.FORMATS[name]
  return fuzz.outcome(kind, files, tmp_path / "case")


def _reader(read):
  return fuzz_formats.Format(list, read, bytes_per_byte=1)


@_FORMATS
def test_whole_files_are_read(name, tmp_path):
  for files in _whole(name):
    assert _read(name, files, tmp_path)[:2] == ("accepted", "")


@_FORMATS
def test_a_damaged_file_is_read_well_formed_or_refused_by_name(name, tmp_path):
  @_SETTINGS
  @hypothesis.given(number=st.integers(len(_whole(name)), 10**6))
  def check(number):
    files = fuzz_formats.case(name, _whole(name), 0, number)
    result = _read(name, files, tmp_path)
    assert result.kind in ("accepted", "rejected"), result.detail

  check()


@_FORMATS
def test_any_bytes_may_stand_anywhere(name, tmp_path):
  edit = st.tuples(st.floats(0, 1), st.binary(max_size=9), st.integers(0, 9))

  @_SETTINGS
  @hypothesis.given(edits=st.lists(edit, min_size=1, max_size=4), of=st.data())
  def check(edits, of):
    files = of.draw(st.sampled_from(_whole(name)))
    file = of.draw(st.sampled_from(sorted(files)))
    data = files[file]
    for where, new, lost in edits:
      # Most of what a reader decides by stands at the beginning.
      at = int(where**3 * len(data))
      data = data[:at] + new + data[at + lost :]
    result = _read(name, files | {file: data}, tmp_path)
    assert result.kind in ("accepted", "rejected"), result.detail

  check()


@_FORMATS
def test_a_case_is_the_same_each_time_and_differs_from_others(name):
  whole = _whole(name)
  cases = [fuzz_formats.case(name, whole, 0, n) for n in range(50, 60)]
  assert cases == [fuzz_formats.case(name, whole, 0, n) for n in range(50, 60)]
  others = [fuzz_formats.case(name, whole, 1, n) for n in range(50, 60)]
  assert sum(x != y for x, y in zip(cases, others, strict=True)) > 5
  assert sum(case not in whole for case in cases) > 5


def _digest():
  """Returns a hash of some cases of every format."""
  cases = [
      fuzz_formats.case(name, _whole(name), 0, number)
      for name in fuzz_formats.FORMATS
      for number in range(10)
  ]
  return hashlib.sha256(repr(cases).encode()).hexdigest()


def test_a_case_is_the_same_in_another_process():
  result = subprocess.run(
      [
          sys.executable,
          "-c",
          "from tests import fuzz_test as t; print(t._digest())",
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.stdout.split()[-1:] == [_digest()], result.stderr


@pytest.mark.parametrize(
    "name", ["../u.npy", "/u.npy", "a/../u.npy", "u.npy/../u.npy"]
)
def test_a_member_of_an_archive_has_no_path(name, tmp_path):
  arrays = {name.removesuffix(".npy"): np.ones((2, 3), np.float32)}
  np.savez(tmp_path / "a.npz", v=np.ones((2, 3), np.float32), **arrays)
  with pytest.raises(UserError, match="a.npz: expected an array 'u'"):
    flow_files.read_flow(tmp_path / "a.npz")


def test_the_path_in_a_record_is_a_name_and_opens_nothing(tmp_path):
  files, *_ = _whole("records")
  shard = array_records.shard_name(0, 1)
  outside = tmp_path / "outside.png"
  image = fuzz_formats._encoded("PNG")
  outside.write_bytes(image)
  paths = [str(outside), "../outside.png"]
  records = [array_records.pack(0, path, image) for path in paths]
  data = fuzz_formats._records(records, array_records.WRITE_OPTIONS)
  files = fuzz_formats._sealed(files | {shard: data}, None)
  assert _read("records", files, tmp_path).kind == "accepted"


def test_a_shard_without_its_size_is_refused(tmp_path):
  files, *_ = _whole("records")
  manifest = json.loads(files[array_records.MANIFEST])
  del manifest["checksum"], manifest["shards"][0]["bytes"]
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  array_records.write_manifest(tmp_path, manifest)
  with pytest.raises(UserError, match="00000-of-00001.*expected None bytes"):
    record_sets.ConvertedImages(tmp_path)


@pytest.mark.parametrize("dtypes", [("<u4", "<f8"), ("<u8", "<u8")])
def test_a_nan_that_signals_is_unknown_flow_without_a_warning(dtypes, tmp_path):
  # All bits of the exponent, and of the fraction the lowest alone.
  codes = {"<u4": 0x7F800001, "<u8": 0x7FF0000000000001, "<f8": 1.0}
  u, v = (np.full((2, 3), codes[dtype], dtype) for dtype in dtypes)
  u, v = (x.view(x.dtype.str.replace("u", "f")) for x in (u, v))
  np.savez(tmp_path / "a.npz", u=u, v=v)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    flow, valid = flow_files.read_flow(tmp_path / "a.npz")
  assert not flow.any() and not valid.any()


@pytest.mark.parametrize("factor, fault", [(1.01, None), (0.99, "64x48")])
def test_a_video_has_no_larger_frames_than_its_bytes_hold(
    factor, fault, tmp_path, monkeypatch
):
  files, *_ = _whole("mkv")
  path = tmp_path / "a.mkv"
  path.write_bytes(files["a.mkv"])
  held = 64 * 48 / len(files["a.mkv"])
  monkeypatch.setattr(video_files, "_PIXELS_PER_BYTE", factor * held)
  expected = contextlib.nullcontext()
  if fault:
    expected = pytest.raises(UserError, match=f"a.mkv: .* came {fault}")
  with expected:
    assert len(video_files.VideoFrames(path, cache_dir=tmp_path / "cache")) == 5


def _scans(count):
  """A progressive JPEG whose last scan is there again, `count` times in all."""
  data = fuzz_formats._encoded("JPEG", progressive=True)
  at = data.rindex(b"\xff\xda")
  return data[:-2] + data[at:-2] * (count - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_with_scans_without_number_is_refused():
  whole = image_files.decode_image(_scans(10), "a")
  assert image_files.decode_image(_scans(32), "a").shape == whole.shape
  for count in (33, 10_000):
    with pytest.raises(UserError, match="^a: expected at most 32 scans"):
      image_files.decode_image(_scans(count), "a")
  # Other files within it, or behind it, are not its own.
  within = b"\xff\xe1\x80\x00" + b"\xff\xda" * 16383
  data = _scans(10)[:2] + within + _scans(10)[2:] + _scans(40)
  np.testing.assert_array_equal(image_files.decode_image(data, "a"), whole)


def test_a_video_in_parts_without_number_is_refused(tmp_path, monkeypatch):
  path = tmp_path / "a.mp4"
  for count, fault in ((9, "does not open"), (10, "at most 9 parts")):
    monkeypatch.setattr(video_files, "_MAX_PARTS", 9)
    path.write_bytes(b"\0\0\0\x08free" * count)
    with pytest.raises(UserError, match=f"a.mp4: expected a video.*{fault}"):
      video_files.VideoFrames(path, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "place", ["../outside", "{outside}", "a/../../outside"]
)
def test_a_file_opened_outside_of_its_folder_is_a_crash(place, tmp_path):
  outside = tmp_path / "outside"
  outside.write_text("")

  def read(folder):
    (folder / "a").mkdir()
    open(os.path.join(folder, place.format(outside=outside))).close()

  result = fuzz.outcome(_reader(read), {}, tmp_path / "case")
  assert result[:2] == ("crashes", f"opened ['{outside}']")


def _raise(error):
  def read(folder):
    raise error

  return _reader(read)


def test_other_errors_and_unnamed_ones_are_crashes(tmp_path):
  for error in (ValueError("x"), MemoryError(), AssertionError("not finite")):
    result = fuzz.outcome(_raise(error), {"a": b""}, tmp_path / "case")
    assert result.kind == "crashes" and repr(error)[:5] in result.detail
  result = fuzz.outcome(_raise(UserError("bad")), {}, tmp_path / "case")
  assert "without the file's name: bad" in result.detail
  named = _raise(UserError(f"{tmp_path}/case/a: bad"))
  assert fuzz.outcome(named, {}, tmp_path / "case").kind == "rejected"
  assert not (tmp_path / "case").exists()


def test_memory_beyond_the_bound_of_a_file_is_a_fault(tmp_path):
  for size, kind in ((2**24, "accepted"), (2**25, "over_bound")):
    # np.empty touches no page: it is asked for all the same.
    reader = _reader(lambda _, size=size: np.empty(size, np.uint8))
    result = fuzz._measured(reader, {"a": b"x"}, tmp_path / "case")
    assert result.kind == kind and size <= result.peak < 1.2 * size


def test_an_mp4_that_claims_samples_without_end_is_refused(tmp_path):
  data = fuzz_formats.seeds("mp4")[0]["a.mp4"]
  at = data.index(b"stsz") + 8
  # One size for 2^26 samples: FFmpeg would make room for them all.
  claim = (2**14).to_bytes(4, "big") + (2**26).to_bytes(4, "big")
  files = {"a.mp4": data[:at] + claim + data[at + 8 :]}
  result = _read("mp4", files, tmp_path)
  assert result.kind == "rejected" and result.peak < 2**20


def test_an_mp4_of_boxes_in_boxes_is_refused(tmp_path):
  data, box = fuzz_formats.seeds("mp4")[0]["a.mp4"], b""
  for _ in range(2_000):
    box = (len(box) + 8).to_bytes(4, "big") + b"moov" + box
  assert _read("mp4", {"a.mp4": data + box}, tmp_path).kind == "rejected"


@pytest.mark.parametrize(
    "colors, kind", [(256, "accepted"), (257, "rejected"), (2**17, "rejected")]
)
def test_a_bmp_of_more_colours_than_indices_is_refused(colors, kind, tmp_path):
  data = next(f["a.bmp"] for f in _whole("bmp") if f["a.bmp"][28] == 8)
  files = {"a.bmp": data[:46] + colors.to_bytes(4, "little") + data[50:]}
  assert _read("bmp", files, tmp_path).kind == kind


@pytest.mark.parametrize("order", "<>")
def test_a_character_that_is_none_is_refused(order, tmp_path):
  images = dict(np.load(io.BytesIO(_whole("npz_images")[0]["a.npz"])))
  images["classes"] = images["classes"].astype(f"{order}U8")
  for bad in (False, True):
    if bad:
      code = images["classes"].view(f"{order}u4")
      code[0] = 0x110000
    file = io.BytesIO()
    np.savez(file, **images)
    result = _read("npz_images", {"a.npz": file.getvalue()}, tmp_path)
    assert result.kind == ("rejected" if bad else "accepted")


def _die_or_hang(pipe, name, seed, start, stop, data_root):
  """A worker whose case 1 kills it and whose case 2 has no end."""
  pipe.send(None)
  for number in range(start, stop):
    if number == 1:
      os.abort()
    if number == 2:
      time.sleep(60)
    pipe.send(fuzz.Outcome("accepted"))


def test_a_case_that_kills_its_worker_or_hangs_ends_no_run(monkeypatch):
  monkeypatch.setattr(fuzz, "HANG", 2.0)
  results = list(fuzz.outcomes("flo", 0, 3, work=_die_or_hang))
  assert [result.kind for result in results] == [
      *("accepted", "crashes", "hangs")
  ]
  assert results[1].detail == "exit code -6"


def test_the_benchmark_writes_its_rows(tmp_path):
  command = [sys.executable, "-m", "benchmarks.fuzz", "--only=pfm", "--cases=9"]
  result = subprocess.run(
      [*command, f"--json={tmp_path / 'rows.json'}"],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.returncode == 0, result.stderr
  (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
  assert row["format"] == "pfm" and row["rejected"] + row["accepted"] == 9
  assert row["crashes"] == row["hangs"] == row["over_bound"] == 0
