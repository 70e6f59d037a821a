"""Videos: what is read, kept and refused."""

import os
import pickle
import time

import numpy as np
import pytest

from mcjepa_jax.data.readers import video_files
from mcjepa_jax.data.sets import sequences
from mcjepa_jax.errors import UserError
from tests.helpers import videos

CODES = pytest.mark.parametrize(
    "name, code", [("a.avi", "MJPG"), ("a.mp4", "mp4v"), ("a.mkv", "mp4v")]
)


@CODES
def test_video_frames_are_rgb_in_order(tmp_path, name, code):
  frames = videos.moving(7)
  videos.write_video(tmp_path / name, frames, code)
  (opened,) = videos.open_videos(tmp_path / name, tmp_path)
  assert len(opened) == 7
  for t, frame in enumerate(frames):
    others = [np.abs(opened.frame(t).astype(int) - f).mean() for f in frames]
    assert np.argmin(others) == t and others[t] < 12
    flipped = np.abs(opened.frame(t).astype(int) - frame[..., ::-1]).mean()
    assert flipped > 2 * others[t]


def test_a_video_is_decoded_once_and_again_when_it_changes(tmp_path):
  path = videos.write_video(tmp_path / "a.avi", videos.moving(3))
  videos.open_videos(path, tmp_path)
  before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
  assert sorted(len(f.suffixes) for f in before) == [1, 2]
  (opened,) = videos.open_videos(path, tmp_path)
  after = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
  assert before == after
  assert len(pickle.dumps(opened)) < 5000
  os.utime(path, (time.time() + 9,) * 2)
  videos.open_videos(path, tmp_path)
  assert len(list((tmp_path / "cache").iterdir())) == 4


def test_large_frames_are_made_smaller_and_small_ones_kept(tmp_path):
  path = videos.write_video(tmp_path / "a.avi", videos.moving(3))
  assert videos.open_videos(path, tmp_path, max_side=32)[0].frame(0).shape == (
      24,
      32,
      3,
  )
  assert videos.open_videos(path, tmp_path, max_side=640)[0].frame(0).shape == (
      48,
      64,
      3,
  )


def test_the_byte_limit_holds_for_all_videos_of_a_folder(tmp_path):
  folder = tmp_path / "films"
  folder.mkdir()
  for name in ("a10.avi", "a9.avi"):
    videos.write_video(folder / name, videos.moving(4))
  one = 4 * 48 * 64 * 3
  opened = videos.open_videos(folder, tmp_path, max_bytes=2 * one)
  assert [v.name for v in opened] == ["a9.avi", "a10.avi"]
  for name in ("new", "cache"):
    with pytest.raises(
        UserError, match="a10.avi: expected at most .*CACHE_GIB"
    ):
      video_files.videos(
          folder, cache_dir=tmp_path / name, max_bytes=2 * one - 1
      )
  assert not list((tmp_path / "new").glob("*.part"))


def test_the_byte_limit_is_set_by_the_environment(tmp_path, monkeypatch):
  path = videos.write_video(tmp_path / "a.avi", videos.moving(4))
  monkeypatch.setenv("MCJEPA_CACHE_GIB", "0.00001")
  with pytest.raises(UserError, match="a.avi: expected at most 10737 bytes"):
    videos.open_videos(tmp_path, tmp_path)
  monkeypatch.setenv("MCJEPA_CACHE_GIB", "0.001")
  assert len(videos.open_videos(path, tmp_path)[0]) == 4
  monkeypatch.setenv("MCJEPA_CACHE_GIB", "much")
  with pytest.raises(UserError, match="CACHE_GIB: expected a number.*'much'"):
    videos.open_videos(path, tmp_path)


@CODES
def test_cut_videos_are_refused_in_one_message(tmp_path, capfd, name, code):
  whole = videos.write_video(
      tmp_path / name, videos.moving(20), code
  ).read_bytes()
  for size in (0, 4, 40, len(whole) // 2, len(whole) - 9):
    (tmp_path / name).write_bytes(whole[:size])
    with pytest.raises(UserError, match=name):
      videos.open_videos(tmp_path / name, tmp_path)
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00",
        b"\x00\x00\x00\x01mdat\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x1a\x45\xdf\xa3" + bytes(99),
        b"RIFF\x04\x00\x00\x00AVI ",
    ],
)
def test_files_that_are_no_video_are_refused(tmp_path, data):
  (tmp_path / "a.mp4").write_bytes(data)
  with pytest.raises(UserError, match="a.mp4: expected"):
    videos.open_videos(tmp_path / "a.mp4", tmp_path)
  assert not list(tmp_path.glob("cache/*"))


def test_all_damaged_videos_of_a_folder_are_named_at_once(tmp_path):
  for name in ("b/x.mp4", "a/x.avi", "a/.x.avi", "notes.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"no video at all")
  with pytest.raises(UserError) as caught:
    videos.open_videos(tmp_path, tmp_path)
  first, second = caught.value.messages
  assert "a/x.avi: expected" in first and "b/x.mp4: expected" in second


def test_videos_of_one_name_in_two_folders_keep_apart(tmp_path):
  for folder, count in (("a", 2), ("b", 3)):
    (tmp_path / folder).mkdir()
    videos.write_video(tmp_path / folder / "x.avi", videos.moving(count))
  pairs = sequences.SequencePairs(videos.open_videos(tmp_path, tmp_path))
  assert videos.record_ids(pairs) == [
      *("a/x.avi/000000+1", "b/x.avi/000000+1", "b/x.avi/000001+1")
  ]


def test_missing_videos_and_caches_are_named(tmp_path):
  with pytest.raises(UserError, match="none.mp4"):
    videos.open_videos(tmp_path / "none.mp4", tmp_path)
  with pytest.raises(UserError, match="expected videos"):
    videos.open_videos(tmp_path, tmp_path)
  path = videos.write_video(tmp_path / "a.avi", videos.moving(3))
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(UserError, match="MCJEPA_CACHE"):
    video_files.videos(path, cache_dir=tmp_path / "file" / "cache")
  (opened,) = videos.open_videos(path, tmp_path)
  for file in (tmp_path / "cache").iterdir():
    file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(UserError, match="came cut"):
    opened.frame(2)
  with pytest.raises(UserError, match="delete it"):
    videos.open_videos(path, tmp_path)


def test_real_samples_are_whole_and_without_cuts(shared_data, tmp_path):
  for name, count in (("carphone_pristine.mp4", 120), ("vtest.avi", 341)):
    opened = videos.open_videos(
        shared_data / "video" / name, tmp_path, max_side=64
    )
    assert len(opened[0]) == count
    pairs = sequences.SequencePairs(opened, skip_cuts=True)
    assert len(pairs) == count - 1
