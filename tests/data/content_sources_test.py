"""Each content source is found by its name, in its own layout."""

import io

import cv2
import numpy as np
from PIL import Image
import pytest

from mcjepa_jax import convert_images
from mcjepa_jax.data import sources
from mcjepa_jax.data.catalog import datasets
from mcjepa_jax.data.pipeline import batches
from mcjepa_jax.errors import UserError
from tests.helpers import binary_sets, image_records


def _images(folder, names):
  for value, name in enumerate(names):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (value, 0, 255)).save(file, "PNG")
    (folder / name).write_bytes(file.getvalue())


def _open(name, root):
  return sources.images(name, str(root), seed=0, size=8)


def _labelled(name, root):
  return sources.labelled(name, str(root), seed=0, size=8, count=4)


@pytest.mark.parametrize(
    "name, place",
    [
        ("images", "images"),
        ("imagenet", "imagenet/train"),
        ("frames", "frames"),
        ("davis", "DAVIS/JPEGImages/480p"),
        ("sintel_clean", "MPI-Sintel/training/clean"),
        ("sintel_final", "MPI-Sintel/training/final"),
    ],
)
def test_content_is_read_from_folders(tmp_path, name, place):
  _images(tmp_path / place, ["a/1.png", "a/2.png", "b/1.png", "b/2.png"])
  examples = _open(name, tmp_path)
  assert [int(examples[i]["image"][0, 0, 0]) for i in range(4)] == [0, 1, 2, 3]
  assert examples.record_id(2).removesuffix(".png") == "b/1"
  with pytest.raises(UserError, match=place):
    _open(name, tmp_path / "elsewhere")


def test_content_is_read_from_videos(tmp_path, monkeypatch):
  monkeypatch.setenv("MCJEPA_CACHE", str(tmp_path / "cache"))
  (tmp_path / "video").mkdir()
  writer = cv2.VideoWriter(
      str(tmp_path / "video" / "a.avi"),
      cv2.VideoWriter.fourcc(*"MJPG"),
      25,
      (16, 16),
  )
  for value in (0, 100, 200):
    writer.write(np.full((16, 16, 3), value, np.uint8))
  writer.release()
  frames = _open("video", tmp_path)
  values = [int(frames[i]["image"].mean()) for i in range(len(frames))]
  np.testing.assert_allclose(values, [0, 100, 200], atol=5)
  assert frames.record_id(1) == "a.avi/000001"


@pytest.mark.parametrize(
    "name, place",
    [("records", "records"), ("imagenet_records", "imagenet_records/train")],
)
def test_content_is_read_from_shards(tmp_path, name, place):
  _images(tmp_path / "in", ["a/1.png", "b/2.png"])
  convert_images.convert(
      source=tmp_path / "in", output=tmp_path / place, shards=1
  )
  assert _open(name, tmp_path).path(1) == "b/2.png"


def test_content_is_read_from_binaries(tmp_path):
  binary_sets.cifar10(tmp_path / "cifar-10-batches-bin")
  binary_sets.stl10(tmp_path / "stl10_binary")
  assert len(_open("cifar10_bin", tmp_path)) == 8
  assert _open("stl10", tmp_path).record_id(0) == "unlabeled_X/000000"
  assert len(_labelled("cifar10_bin_train", tmp_path)) == 8
  assert len(_labelled("cifar10_bin_test", tmp_path)) == 2
  assert _labelled("stl10_train", tmp_path)[1]["label"] == 9
  with pytest.raises(UserError, match="test_y.bin"):
    _labelled("stl10_test", tmp_path)


def test_imagenet_of_tfds_is_its_one_version(tmp_path):
  with pytest.raises(UserError, match="imagenet2012: expected one .* none"):
    _open("imagenet_tfds", tmp_path)
  image_records.tfds_folder(tmp_path / "imagenet2012" / "5.1.0")
  assert len(_open("imagenet_tfds", tmp_path)) == 7
  with pytest.raises(UserError, match="expected a split 'validation'"):
    _labelled("imagenet_val_tfds", tmp_path)
  image_records.tfds_folder(tmp_path / "imagenet2012" / "5.0.0")
  with pytest.raises(UserError, match=r"came \['5.0.0', '5.1.0'\]"):
    _open("imagenet_tfds", tmp_path)


def test_labels_are_asked_of_a_set_that_has_none(tmp_path):
  _images(tmp_path / "imagenet" / "val", ["a/1.png", "b/2.png"])
  assert _labelled("imagenet_val", tmp_path)[1]["label"] == 1
  _images(tmp_path / "imagenet" / "val", ["3.png"])
  with pytest.raises(
      UserError, match="imagenet_val: expected images with labels"
  ):
    _labelled("imagenet_val", tmp_path)
  out = tmp_path / "imagenet_records" / "val"
  convert_images.convert(source=tmp_path / "imagenet/val", output=out, shards=1)
  with pytest.raises(UserError, match="records: expected images with labels"):
    _labelled("imagenet_val_records", tmp_path)


def test_every_content_name_is_in_the_catalog():
  uses = {use for dataset in datasets.DATASETS for use in dataset.reads}
  own = {"synthetic", "images", "records", "video", "frames"}
  for kind, make in (("content", _open), ("knn", _labelled)):
    with pytest.raises(UserError) as caught:
      make("?", "/nowhere")
    listed = str(caught.value).split("expected one of ")[1].split(", got")[0]
    names = {
        name
        for name in set(listed.split(", ")) - own
        if f"motion/{name}" not in uses
    }
    assert names == {u.split("/")[1] for u in uses if u.startswith(kind)}


def test_a_name_that_is_none_is_told_the_others(tmp_path):
  with pytest.raises(UserError, match="content.sources: .*imagenet_records, "):
    _open("imagenet_record", tmp_path)
  with pytest.raises(UserError, match="data_root: expected the folder"):
    _open("records", "")


@pytest.mark.slow
def test_workers_read_the_batches_of_one_process_out_of_shards(tmp_path):
  _images(tmp_path / "in", [f"{'ab'[i % 2]}/{i}.png" for i in range(20)])
  convert_images.convert(
      source=tmp_path / "in", output=tmp_path / "records", shards=3
  )
  images = _open("records", tmp_path)

  def read(workers):
    source = batches.ContentSource("images", images)
    with batches.content_stream(
        [source], batch_size=8, size=8, seed=1, num_workers=workers
    ) as stream:
      return [next(stream) for _ in range(4)]

  for one, two in zip(read(0), read(2), strict=True):
    np.testing.assert_array_equal(one.arrays["views"], two.arrays["views"])
    assert one.records == two.records and one.records[0].startswith("images/")
