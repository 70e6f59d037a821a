"""Image sets in ArrayRecord shards."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from mcjepa_jax.data.readers import array_records
from mcjepa_jax.data.sets import record_sets
from mcjepa_jax.errors import UserError
from tests.helpers import image_records


def test_converted_images_are_read_shard_after_shard(tmp_path):
  images = record_sets.ConvertedImages(image_records.shards(tmp_path))
  assert len(images) == 5 and images.classes == ["cat", "dog"]
  assert [int(images[i]["image"][0, 0, 0]) for i in range(5)] == [
      *(0, 10, 20, 30, 40)
  ]
  assert [int(images[i]["label"]) for i in range(5)] == [0, 1, 0, 1, 0]
  assert images[0]["label"].dtype == np.int32
  assert images.path(2) == images.path(-3) == "é/2.png"
  with pytest.raises(IndexError):
    images[5]


def test_a_set_without_classes_has_no_labels(tmp_path):
  images = record_sets.ConvertedImages(
      image_records.shards(tmp_path, classes=())
  )
  assert set(images[0]) == {"image"}


def test_a_pickled_set_is_small_and_holds_no_file(tmp_path):
  images = record_sets.ConvertedImages(image_records.shards(tmp_path))
  images[0]
  assert len(pickle.dumps(images)) < 1000
  assert pickle.loads(pickle.dumps(images))[4]["image"][0, 0, 0] == 40


def test_many_shards_leave_few_files_open(tmp_path, monkeypatch):
  monkeypatch.setattr(array_records, "_reader", _cached_reader(3))
  images = record_sets.ConvertedImages(
      image_records.shards(tmp_path, counts=(1,) * 12)
  )
  for i in [*range(12), *range(12)]:
    assert images.path(i) == f"é/{i}.png"
  links = [os.path.realpath(f"/proc/self/fd/{f}") for f in _open_files()]
  assert 0 < sum(link.startswith(str(tmp_path)) for link in links) <= 3


def _cached_reader(size):
  uncached = array_records._reader.__wrapped__
  return array_records.functools.lru_cache(maxsize=size)(uncached)


def _open_files():
  if not os.path.isdir("/proc/self/fd"):
    pytest.skip("no list of open files on this system")
  return os.listdir("/proc/self/fd")


def test_unfinished_and_missing_folders_are_refused(tmp_path):
  with pytest.raises(UserError, match="none/manifest.json"):
    record_sets.ConvertedImages(tmp_path / "none")
  folder = image_records.shards(tmp_path / "set")
  (folder / "manifest.json").unlink()
  with pytest.raises(UserError, match="set: expected .* finished, came one"):
    record_sets.ConvertedImages(folder)


def test_shards_that_are_not_those_of_the_manifest_are_refused(tmp_path):
  folder = image_records.shards(tmp_path)
  images = record_sets.ConvertedImages(folder)
  shard = folder / array_records.shard_name(2, 3)
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-1])
  with pytest.raises(UserError, match="00002-of-00003.* bytes, as manifest"):
    record_sets.ConvertedImages(folder)
  for size in (0, 100, len(whole) // 2, len(whole) - 1):
    shard.write_bytes(whole[:size])
    with pytest.raises(UserError, match="00002-of-00003"):
      images[4]
  image_records.write_records(shard, [b""] * 3, "group_size:1")
  with pytest.raises(
      UserError, match="expected 3 uncompressed records, came 3"
  ):
    images[4]
  image_records.write_records(shard, [b""] * 2)
  with pytest.raises(
      UserError, match="expected 3 uncompressed records, came 2"
  ):
    images[4]
  shard.unlink()
  os.mkfifo(shard)
  with pytest.raises(UserError, match="no regular file"):
    images[4]


def test_a_label_of_no_class_is_refused(tmp_path):
  images = record_sets.ConvertedImages(
      image_records.shards(tmp_path, classes=["cat"])
  )
  assert images[0]["label"] == 0
  with pytest.raises(UserError, match="record 1: expected a label below 1"):
    images[1]


def test_random_damage_to_a_shard_ends_in_a_user_error_or_in_images(tmp_path):
  folder = image_records.shards(tmp_path, counts=(4,))
  images = record_sets.ConvertedImages(folder)
  shard = folder / array_records.shard_name(0, 1)
  whole = np.frombuffer(shard.read_bytes(), np.uint8)
  # The rest is padding.
  used = np.flatnonzero(whole)
  rng = np.random.default_rng(0)
  refused = 0
  for turn in range(200):
    damaged = whole.copy()
    damaged[rng.choice(used, 3)] = rng.integers(0, 256, 3)
    shard.write_bytes(damaged.tobytes())
    os.utime(shard, ns=(turn, turn))
    try:
      values = [int(images[i]["image"][0, 0, 0]) for i in range(4)]
      assert values == [0, 10, 20, 30]
    except UserError:
      refused += 1
  assert refused > 100


def test_sets_of_tfds_are_read_without_tensorflow(tmp_path):
  folder = image_records.tfds_folder(tmp_path / "imagenet2012" / "5.1.0")
  # In a process of its own, where nothing else can have imported it.
  script = """if True:
    import json, pickle, sys
    from mcjepa_jax.data import sources
    held = sources.images("imagenet_tfds", sys.argv[1], seed=0, size=8)
    images = pickle.loads(pickle.dumps(held))
    print(json.dumps([
        len(images), images.classes, len(pickle.dumps(held)),
        [int(images[i]["label"]) for i in range(7)],
        [int(images[i]["image"][0, 0, 0]) for i in range(7)],
        images.record_id(6), "tensorflow" in sys.modules,
        images[0]["label"].dtype.name, images[0]["image"].shape,
    ]))
  """
  result = subprocess.run(
      [sys.executable, "-c", script, str(tmp_path)],
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.returncode == 0, result.stderr
  count, classes, size, labels, reds, name, *rest = json.loads(result.stdout)
  assert (count, classes, name) == (7, ["cat", "dog"], "train/0000006")
  assert labels == [0, 1, 0, 1, 0, 1, 0] and size < 1000
  np.testing.assert_allclose(reds, np.arange(7) * 10, atol=2)
  assert rest == [False, "int32", [4, 6, 3]]
  assert folder.name == "5.1.0"


def test_sets_that_tfds_has_not_prepared_are_refused(tmp_path):
  with pytest.raises(UserError, match="dataset_info.json"):
    record_sets.TfdsImages(tmp_path, "train")
  folder = image_records.tfds_folder(tmp_path / "set")
  with pytest.raises(UserError, match="expected a split 'val' .*'train'"):
    record_sets.TfdsImages(folder, "val")
  info = (folder / "dataset_info.json").read_text()
  for other, fault in (
      (info.replace("array_record", "tfrecord"), "array_record"),
      (info.replace('"4"', '"-4"'), "prepared by tfds|shards with records"),
      (info.replace('"4"', '"9999999999999999"'), "shards with records"),
      (
          info.replace('["4", "3"]', "[]"),
          "prepared by tfds|shards with records",
      ),
      ("[]", "prepared by tfds"),
      ("{", "expected JSON"),
  ):
    (folder / "dataset_info.json").write_text(other)
    with pytest.raises(UserError, match=fault):
      record_sets.TfdsImages(folder, "train")


def test_shards_of_tfds_in_another_folder_are_refused(tmp_path):
  template = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  folder = image_records.tfds_folder(tmp_path / "set", template=template)
  with pytest.raises(UserError, match="expected shards in it, came"):
    record_sets.TfdsImages(folder, "train")


@pytest.mark.parametrize(
    "key", ["pythonClassName", "python_class_name", "type"]
)
def test_a_feature_that_names_another_module_is_not_imported(tmp_path, key):
  folder = image_records.tfds_folder(tmp_path / "set")
  path = folder / "features.json"
  features = json.loads(path.read_text())
  image = features["featuresDict"]["features"]["image"]
  del image["pythonClassName"]
  image[key] = "antigravity.Image"
  path.write_text(json.dumps(features))
  with pytest.raises(UserError, match="features.json: .*'antigravity.Image'"):
    record_sets.TfdsImages(folder, "train")
  assert "antigravity" not in sys.modules


def test_a_module_named_in_json_within_json_is_not_imported(tmp_path):
  folder = image_records.tfds_folder(tmp_path / "set")
  path = folder / "features.json"
  features = json.loads(path.read_text())
  image = features["featuresDict"]["features"]["image"]
  image["pythonClassName"] = "antigravity.Image"
  old = {
      "type": features["pythonClassName"],
      "proto_cls": "tensorflow_datasets.FeaturesDict",
      "content": json.dumps(features["featuresDict"]),
  }
  path.write_text(json.dumps(old))
  with pytest.raises(UserError, match="features.json: .*'antigravity.Image'"):
    record_sets.TfdsImages(folder, "train")
  assert "antigravity" not in sys.modules
  path.write_text(json.dumps(old).replace("antigravity", image_records.IMAGE))
  assert len(record_sets.TfdsImages(folder, "train")) == 7


def test_a_number_of_classes_that_fits_no_memory_is_refused(tmp_path):
  folder = image_records.tfds_folder(tmp_path / "set")
  (folder / "label.labels.txt").unlink()
  path = folder / "features.json"
  path.write_text(path.read_text().replace('"2"', f'"{2**40}"'))
  with pytest.raises(UserError, match=f"classes.*came {2**40}"):
    record_sets.TfdsImages(folder, "train")


def test_examples_of_tfds_that_hold_no_image_are_named(tmp_path):
  folder = image_records.tfds_folder(tmp_path / "set")
  images = record_sets.TfdsImages(folder, "train")
  shard = folder / "imagenet2012-train.array_record-00001-of-00002"
  image_records.write_records(shard, [b"", b"no proto", images._records[0]])
  assert images[6]["label"] == 0
  with pytest.raises(UserError, match="00001-of-00002, record 0: .*one image"):
    images[4]
  with pytest.raises(UserError, match="00001-of-00002, record 1: .*Example"):
    images[5]


def test_random_damage_to_examples_ends_in_a_user_error_or_in_images(tmp_path):
  folder = image_records.tfds_folder(tmp_path / "set", counts=(4,))
  images = record_sets.TfdsImages(folder, "train")
  (shard,) = folder.glob("*.array_record-*")
  records = [images._records[i] for i in range(4)]
  rng = np.random.default_rng(0)
  refused = 0
  for turn in range(100):
    damaged = [bytearray(record) for record in records]
    for record in damaged:
      record[rng.integers(0, 60)] = rng.integers(0, 256)
    image_records.write_records(shard, map(bytes, damaged))
    os.utime(shard, ns=(turn, turn))
    for i in range(4):
      try:
        assert images[i]["image"].shape[2] == 3
      except UserError:
        refused += 1
  assert refused > 50
