"""Image sets: labels, order, and hostile .npz files."""

import contextlib
import io
import os
import pickle
import struct
import zipfile

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax.data.sets import image_sets
from mcjepa_jax.errors import UserError
from tests.helpers import binary_sets


def _encoded(value, size=(6, 4), kind="PNG"):
  file = io.BytesIO()
  Image.new("RGB", size, (value, 0, 255)).save(file, kind)
  return file.getvalue()


def _write(path, value=0, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(_encoded(value, **kwargs))


def _arrays(values=(10, 20, 30), labels=(1, 0, 1)):
  images = [_encoded(value) for value in values]
  return {
      "data": np.frombuffer(b"".join(images), np.uint8),
      "offsets": np.cumsum([0, *map(len, images)]),
      "labels": np.array(labels, np.int32),
      "classes": np.array(["cat", "dog"]),
  }


def _npz(path, **changes):
  arrays = {**_arrays(), **changes}
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
  return path


def test_labels_are_the_numbers_of_sorted_class_folders(tmp_path):
  _write(tmp_path / "n02" / "b.JPEG", 9)
  _write(tmp_path / "n02" / "a.png", 8)
  _write(tmp_path / "n01" / "c.jpg", 7)
  (tmp_path / "n01" / "notes.txt").write_text("no image")
  (tmp_path / ".hidden").mkdir()
  images = image_sets.ImageFolder(tmp_path)
  ids = [images.record_id(i) for i in range(len(images))]
  assert ids == ["n01/c.jpg", "n02/a.png", "n02/b.JPEG"]
  assert images.classes == ["n01", "n02"]
  assert [int(images[i]["label"]) for i in range(3)] == [0, 1, 1]
  assert [images[i]["image"][0, 0, 0] for i in range(3)] == [7, 8, 9]


def test_names_are_sorted_whatever_order_the_disk_gives(tmp_path, monkeypatch):
  for name in "cab":
    _write(tmp_path / name / "x.png")
  scan = os.scandir
  monkeypatch.setattr(
      os,
      "scandir",
      lambda path: contextlib.nullcontext(
          sorted(scan(path), key=lambda entry: entry.name, reverse=True)
      ),
  )
  assert image_sets.ImageFolder(tmp_path).classes == ["a", "b", "c"]


def test_a_flat_folder_has_no_labels(tmp_path):
  _write(tmp_path / "é.png", 3)
  images = image_sets.ImageFolder(tmp_path)
  assert images.record_id(0) == "é.png"
  assert set(images[0]) == {"image"}


def test_min_side_reaches_the_decoder(tmp_path):
  _write(tmp_path / "a.jpg", size=(64, 48), kind="JPEG")
  images = image_sets.ImageFolder(tmp_path, min_side=24)
  assert images[0]["image"].shape == (24, 32, 3)


def test_folders_that_are_no_set_of_images_are_refused(tmp_path):
  with pytest.raises(UserError, match="none: expected a folder"):
    image_sets.ImageFolder(tmp_path / "none")
  with pytest.raises(UserError, match="expected images, came none"):
    image_sets.ImageFolder(tmp_path)
  (tmp_path / "n01").mkdir()
  with pytest.raises(UserError, match="n01: expected images, came none"):
    image_sets.ImageFolder(tmp_path)


def test_a_tree_that_is_no_folder_a_class_has_no_labels(tmp_path):
  for name in ("b/2.png", "b/c/1.png", "a-b/3.png", "a/4.png"):
    _write(tmp_path / name)
  (tmp_path / "z").mkdir()
  images = image_sets.ImageFolder(tmp_path)
  ids = [images.record_id(i) for i in range(len(images))]
  assert ids == ["a/4.png", "a-b/3.png", "b/2.png", "b/c/1.png"]
  assert images.classes == [] and set(images[0]) == {"image"}
  _write(tmp_path / "5.png")
  assert image_sets.ImageFolder(tmp_path).record_id(0) == "5.png"


def test_links_are_followed_and_never_in_a_circle(tmp_path):
  _write(tmp_path / "set" / "a" / "1.png", 1)
  _write(tmp_path / "elsewhere" / "2.png", 2)
  (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
  images = image_sets.ImageFolder(tmp_path / "set")
  assert images.record_id(1) == "b/2.png" and images[1]["label"] == 1
  assert image_sets.find_images(tmp_path / "set").links == ["b"]
  (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
  with pytest.raises(UserError, match="a/up: expected each folder once"):
    image_sets.ImageFolder(tmp_path / "set")


def test_names_of_a_million_images_take_their_bytes_alone():
  names = [f"n{i % 1000:08d}/{i:07d}.JPEG" for i in range(10_000)]
  held = image_sets.Names([*names, "\udcff.png", "x" * 4000])
  assert [held[i] for i in range(10_000)] == names
  assert held[-2] == "\udcff.png" and len(held) == 10_002
  assert len(pickle.dumps(held)) < 10_000 * 32


class _Sequence:

  def __init__(self, name, values):
    self.name, self.values = name, values

  def __len__(self):
    return len(self.values)

  def frame(self, index):
    return np.full((4, 6, 3), self.values[index], np.uint8)

  def frame_id(self, index):
    return f"{self.name}/{index:06d}"


def test_frames_of_sequences_are_single_images():
  frames = image_sets.SequenceFrames(
      [_Sequence("a", [1, 2]), _Sequence("none", []), _Sequence("b", [3])]
  )
  assert [int(frames[i]["image"][0, 0, 0]) for i in range(len(frames))] == [
      *(1, 2, 3)
  ]
  assert [frames.record_id(i) for i in (0, 2, -1)] == [
      *("a/000000", "b/000000", "b/000000")
  ]
  with pytest.raises(IndexError):
    frames[3]


def test_cifar10_binaries_are_read_by_row_and_channel(tmp_path):
  images = image_sets.cifar10_binary(binary_sets.cifar10(tmp_path), "train")
  assert len(images) == 8 and images.classes[9] == "class9"
  for i in range(8):
    example = images[i]
    assert example["label"] == i and example["label"].dtype == np.int32
    assert example["image"].shape == (32, 32, 3)
    assert example["image"][5, 7].tolist() == [i, 5, 7]
  assert images.record_id(4) == "data_batch_4/000000"
  assert len(pickle.dumps(images)) < 2000
  assert pickle.loads(pickle.dumps(images))[-1]["label"] == 7
  test = image_sets.cifar10_binary(tmp_path, "test")
  assert [int(test[i]["image"][0, 0, 0]) for i in range(2)] == [8, 9]


def test_stl10_binaries_are_read_by_column_and_channel(tmp_path):
  images = image_sets.stl10_binary(binary_sets.stl10(tmp_path), "train")
  assert [int(images[i]["label"]) for i in range(3)] == [0, 9, 2]
  assert images.classes[9] == "j"
  unlabeled = image_sets.stl10_binary(tmp_path, "unlabeled")
  assert len(unlabeled) == 3 and set(unlabeled[0]) == {"image"}
  assert unlabeled.record_id(2) == "unlabeled_X/000002"
  for example in (images[2], unlabeled[2]):
    assert example["image"].shape == (96, 96, 3)
    assert example["image"][5, 70].tolist() == [2, 5, 70]


def test_binaries_that_do_not_fit_are_refused(tmp_path):
  with pytest.raises(UserError, match="batches.meta.txt"):
    image_sets.cifar10_binary(tmp_path, "train")
  folder = binary_sets.cifar10(tmp_path, labels=lambda i: 255 if i == 1 else 0)
  images = image_sets.cifar10_binary(folder, "train")
  with pytest.raises(UserError, match="_1.bin, image 1: .*below 10, came 255"):
    images[1]
  whole = (folder / "data_batch_2.bin").read_bytes()
  for size in (0, 3072, 3074):
    (folder / "data_batch_2.bin").write_bytes(whole[:1] * size)
    with pytest.raises(UserError, match=f"_2.bin: .*3073 .*came {size} bytes"):
      image_sets.cifar10_binary(folder, "train")
  (folder / "data_batch_2.bin").write_bytes(whole[:-1])
  with pytest.raises(UserError, match="data_batch_2.bin: .*cut"):
    images[2]
  (folder / "batches.meta.txt").write_bytes(b"a\n" * 2**16)
  with pytest.raises(UserError, match="meta.txt: expected a name"):
    image_sets.cifar10_binary(folder, "train")


@pytest.mark.parametrize(
    "labels", [(1, 2), (1, 2, 3, 4), (0, 1, 2), (9, 9, 11)]
)
def test_stl10_labels_that_do_not_fit_are_refused(tmp_path, labels):
  with pytest.raises(UserError, match="labels"):
    image_sets.stl10_binary(binary_sets.stl10(tmp_path, labels), "train")


def test_a_corrupt_image_is_named(tmp_path):
  _write(tmp_path / "n01" / "a.png")
  (tmp_path / "n01" / "b.png").write_bytes(_encoded(0)[:45])
  images = image_sets.ImageFolder(tmp_path)
  with pytest.raises(UserError, match="n01/b.png"):
    images[1]


def test_npz_images_are_read_in_place(tmp_path):
  images = image_sets.NpzImages(_npz(tmp_path / "a.npz"))
  assert len(images) == 3 and images.classes == ["cat", "dog"]
  assert [images[i]["image"][0, 0, 0] for i in range(3)] == [10, 20, 30]
  assert [int(images[i]["label"]) for i in range(3)] == [1, 0, 1]
  assert images.record_id(2) == images.record_id(-1) == "000002"
  with pytest.raises(IndexError):
    images[3]
  assert pickle.loads(pickle.dumps(images))[1]["image"][0, 0, 0] == 20


def test_a_corrupt_image_of_an_npz_is_numbered(tmp_path):
  data = _arrays()["data"].copy()
  data[_arrays()["offsets"][1]] = 0
  images = image_sets.NpzImages(_npz(tmp_path / "a.npz", data=data))
  assert images[0]["label"] == 1
  with pytest.raises(UserError, match="a.npz, image 1: expected an image"):
    images[1]


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"labels": None}, "an array 'labels'"),
        ({"labels": np.int32([0, 1])}, "3 labels"),
        ({"labels": np.int32([0, 1, 2])}, "labels below 2"),
        ({"labels": np.int32([0, 1, -1])}, "labels below 2"),
        ({"labels": np.int64([0, 1, 2**40])}, "int32 holds"),
        ({"labels": np.float32([0, 1, 0])}, "array of int32"),
        ({"labels": np.array([0, "x", 1], object)}, "no objects"),
        ({"classes": np.int32([0, 1])}, "array of str"),
        ({"data": np.zeros((2, 2), np.uint8)}, "one axis"),
        ({"data": np.zeros(9, np.int8)}, "uint8"),
        ({"offsets": _arrays()["offsets"][[0, 2, 1, 3]]}, "rise from 0"),
        ({"offsets": np.int64([])}, "rise from 0"),
        ({"offsets": np.int64([-5, 9, 20, 60])}, "rise from 0"),
        ({"offsets": np.int64([0, 9, 20, 2**50])}, "rise from 0"),
    ],
)
def test_npz_arrays_that_do_not_fit_together_are_refused(
    tmp_path, changes, fault
):
  path = _npz(tmp_path / "a.npz", **changes)
  with pytest.raises(UserError, match=f"a.npz: .*{fault}"):
    image_sets.NpzImages(path)


