import pickle
import struct
import zlib

import numpy as np
import pytest

from mcjepa_jax.data import sources
from mcjepa_jax.data.pipeline.labelled_crops import VOID
from mcjepa_jax.data.sets import segmentation_sets as sets
from mcjepa_jax.errors import UserError
from tests.helpers import label_maps


def _found(example):
  assert example["image"].shape == (*label_maps.SIZE, 3)
  assert example["labels"].shape == label_maps.SIZE
  assert example["labels"].dtype == np.uint8
  return np.unique(example["labels"]).tolist()


def test_voc_reads_its_lists_and_keeps_the_border_void(tmp_path):
  label_maps.voc(tmp_path)
  parts = sources.segmentation("voc2012", str(tmp_path))
  assert [len(part) for part in parts] == [1, 1]
  assert parts.test.record_id(0) == "JPEGImages/2007_02.jpg"
  assert _found(parts.train[0]) == [0, 20, VOID]
  assert parts.train.classes[0] == "background"
  augmented = sources.segmentation("voc2012_aug", str(tmp_path)).train
  assert len(augmented) == 2
  assert _found(augmented[0]) == [5]
  assert _found(augmented[1]) == [0, 20, VOID]


@pytest.mark.parametrize(
    "kind, values", [("labelIds", (0, 7, 33)), ("labelTrainIds", (255, 0, 18))]
)
def test_cityscapes_ids_become_the_classes_that_count(tmp_path, kind, values):
  label_maps.cityscapes(tmp_path, kind, values)
  train, test = sources.segmentation("cityscapes", str(tmp_path))
  assert (len(train), len(test)) == (2, 1)
  assert _found(train[1]) == [0, 18, VOID]
  assert (train.classes[0], train.classes[18]) == ("road", "bicycle")
  # The archives have no folder of their own.
  assert len(sources.segmentation("cityscapes", f"{tmp_path}/cityscapes").test)


def test_zero_is_void_in_ade20k_and_eleven_in_camvid(tmp_path):
  label_maps.ade20k(tmp_path)
  label_maps.camvid(tmp_path)
  for part in sources.segmentation("ade20k", str(tmp_path)):
    assert _found(part[0]) == [0, 149, VOID]
    assert len(set(part.classes)) == 150
    assert (part.classes[0], part.classes[149]) == ("wall", "flag")
  for part in sources.segmentation("camvid", str(tmp_path)):
    assert _found(part[0]) == [0, 10, VOID]
  test = sources.segmentation("camvid_val", str(tmp_path)).test
  assert test.record_id(0) == "val/0001TP_1.png"
  copy = pickle.loads(pickle.dumps(test))
  assert _found(copy[0]) == [0, 10, VOID]


def test_real_camvid_and_ade20k_are_read(shared_data):
  train, test = sources.segmentation("camvid_val", str(shared_data))
  assert (len(train), len(test)) == (367, 101)
  example = test[0]
  assert example["image"].shape == (180, 240, 3)
  # A road scene: the road is below, and the sky above.
  assert (example["labels"][170] == 3).mean() > 0.5
  sample = sources.segmentation("ade20k_sample", str(shared_data)).test
  assert len(sample) == 3
  first = np.unique(sample[0]["labels"]).tolist()
  names = {sample.classes[i] for i in first if i != VOID}
  assert {"wall", "building", "sky", "tree", "road", "grass"} & names
  assert VOID in first


def _fails(match, call):
  with pytest.raises(UserError, match=match) as error:
    call()
  assert "\n" not in error.value.messages[0]


def test_a_label_map_of_another_size_is_named(tmp_path):
  label_maps.camvid(tmp_path)
  label_maps.label_map(
      tmp_path / "CamVid/valannot/0001TP_1.png", (0,), size=(4, 5)
  )
  test = sets.camvid(tmp_path, test="val").test
  _fails(
      "valannot/0001TP_1.png: expected 6x4, the size of its image, came 5x4",
      lambda: test[0],
  )


def test_a_value_that_is_no_class_is_named_with_what_there_is(tmp_path):
  label_maps.camvid(tmp_path)
  label_maps.label_map(
      tmp_path / "CamVid/trainannot/0001TP_1.png", (3, 12, 13, 14, 200)
  )
  train = sets.camvid(tmp_path).train
  _fails(
      "trainannot/0001TP_1.png: expected the values 0 to 11, came 12 to 14, 200",
      lambda: train[0],
  )
  base = label_maps.voc(tmp_path)
  label_maps.label_map(
      base / "SegmentationClass/2007_01.png", (21,), palette=True
  )
  _fails(
      "2007_01.png: expected the values 0 to 20, 255, came 21",
      lambda: sets.voc_2012(tmp_path).train[0],
  )


