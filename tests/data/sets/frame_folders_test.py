"""Folders of images: what is a sequence, and what of it is paired."""

import cv2
import numpy as np
from PIL import Image
import pytest

from mcjepa_jax.data import sources
from mcjepa_jax.data.readers import image_files
from mcjepa_jax.data.sets import frame_folders, sequences
from mcjepa_jax.errors import UserError


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("MCJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))


def _write_frames(folder, names, size=(8, 6)):
  folder.mkdir(parents=True, exist_ok=True)
  for value, name in enumerate(names):
    Image.new("RGB", size, (value, 0, 0)).save(folder / name)


def _ids(pairs):
  return [pairs.record_id(i) for i in range(len(pairs))]


def test_a_folder_of_scenes_pairs_neighbours_in_natural_order(tmp_path):
  for scene in ("scene_10", "scene_9"):
    _write_frames(tmp_path / scene, ["8.png", "9.png", "10.png"])
  _write_frames(tmp_path / ".hidden", ["1.png", "2.png"])
  pairs = sequences.SequencePairs(frame_folders.frame_folders(tmp_path))
  assert _ids(pairs) == [
      *("scene_9/8+1", "scene_9/9+1", "scene_10/8+1", "scene_10/9+1"),
  ]
  assert pairs[1]["frame_1"][0, 0, 0] == 1
  assert pairs[1]["frame_2"][0, 0, 0] == 2
  assert set(pairs[1]) == {"frame_1", "frame_2"}


@pytest.mark.parametrize(
    "names, ids",
    [
        (
            ["00001_img1.ppm", "00001_img2.ppm", "00002_img1.ppm"],
            ["00001_img1+1"],
        ),
        (
            ["000000_10.png", "000000_11.png", "000001_10.png"],
            ["000000_10+1"],
        ),
        (
            ["00000.jpg", "00005.jpg", "00015.jpg", "00020.jpg"],
            ["00000+1", "00015+1"],
        ),
        (["left_01_rgb.png", "left_02_rgb.png"], ["left_01_rgb+1"]),
        (["frame_1.png", "frame_2.png", "notes.txt"], ["frame_1+1"]),
    ],
)
def test_names_that_differ_in_the_last_number_are_a_sequence(
    tmp_path, names, ids
):
  _write_frames(tmp_path, [n for n in names if n != "notes.txt"])
  (tmp_path / "notes_1.txt").write_text("")
  pairs = sequences.SequencePairs(frame_folders.frame_folders(tmp_path))
  assert _ids(pairs) == ids


def test_only_the_folders_that_are_given_are_looked_at(tmp_path):
  for place in ("a/left", "a/masks", "b/left/deep"):
    _write_frames(tmp_path / place, ["1.png", "2.png"])
  folders = [tmp_path / "b/left", tmp_path / "a/left"]
  found = frame_folders.frame_folders(tmp_path, folders)
  assert [s.name for s in found] == ["b/left/deep", "a/left"]
  with pytest.raises(UserError, match="none: expected a folder of frames"):
    frame_folders.frame_folders(tmp_path, [tmp_path / "none"])


def test_frames_that_are_left_out_end_a_sequence(tmp_path):
  _write_frames(tmp_path, [f"s_{n:02d}.png" for n in range(6)])
  pairs = sequences.SequencePairs(
      frame_folders.frame_folders(tmp_path, leave_out=r".*_0[23]"), gaps=(1, 5)
  )
  assert _ids(pairs) == ["s_00+1", "s_04+1"]


def test_folders_without_a_sequence_are_refused(tmp_path):
  with pytest.raises(UserError, match="expected numbered images"):
    frame_folders.frame_folders(tmp_path)
  with pytest.raises(UserError, match="none: expected a folder of frames"):
    frame_folders.frame_folders(tmp_path / "none")


def test_frames_of_two_sizes_are_both_named(tmp_path):
  _write_frames(tmp_path / "s", ["1.png"])
  _write_frames(tmp_path / "s", ["2.png"], size=(6, 8))
  pairs = sequences.SequencePairs(frame_folders.frame_folders(tmp_path))
  with pytest.raises(UserError, match="s/2: expected 8x6.*s/1, came 6x8"):
    pairs[0]


def _write_scenes(folder):
  """Eight frames of one scene that moves, four of another, two of which rest."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  scenes = [
      cv2.resize(rng.integers(0, 256, (6, 10, 3), np.uint8), (96, 48))
      for _ in range(2)
  ]
  for i, (scene, left) in enumerate(
      [(0, 2 * t) for t in range(8)] + [(1, left) for left in (0, 2, 4, 4)]
  ):
    Image.fromarray(scenes[scene][:, left : left + 64]).save(
        folder / f"{i:02d}.png"
    )


def _frames(root, **options):
  return sources.motion("frames", root, seed=0, size=(32, 32), **options)


def test_a_source_of_frames_spans_no_cut_and_leaves_out_what_rests(tmp_path):
  _write_scenes(tmp_path / "frames" / "a")
  assert _ids(_frames(tmp_path)) == [
      f"a/{i:02d}+1" for i in range(11) if i not in (7, 10)
  ]
  across = {"a/06+2", "a/07+2"}
  assert not across & set(_ids(_frames(tmp_path, gaps=(1, 3))))
  # Its content is every frame.
  images = sources.images("frames", tmp_path, seed=0, size=32)
  assert len(images) == 12


def test_frames_are_looked_at_once_and_again_when_they_change(
    tmp_path, monkeypatch
):
  _write_scenes(tmp_path / "frames" / "a")
  first, read, looked = _ids(_frames(tmp_path)), image_files.read_image, []

  def counted(path, **options):
    looked.append(path.name)
    return read(path, **options)

  monkeypatch.setattr(image_files, "read_image", counted)
  assert _ids(_frames(tmp_path)) == first and not looked
  (tmp_path / "frames/a/11.png").unlink()
  assert _ids(_frames(tmp_path)) == first
  assert looked == [f"{i:02d}.png" for i in range(11)]


def test_a_frame_that_nobody_can_see_is_named_where_it_is_drawn(tmp_path):
  _write_scenes(tmp_path / "frames" / "a")
  for name in ("00", "04"):
    (tmp_path / f"frames/a/{name}.png").write_bytes(b"no image")
  pairs = _frames(tmp_path)
  ids = _ids(pairs)
  for pair in ("a/00+1", "a/03+1", "a/04+1"):
    with pytest.raises(UserError, match="0[04].png: expected an image"):
      pairs[ids.index(pair)]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
  _write_scenes(tmp_path / "frames" / "a")
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("MCJEPA_CACHE", str(tmp_path / "file"))
  assert len(_frames(tmp_path)) == 9


def test_real_samples_are_sequences_without_cuts(shared_data):
  davis = frame_folders.frame_folders(
      shared_data / "DAVIS" / "JPEGImages" / "480p"
  )
  assert [s.name for s in davis] == ["blackswan", "car-shadow"]
  assert len(sequences.SequencePairs(davis)) == 49 + 39
  assert not any(sequences.cuts(s.thumbnails()).any() for s in davis)
  chairs = frame_folders.frame_folders(shared_data / "FlyingChairs_release")
  assert len(sequences.SequencePairs(chairs)) == 4