def test_a_compressed_npz_is_refused_before_it_is_unpacked(tmp_path):
  np.savez_compressed(tmp_path / "a.npz", **_arrays())
  with pytest.raises(UserError, match="'data' as np.savez stores it"):
    image_sets.NpzImages(tmp_path / "a.npz")


def _npz_with(path, name, member):
  """The archive of `_arrays` with other bytes for one member."""
  np.savez(path, **_arrays())
  with zipfile.ZipFile(path) as archive:
    members = {n: archive.read(n) for n in archive.namelist()}
  members[f"{name}.npy"] = member
  with zipfile.ZipFile(path, "w") as archive:
    for key, value in members.items():
      archive.writestr(key, value)


@pytest.mark.parametrize(
    "name, descr, shape",
    [
        ("data", "|u1", (2**40,)),
        ("data", "|u1", (-1,)),
        ("labels", "<i4", (2**40,)),
        ("classes", "<U0", (2**40,)),
    ],
)
def test_an_array_header_that_lies_is_refused(tmp_path, name, descr, shape):
  member = io.BytesIO()
  header = {"descr": descr, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(member, header)
  _npz_with(tmp_path / "a.npz", name, member.getvalue())
  with pytest.raises(UserError, match="a.npz: expected"):
    image_sets.NpzImages(tmp_path / "a.npz")


def test_an_index_that_points_out_of_the_file_is_refused(tmp_path):
  path = _npz(tmp_path / "a.npz")
  entry = path.read_bytes().index(b"PK\x01\x02")
  for field, value, fault in (
      (20, struct.pack("<II", 2**31, 2**31), "past the end"),
      (42, struct.pack("<I", 2**31), "where its index says"),
      (42, struct.pack("<I", 7), "where its index says"),
  ):
    data = bytearray(path.read_bytes())
    data[entry + field : entry + field + len(value)] = value
    (tmp_path / "b.npz").write_bytes(data)
    with pytest.raises(UserError, match=f"b.npz: .*{fault}"):
      image_sets.NpzImages(tmp_path / "b.npz")


def test_every_cut_npz_is_refused(tmp_path):
  whole = _npz(tmp_path / "a.npz").read_bytes()
  for size in range(0, len(whole), 29):
    (tmp_path / "b.npz").write_bytes(whole[:size])
    with pytest.raises(UserError, match="b.npz"):
      image_sets.NpzImages(tmp_path / "b.npz")


def test_random_damage_ends_in_a_user_error_or_in_images(tmp_path):
  whole = np.frombuffer(_npz(tmp_path / "a.npz").read_bytes(), np.uint8)
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(300):
    damaged = whole.copy()
    damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
    (tmp_path / "b.npz").write_bytes(damaged.tobytes())
    try:
      images = image_sets.NpzImages(tmp_path / "b.npz")
      for i in range(len(images)):
        images.__getitem__(i)
    except UserError:
      refused += 1
  assert refused > 30


def test_real_samples_have_their_classes(shared_data):
  cifar = image_sets.NpzImages(shared_data / "cifar10" / "train.npz")
  assert len(cifar) == 10_000 and cifar.classes[0] == "airplane"
  assert cifar[9_999]["image"].shape == (32, 32, 3)
  folder = image_sets.ImageFolder(shared_data / "imagenet" / "train")
  assert len(folder) == len(folder.classes) == 1000
  assert folder.record_id(0) == "n01440764/n01440764_0.JPEG"
  assert min(folder[999]["image"].shape[:2]) == 160
