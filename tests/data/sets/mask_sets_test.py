"""Sequences with masks: what is read, and each fault by its name."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax import check_data
from mcjepa_jax.data import sources
from mcjepa_jax.data.sets import mask_sets
from mcjepa_jax.errors import UserError
from mcjepa_jax.evals import registry
from tests.helpers import mask_clips, tiny


def _davis(tmp_path, **changes):
  mask_clips.davis(tmp_path / "DAVIS", **changes)
  return tmp_path / "DAVIS"


def _faults(tmp_path, name="davis/2017"):
  return registry.check(tiny.config(data_root=str(tmp_path), evals=(name,)))


def test_2017_has_objects_and_2016_one_foreground(tmp_path):
  root = _davis(tmp_path)
  many = mask_sets.davis(tmp_path, "2017").sequence(0)
  one = mask_sets.davis(root, "2016").sequence(0)
  assert many.name == one.name == "walk"
  assert many.objects == (1, 2)
  assert one.objects == (1,)
  frames, labels = mask_clips.clip(objects=2)
  assert len(many) == len(frames)
  assert many.size == frames.shape[1:3]
  for i, mask in enumerate(labels):
    np.testing.assert_array_equal(many.labels(i), mask)
    np.testing.assert_array_equal(one.labels(i), mask > 0)
  assert np.abs(many.frame(1).astype(int) - frames[1]).mean() < 20


@pytest.mark.parametrize(
    ("lists", "names"),
    [
        ({"2016": "walk\n", "2017": "run\n\nwalk\n"}, ["run", "walk"]),
        (
            # As the archive of 2016 has it: a line a frame.
            {
                "480p": (
                    "/JPEGImages/480p/run/00000.jpg"
                    " /Annotations/480p/run/00000.png\n"
                    "/JPEGImages/480p/run/00001.jpg"
                    " /Annotations/480p/run/00001.png\n"
                )
            },
            ["run"],
        ),
        ({}, ["run", "walk"]),
    ],
)
def test_the_list_of_a_split_names_the_sequences(tmp_path, lists, names):
  root = tmp_path / "DAVIS"
  for name in ("run", "walk"):
    mask_clips.save(root, name, *mask_clips.clip(length=3))
  for folder, text in lists.items():
    (root / "ImageSets" / folder).mkdir(parents=True)
    (root / "ImageSets" / folder / "val.txt").write_text(text)
  year = "2016" if "480p" in lists else "2017"
  found = mask_sets.davis(tmp_path, year)
  assert [found.record_id(i) for i in range(len(found))] == names


def test_youtube_vos_has_the_objects_of_its_meta(tmp_path):
  mask_clips.youtube_vos(tmp_path / "youtube_vos" / "train")
  (tmp_path / "youtube_vos/train/Annotations/0043f083b5/00015.png").unlink()
  found = sources.mask_sequences("youtube_vos", str(tmp_path))
  sequence = found.sequence(0)
  assert sequence.objects == (1, 3)
  assert sequence.labels(3) is None
  assert np.unique(sequence.labels(1)).tolist() == [0, 1]
  assert np.unique(sequence.labels(2)).tolist() == [0, 1, 3]
  assert _faults(tmp_path, "davis/youtube_vos") == []


@pytest.mark.parametrize(
    ("objects", "known"), [(("1",), "1"), (("1", "2"), "1, 2"), ((), "none")]
)
def test_a_label_that_the_meta_does_not_name_is_told(tmp_path, objects, known):
  train = tmp_path / "youtube_vos" / "train"
  mask_clips.youtube_vos(train, begins=0)
  meta = {"videos": {"0043f083b5": {"objects": dict.fromkeys(objects)}}}
  (train / "meta.json").write_text(json.dumps(meta))
  (fault,) = _faults(tmp_path, "davis/youtube_vos")
  assert "Annotations/0043f083b5/00000.png: expected the labels that" in fault
  came = "1, 3" if known == "none" else "3"
  assert fault.endswith(f"for 0043f083b5, {known}, came {came}")


def test_a_label_beside_the_first_masks_is_kept_by_davis(tmp_path):
  root = tmp_path / "DAVIS"
  frames, labels = mask_clips.clip(objects=2)
  labels[0][labels[0] == 2] = 0
  mask_clips.save(root, "run", frames, labels)
  sequence = mask_sets.davis(root, "2017").sequence(0)
  assert sequence.objects == (1,)
  assert np.unique(sequence.labels(1)).tolist() == [0, 1, 2]
  one = mask_sets.davis(root, "2016").sequence(0)
  assert np.unique(one.labels(1)).tolist() == [0, 1]


def test_a_label_of_a_later_mask_that_the_meta_does_not_name_is_told(tmp_path):
  train = tmp_path / "youtube_vos" / "train"
  mask_clips.youtube_vos(train)
  meta = {"videos": {"0043f083b5": {"objects": {"1": {}}}}}
  (train / "meta.json").write_text(json.dumps(meta))
  sequence = mask_sets.youtube_vos(tmp_path).sequence(0)
  sequence.labels(1)
  with pytest.raises(UserError, match="00010.png: .*0043f083b5, 1, came 3"):
    sequence.labels(2)


def test_lengths_are_known_before_a_frame_is_read(tmp_path):
  root = _davis(tmp_path, length=4)
  (root / _FRAME).write_text("no image")
  assert mask_sets.davis(root, "2017").length(0) == 4


def test_255_is_no_object(tmp_path):
  root = tmp_path / "DAVIS"
  frames, labels = mask_clips.clip()
  labels[:, :3] = 255
  mask_clips.save(root, "run", frames, labels)
  for year in ("2016", "2017"):
    sequence = mask_sets.davis(root, year).sequence(0)
    assert sequence.objects == (1,)
    np.testing.assert_array_equal(
        sequence.labels(1), np.where(labels[1] == 255, 0, labels[1])
    )


def test_black_and_white_is_one_object_and_other_greys_are_refused(tmp_path):
  path = tmp_path / "a.png"
  square = mask_clips.clip()[1][0]
  mask_clips.save_labels(path, 255 * square, palette=False)
  np.testing.assert_array_equal(mask_sets.read_labels(path), square)
  Image.fromarray(square > 0).save(path)
  np.testing.assert_array_equal(mask_sets.read_labels(path), square)
  mask_clips.save_labels(path, 38 * square, palette=False)
  with pytest.raises(UserError, match="a.png: expected a palette.*0, 38"):
    mask_sets.read_labels(path)


def _without_palette(path):
  data = path.read_bytes()
  start = data.index(b"PLTE") - 4
  length = int.from_bytes(data[start : start + 4], "big")
  path.write_bytes(data[:start] + data[start + 12 + length :])


def _in_colour(path):
  Image.open(path).convert("RGB").save(path)


def _larger(path):
  Image.open(path).resize((80, 48)).save(path)


def _cut(path):
  path.write_bytes(path.read_bytes()[:60])


def _empty(path):
  mask_clips.save_labels(path, np.zeros((48, 64), np.uint8))


def _no_image(path):
  path.write_text("labels")


_MASK = "Annotations/480p/walk/00000.png"
_LAST_MASK = "Annotations/480p/walk/00005.png"
_FRAME = "JPEGImages/480p/walk/00003.jpg"


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (_MASK, _without_palette, "00000.png.*without its palette"),
        (_LAST_MASK, _without_palette, "00005.png.*without its palette"),
        (_MASK, _in_colour, "00000.png.*came RGB"),
        (_MASK, _larger, "00000.png: expected 64x48.*came 80x48"),
        (_LAST_MASK, _larger, "00005.png: expected 64x48.*came 80x48"),
        (_FRAME, _larger, "00003.jpg: expected 64x48.*came 80x48"),
        (_MASK, _cut, "00000.png: expected"),
        (_MASK, _empty, "00000.png: expected an object in the first mask"),
        (_MASK, _no_image, "00000.png: expected PNG"),
        (_FRAME, _no_image, "00003.jpg: expected JPEG"),
        (_MASK, lambda path: path.unlink(), "00000.png: not found"),
        (_FRAME, lambda path: path.unlink(), "00003.png: expected a frame"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, place, change, words):
  path = _davis(tmp_path) / place
  change(path)
  (fault,) = _faults(tmp_path)
  assert re.search(words, fault), fault


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("ImageSets/2017/val.txt", "2017/val.txt: not found"),
        ("JPEGImages/480p", "JPEGImages/480p: not found"),
        ("JPEGImages/480p/walk", "walk: expected a folder of frames"),
        ("Annotations", "walk: expected a folder of masks"),
    ],
)
def test_what_is_missing_is_named(tmp_path, gone, words):
  path = _davis(tmp_path) / gone
  path.rename(tmp_path / "elsewhere")
  (fault,) = _faults(tmp_path)
  assert words in fault


@pytest.mark.parametrize(
    "name", ["..", "../secret", "/etc", "walk/..", "a\\b", ".hidden", "\0"]
)
def test_a_listed_name_leads_nowhere_else(tmp_path, name):
  root = _davis(tmp_path)
  for kind in ("JPEGImages", "Annotations"):
    (root / kind / "480p" / "walk").rename(root / kind / "secret")
  (root / "ImageSets/2017/val.txt").write_text(f"run\n{name}\n")
  (fault,) = _faults(tmp_path)
  assert "val.txt: expected names of sequences" in fault
  train = tmp_path / "youtube_vos" / "train"
  train.mkdir(parents=True)
  meta = {"videos": {name: {"objects": {"1": {}}}}}
  (train / "meta.json").write_text(json.dumps(meta))
  (fault,) = _faults(tmp_path, "davis/youtube_vos")
  assert "meta.json: expected names of sequences" in fault


@pytest.mark.parametrize("text", ["", "\n\n", " \t"])
def test_an_empty_list_is_told(tmp_path, text):
  (_davis(tmp_path) / "ImageSets/2017/val.txt").write_text(text)
  assert "expected a list of sequences, came none" in _faults(tmp_path)[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"videos": 3}',
        '{"videos": {}}',
        '{"videos": {"a": {}}}',
        '{"videos": {"a": {"objects": {"x": {}}}}}',
        '{"videos": {"a": {"objects": {"0": {}}}}}',
        '{"videos": {"a": {"objects": {"255": {}}}}}',
        '{"videos":' + "[" * 100_000,
    ],
)
def test_a_meta_of_another_form_is_told(tmp_path, text):
  train = tmp_path / "youtube_vos" / "train"
  train.mkdir(parents=True)
  (train / "meta.json").write_text(text)
  (fault,) = _faults(tmp_path, "davis/youtube_vos")
  assert "meta.json: expected" in fault


def test_a_video_of_the_meta_that_is_missing_is_told_at_once(tmp_path):
  train = tmp_path / "youtube_vos" / "train"
  mask_clips.youtube_vos(train)
  meta = json.loads((train / "meta.json").read_text())
  meta["videos"]["lost"] = {"objects": {"1": {}}}
  (train / "meta.json").write_text(json.dumps(meta))
  (fault,) = _faults(tmp_path, "davis/youtube_vos")
  assert "JPEGImages/lost: not found" in fault
  assert "2 videos, of which 1 are missing" in fault


def test_masks_of_the_first_frames_alone_measure_nothing(tmp_path):
  # As the validation part is published.
  train = tmp_path / "youtube_vos" / "train"
  mask_clips.youtube_vos(train)
  for number in (10, 15, 20, 25):
    (train / f"Annotations/0043f083b5/{number:05d}.png").unlink()
  (fault,) = _faults(tmp_path, "davis/youtube_vos")
  assert "at least three frames, came 2" in fault


def test_a_mask_that_claims_too_many_pixels_is_refused(tmp_path):
  path = _davis(tmp_path) / _MASK
  data = bytearray(path.read_bytes())
  data[16:24] = (100_000).to_bytes(4, "big") * 2
  path.write_bytes(data)
  assert any("00000.png" in fault for fault in _faults(tmp_path))


def test_the_check_shows_the_first_masks(tmp_path):
  _davis(tmp_path)
  settings = check_data.Settings(root=str(tmp_path))
  report = check_data.check(["davis/2017"], settings, output=tmp_path / "out")
  source = report["sources"]["davis/2017"]
  assert report["ok"] and source["decoded"] == 1
  assert (tmp_path / "out" / "davis_2017.png").is_file()


def test_real_sequences_are_read_without_lists(shared_data):
  found = sources.mask_sequences("2017", str(shared_data))
  names = [found.record_id(i) for i in range(len(found))]
  assert names == ["blackswan", "car-shadow"]
  for i, length in enumerate((50, 40)):
    sequence = found.sequence(i)
    assert len(sequence) == length
    assert sequence.objects == (1,)
    assert sequence.size == (480, 854)
    assert set(found[i]) == {"image", "mask"}
    assert 0.05 < found[i]["mask"].mean() < 0.2