def _chunk(kind, body):
  crc = zlib.crc32(kind + body)
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def _png(colours, depth, *, size=label_maps.SIZE, chunks=()):
  height, width = size
  header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
  rows = zlib.compress(bytes(height * (1 + width)))
  parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def test_a_palette_png_must_have_its_palette(tmp_path):
  base = label_maps.voc(tmp_path)
  path = base / "SegmentationClass/2007_01.png"
  read = sets.voc_2012(tmp_path).train.__getitem__
  path.write_bytes(_png(3, 8, chunks=[(b"PLTE", bytes(range(24)))]))
  assert _found(read(0)) == [0]
  path.write_bytes(_png(3, 8))
  _fails("2007_01.png: .* without its palette", lambda: read(0))
  # What was converted to gray may hold shades in place of numbers.
  label_maps.label_map(path, (0, 20))
  _fails("8-bit palette pixels, came 8 bits of PNG's colour type 0",
         lambda: read(0))  # fmt: skip


@pytest.mark.parametrize(
    "data, match",
    [
        (b"", "came no png"),
        (b"GIF89a" + bytes(99), "came no png"),
        (_png(0, 16), "came 16 bits of PNG's colour type 0"),
        (_png(0, 4), "came 4 bits of PNG's colour type 0"),
        (_png(2, 8), "colour type 2; label maps hold the classes' numbers"),
        (_png(0, 8, size=(2**15, 2**15 - 1)), "expected 6x4"),
        (_png(0, 8)[:48], "do not decode"),
    ],
)
def test_what_is_no_label_map_is_named(tmp_path, data, match):
  path = tmp_path / "map.png"
  path.write_bytes(data)
  _fails(
      f"map.png: .*{match}", lambda: sets.read_label_map(path, label_maps.SIZE)
  )


@pytest.mark.parametrize(
    "line",
    ["../../secret", "a/b", "/etc/passwd", ".hidden", "a b", "a\0b", "x" * 300],
)
def test_a_split_list_reaches_no_other_folder(tmp_path, line):
  base = label_maps.voc(tmp_path)
  path = base / "ImageSets/Segmentation/val.txt"
  path.write_text(f"2007_02\n{line}\n")
  with pytest.raises(UserError) as error:
    sets.voc_2012(tmp_path)
  (message,) = error.value.messages
  if line[0] == "x":  # a name, but of no file
    assert message.startswith(f"{base}/JPEGImages/x")
  else:
    assert message.startswith(f"{path}: expected a file's name on each line")


@pytest.mark.parametrize(
    "missing, kind",
    [
        ("JPEGImages/2007_02.jpg", "image"),
        ("SegmentationClass/2007_02.png", "label map"),
        ("ImageSets/Segmentation/val.txt", "a name on each line"),
    ],
)
def test_a_missing_file_of_voc_is_named(tmp_path, missing, kind):
  base = label_maps.voc(tmp_path)
  (base / missing).unlink()
  _fails(f"{missing}: .*expected.* {kind}", lambda: sets.voc_2012(tmp_path))


def test_a_list_that_is_empty_or_names_one_twice(tmp_path):
  path = label_maps.voc(tmp_path) / "ImageSets/Segmentation/train.txt"
  path.write_text("\n \n")
  _fails("train.txt: .* came 0 in", lambda: sets.voc_2012(tmp_path))
  path.write_text("2007_01\n2007_01\n")
  _fails("train.txt: expected each name once", lambda: sets.voc_2012(tmp_path))


def test_an_image_without_label_map_and_the_other_way_round(tmp_path):
  label_maps.camvid(tmp_path)
  (tmp_path / "CamVid/testannot/0001TP_1.png").unlink()
  _fails("testannot/0001TP_1.png: not found", lambda: sets.camvid(tmp_path))
  label_maps.label_map(tmp_path / "CamVid/testannot/0001TP_1.png", (0,))
  label_maps.label_map(tmp_path / "CamVid/testannot/0001TP_2.png", (0,))
  _fails("CamVid/test/0001TP_2: not found", lambda: sets.camvid(tmp_path))


def test_a_set_that_is_not_there_or_not_known(tmp_path):
  for name in ("voc2012", "cityscapes", "ade20k", "ade20k_sample", "camvid"):
    _fails(
        f"^{tmp_path}/.*: not found",
        lambda name=name: sources.segmentation(name, str(tmp_path)),
    )
  _fails("one of ade20k, .* got 'x'", lambda: sources.segmentation("x", "."))
  _fails("data_root", lambda: sources.segmentation("camvid", ""))


def test_a_size_is_read_from_the_head_alone(tmp_path):
  label_maps.camvid(tmp_path)
  test = sets.camvid(tmp_path, test="val").test
  path = tmp_path / "CamVid/val/0001TP_1.png"
  path.write_bytes(path.read_bytes()[:60])
  assert test.size(0) == label_maps.SIZE
  path.write_text("no image")
  _fails("val/0001TP_1.png: expected JPEG or PNG", lambda: test.size(0))
