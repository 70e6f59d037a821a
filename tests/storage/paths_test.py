"""Data in buckets: read as on a disk, copied once, and what goes wrong."""

from concurrent import futures
import datetime
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import types

import fsspec
from gcp_storage_emulator import server as emulator
import numpy as np
import pytest

from mcjepa_jax import check_data, convert_images, errors
from mcjepa_jax.data import sources
from mcjepa_jax.data.readers import image_files, video_files
from mcjepa_jax.data.sets import image_sets, record_sets, sequences
from mcjepa_jax.errors import UserError
from mcjepa_jax.evals import registry, submission
from mcjepa_jax.evals.adapters import submission_adapter
from mcjepa_jax.storage import paths
from tests.helpers import buckets, label_maps, layouts, mask_clips, tiny
from tests.helpers.repository import ROOT


class _Bucket:
  """A bucket of an emulator, and how often it was asked."""

  def __init__(self, address, store):
    self.address = address
    self.store = store
    self.requests = []

  def put(self, folder, place=""):
    """Returns the address of a local folder's copy."""
    address = f"{self.address}/{place}".rstrip("/")
    for path in sorted(folder.rglob("*")):
      if path.is_file():
        name = path.relative_to(folder).as_posix()
        self.store.pipe_file(f"{address}/{name}", path.read_bytes())
    return address


def _forget():
  paths._listings.clear()
  paths._listed_below.clear()


@pytest.fixture(scope="module")
def gs():
  """A bucket of gs://, in the environment of this and of later processes."""
  with buckets.emulated("b") as patch:
    bucket = _Bucket("gs://b", paths._store("gs"))
    handle = emulator.RequestHandler.do_GET

    def counted(handler):
      bucket.requests.append(handler.path)
      handle(handler)

    patch.setattr(emulator.RequestHandler, "do_GET", counted)
    yield bucket


@pytest.fixture(scope="module")
def data(tmp_path_factory, gs):
  """Every motion set: on the disk, and in the bucket."""
  path = tmp_path_factory.mktemp("data")
  layouts.write(path)
  return path, gs.put(path, "data")


def _same(one, other):
  assert len(one) == len(other) > 0
  for i in range(len(one)):
    assert one.record_id(i) == other.record_id(i)
    a, b = one[i], other[i]
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("name", layouts.TRAINED_ON)
def test_a_motion_source_reads_a_bucket_as_a_folder(data, name):
  _same(*(sources.motion(name, r, seed=0, size=(8, 8)) for r in data))


@pytest.mark.parametrize("name", layouts.EVALUATED)
def test_true_flow_reads_a_bucket_as_a_folder(data, name):
  _same(
      *(sources.flow_pairs(name, r, seed=0, size=(8, 8), count=1) for r in data)
  )


def test_own_pairs_read_a_bucket_as_a_folder(gs, tmp_path):
  for number, place in enumerate(("pairs/a", "pairs/deep/b")):
    layouts.image(tmp_path / f"{place}_img1.jpg", number)
    layouts.image(tmp_path / f"{place}_img2.png", number + 1)
    layouts.flow(tmp_path / f"{place}_flow.flo", number + 1)
  layouts.mask(tmp_path / "pairs/a_occ.png", 2)
  roots = tmp_path, gs.put(tmp_path, "own")
  read = [
      sources.flow_pairs("pairs", r, seed=0, size=(8, 8), count=1)
      for r in roots
  ]
  _same(*read)
  assert [read[1].record_id(i) for i in range(2)] == ["a", "deep_b"]
  assert "visible" in read[1][0]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, gs):
  """Every set with masks or label maps: on the disk, and in the bucket."""
  path = tmp_path_factory.mktemp("labelled")
  mask_clips.davis(path / "DAVIS", length=3)
  mask_clips.youtube_vos(path / "youtube_vos" / "train", length=3)
  label_maps.voc(path)
  label_maps.cityscapes(path)
  label_maps.ade20k(path)
  label_maps.camvid(path)
  return path, gs.put(path, "labelled")


@pytest.mark.parametrize("name", ["2016", "2017", "youtube_vos"])
def test_masks_are_read_from_a_bucket_as_from_a_folder(labelled, name):
  local, remote = (sources.mask_sequences(name, r) for r in labelled)
  _same(local, remote)
  one, other = local.sequence(0), remote.sequence(0)
  assert one.objects == other.objects and len(one) == len(other) == 3
  for i in range(3):
    np.testing.assert_array_equal(one.frame(i), other.frame(i))
    np.testing.assert_array_equal(one.labels(i), other.labels(i))


@pytest.mark.parametrize(
    "name", ["ade20k", "camvid", "cityscapes", "voc2012", "voc2012_aug"]
)
def test_label_maps_are_read_from_a_bucket_as_from_a_folder(labelled, name):
  parts = [sources.segmentation(name, r) for r in labelled]
  for local, remote in zip(*parts, strict=True):
    _same(local, remote)
    _same(local, pickle.loads(pickle.dumps(remote)))


@pytest.mark.parametrize("name", ["davis/2017", "segmentation/camvid"])
def test_evals_keep_in_the_cache_what_they_read(labelled, tmp_path, name):
  cfg = tiny.config(
      data_root=labelled[1], data_cache=str(tmp_path), evals=(name,)
  )
  assert registry.check(cfg) == []
  assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_the_frames_of_a_submission_are_kept_in_the_cache(
    data, tmp_path, monkeypatch
):
  monkeypatch.setattr(
      submission, "frames", lambda parts, *_, **__: parts["clean"]
  )
  cfg = tiny.config(data_root=data[1], data_cache=str(tmp_path))
  submission_adapter.examples(cfg, "sintel")[0]
  assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_what_a_set_in_a_bucket_lacks_is_named(gs, tmp_path):
  root = tmp_path / "DAVIS"
  mask_clips.davis(root, length=3)
  shutil.rmtree(root / "Annotations")
  label_maps.camvid(tmp_path)
  shutil.rmtree(tmp_path / "CamVid" / "trainannot")
  place = gs.put(tmp_path, "lacking")
  with pytest.raises(UserError, match="walk: expected a folder of masks, came"):
    sources.mask_sequences("2017", place).sequence(0)
  with pytest.raises(UserError, match="trainannot: expected a folder of files"):
    sources.segmentation("camvid", place)
  (root / "ImageSets/2017/val.txt").write_text("../../walk")
  place = gs.put(tmp_path, "escaping")
  with pytest.raises(UserError, match="val.txt: expected names of sequences"):
    sources.mask_sequences("2017", place)


def _lists(bucket):
  """The listings among the requests, and the other requests."""
  lists = [r for r in bucket.requests if "/o?" in r]
  others = [r for r in bucket.requests if "/o?" not in r]
  bucket.requests.clear()
  return lists, others


def test_a_set_is_listed_as_a_whole_and_a_file_is_one_request(gs, data):
  _forget()
  gs.requests.clear()
  pairs = sources.flow_pairs("sintel_clean", data[1], seed=0, size=(8, 8), count=1)  # fmt: skip
  lists, others = _lists(gs)
  # The data root, the candidate's folder, and all that is below it.
  assert len(lists) == 3 and not others
  for _ in range(2):
    pairs[0]  # without a cache read each time
    assert [len(r) for r in _lists(gs)] == [0, 3]
  sources.flow_pairs("sintel_final", data[1], seed=0, size=(8, 8), count=1)
  assert not gs.requests


def test_a_folder_on_a_disk_is_forgotten_beside_listed_buckets(data, tmp_path):
  sources.flow_pairs("sintel_clean", data[1], seed=0, size=(8, 8), count=1)
  listed = set(paths._listed_below)
  assert listed
  paths.forget_below(tmp_path)
  assert paths._listed_below == listed


@pytest.fixture
def images(tmp_path, gs, request):
  """Six images in two classes: on the disk, and in the bucket."""
  folder = tmp_path / "in"
  for i in range(6):
    layouts.image(folder / "ab"[i % 2] / f"{i}.png", i)
  return folder, gs.put(folder, request.node.name)


def test_the_cache_serves_what_was_read_before(gs, images, tmp_path):
  folder, address = images
  remote = paths.path(address, str(tmp_path / "cache"))
  before = image_sets.ImageFolder(remote)
  _same(image_sets.ImageFolder(folder), before)
  gs.store.rm(address, recursive=True)
  gs.requests.clear()
  _same(image_sets.ImageFolder(folder), before)
  # As a worker has it: it lists nothing.
  _forget()
  _same(image_sets.ImageFolder(folder), pickle.loads(pickle.dumps(before)))
  assert not gs.requests
  kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
  assert len(kept) == 6 and not any(p.suffix == ".part" for p in kept)


def test_readers_that_want_one_file_at_once_copy_it_once(gs, images, tmp_path):
  _, address = images
  path = paths.path(f"{address}/a/0.png", str(tmp_path / "cache"))
  path.stat()
  gs.requests.clear()
  with futures.ThreadPoolExecutor(4) as pool:
    copies = set(pool.map(paths.local, [path] * 4))
  assert copies == {path.copy} and len(gs.requests) == 1
  assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [
      path.copy
  ]


def test_a_copy_that_is_shorter_than_listed_is_not_kept(
    gs, images, tmp_path, monkeypatch
):
  _, address = images
  path = paths.path(f"{address}/a/0.png", str(tmp_path / "cache"))
  path.stat()
  store = paths._store("gs")
  monkeypatch.setattr(
      store,
      "get_file",
      lambda source, target, **_: pathlib.Path(target).write_bytes(b"x"),
  )
  with pytest.raises(paths.Unreachable, match="0.png: .* bytes, came 1"):
    paths.local(path)
  assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_store_that_does_not_answer_costs_no_converted_shard(
    images, tmp_path, monkeypatch, capsys
):
  _, address = images
  flags = f"--input={address}", f"--output={tmp_path / 'out'}", "--workers=1"
  assert convert_images.main([*flags, "--shards=2"]) == 0
  shards = sorted((tmp_path / "out").glob("*.array_record"))
  _no_waiting(monkeypatch)

  def down(*_, **__):
    raise OSError("down")

  monkeypatch.setattr(paths._store("gs"), "get_file", down)
  for more in ([], ["--skip-bad"]):
    assert convert_images.main([*flags, "--shards=2", *more]) == 2
    assert "cannot be read (OSError: down)" in capsys.readouterr().err
    assert sorted((tmp_path / "out").glob("*.array_record")) == shards


def test_a_store_that_does_not_answer_is_asked_once_by_a_check():
  asked = []

  def unreachable():
    asked.append(1)
    raise paths.Unreachable("gs://b/x: cannot be read")

  assert errors.collect(*[unreachable] * 3) == ["gs://b/x: cannot be read"]
  assert len(asked) == 1


def test_without_a_cache_no_image_is_kept(images):
  folder, address = images
  remote = paths.path(address)
  read = image_sets.ImageFolder(remote)
  _same(image_sets.ImageFolder(folder), read)
  assert not any(
      (read.root / read.record_id(i)).copy.exists() for i in range(6)
  )


def test_an_image_that_changed_is_not_served_from_the_cache(
    gs, images, tmp_path
):
  _, address = images
  cache = str(tmp_path / "cache")
  read = image_sets.ImageFolder(paths.path(address, cache))
  path = read.root / "a" / "0.png"
  kept = read.root / "a" / "2.png"
  for i in range(3):
    read[i]
  for copy in (path.copy, kept.copy):
    later = copy.stat().st_mtime + 60
    os.utime(copy, (later, later))
  layouts.image(tmp_path / "new.png", 99)
  new = (tmp_path / "new.png").read_bytes()
  assert len(new) == path.copy.stat().st_size
  gs.store.pipe_file(str(path), new)
  # Another clock: the copy is older than the change by its time alone.
  earlier = path.copy.stat().st_mtime - 120
  os.utime(path.copy, (earlier, earlier))
  _forget()
  again = image_sets.ImageFolder(paths.path(address, cache))
  assert again[0]["image"][0, 0, 0] == 99
  assert kept.copy.exists()
  # And another size, whatever the clocks say.
  gs.store.pipe_file(str(kept), new + b"more")
  os.utime(kept.copy, (later + 600, later + 600))
  _forget()
  image_sets.ImageFolder(paths.path(address, cache))
  assert not kept.copy.exists()


def test_no_name_in_a_bucket_leads_out_of_the_cache(monkeypatch, tmp_path):
  names = ("a/1.png", "../evil", "a/../../evil", "a//evil", "a/./evil", "c/")
  stamp = datetime.datetime.now(datetime.UTC)
  found = {
      f"b/set/{name}": dict(
          name=f"b/set/{name}", size=4, type="file", mtime=stamp
      )
      for name in names
  }
  # No emulator keeps such names.
  store = types.SimpleNamespace(find=lambda *_, **__: found)
  monkeypatch.setattr(paths, "_store", lambda scheme: store)
  root = paths.path("gs://b/set", str(tmp_path)).list_below()
  assert root.names().keys() == {"a", "c"}
  assert (root / "a").names().keys() == {"1.png"}
  for name in ("../../evil", "/etc/passwd", "..", "a" * 300):
    assert (root / name).copy.resolve().is_relative_to(tmp_path)


def test_containers_are_copied_once(gs, tmp_path):
  place = f"{gs.address}/containers"
  rng = np.random.default_rng(0)
  folder = tmp_path / "cifar-10-batches-bin"
  folder.mkdir()
  (folder / "batches.meta.txt").write_text("cat\ndog\n")
  rows = rng.integers(0, 2, (2, 3073), np.uint8)
  (folder / "test_batch.bin").write_bytes(rows.tobytes())
  for i in range(4):
    layouts.image(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", i)
  encoded = [p.read_bytes() for p in sorted((tmp_path / "images/a").iterdir())]
  (tmp_path / "cifar10").mkdir()
  np.savez(
      tmp_path / "cifar10" / "train.npz",
      data=np.frombuffer(b"".join(encoded), np.uint8),
      offsets=np.cumsum([0, *map(len, encoded)]),
      labels=np.array([1, 0]),
      classes=np.array(["cat", "dog"]),
  )
  convert_images.convert(
      source=tmp_path / "images",
      output=tmp_path / "imagenet_records" / "val",
      shards=2,
  )
  gs.put(tmp_path, "containers")
  gs.requests.clear()
  for name, count in (
      ("cifar10", 1),
      ("cifar10_bin_test", 2),
      ("imagenet_val_records", 3),
  ):
    local, remote = (
        sources.labelled(name, str(r), seed=0, size=8, count=1)
        for r in (tmp_path, place)
    )
    for _ in range(2):
      _same(local, remote)
    assert local.classes == remote.classes
    _same(local, pickle.loads(pickle.dumps(remote)))
    # Of each file one request: data, names of classes, manifest and shards.
    assert len(_lists(gs)[1]) == count


def test_a_tfds_set_is_read_from_a_bucket(gs, tmp_path):
  from tests.helpers import image_records

  image_records.tfds_folder(tmp_path / "imagenet2012" / "5.1.0")
  place = gs.put(tmp_path, "tfds")
  _same(
      *(
          sources.images("imagenet_tfds", str(r), seed=0, size=8)
          for r in (tmp_path, place)
      )
  )


def test_a_video_is_read_from_a_bucket(gs, tmp_path, monkeypatch):
  from tests.helpers import videos

  monkeypatch.setenv("MCJEPA_CACHE", str(tmp_path / "decoded"))
  folder = tmp_path / "video"
  (folder / "b").mkdir(parents=True)
  for name in ("a.avi", "b/c.avi"):
    videos.write_video(folder / name, videos.moving(5))
  place = gs.put(folder, "some/video")
  local = sequences.SequencePairs(video_files.videos(folder))
  _same(local, sequences.SequencePairs(video_files.videos(place)))
  gs.requests.clear()
  shutil.rmtree(paths.path(place).folder)
  # Once decoded, the video itself is not asked for.
  _same(local, sequences.SequencePairs(video_files.videos(place)))
  assert not gs.requests
  gs.store.pipe_file(f"{place}/cut.avi", (folder / "a.avi").read_bytes()[:-99])
  _forget()
  with pytest.raises(UserError, match=r"gs://b/some/video/cut.avi: .* cut one"):
    video_files.videos(place)


def test_images_of_a_bucket_are_converted(images, tmp_path):
  folder, address = images
  out = []
  for number, source in enumerate((folder, address)):
    flags = f"--input={source}", f"--output={tmp_path / str(number)}"
    assert convert_images.main([*flags, "--shards=2", "--workers=1"]) == 0
    out.append(record_sets.ConvertedImages(tmp_path / str(number)))
  _same(*out)


def _shards(gs, place):
  return {
      name: gs.store.cat_file(name)
      for name in gs.store.find(f"gs://b/{place}")
      if name.endswith(".array_record")
  }


def test_shards_in_a_bucket_are_those_on_a_disk_and_made_once(
    images, gs, tmp_path, capsys
):
  folder, address = images
  convert_images.convert(source=folder, output=tmp_path / "out", shards=3)
  expected = record_sets.ConvertedImages(tmp_path / "out")
  flags = [f"--input={address}", "--output=gs://b/out", "--shards=3"]
  assert convert_images.main([*flags, "--workers=1"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert report["shards"] == 3 and report["images"] == len(expected)
  _same(expected, record_sets.ConvertedImages("gs://b/out"))
  # One that is gone and one that is another's are written once more.
  shards = _shards(gs, "out")
  first, second, _ = sorted(shards)
  gs.store.rm_file(first)
  gs.store.pipe_file(second, b"x" * len(shards[second]))
  assert convert_images.main([*flags, "--workers=1"]) == 0
  assert json.loads(capsys.readouterr().out) == report
  _forget()
  _same(expected, record_sets.ConvertedImages("gs://b/out"))
  assert _shards(gs, "out").keys() == shards.keys()


@pytest.mark.slow
def test_processes_write_a_bucket_as_one_does(images, gs, tmp_path):
  folder, _ = images
  convert_images.convert(source=folder, output=tmp_path / "out", shards=2)
  convert_images.convert(
      source=folder, output="gs://b/two", shards=2, workers=2
  )
  _forget()
  _same(
      record_sets.ConvertedImages(tmp_path / "out"),
      record_sets.ConvertedImages("gs://b/two"),
  )


@pytest.mark.parametrize(
    "output, words",
    [
        ("s3://b/out", "expected a local folder or gs://BUCKET/FOLDER, got s3"),
        (
            "gs://nowhere/out",
            "gs://nowhere/out/conversion.json: cannot be writ",
        ),
        ("gs://b/images/out", "expected a folder outside of gs://b/images"),
        ("gs://b/images", "expected a folder outside of gs://b/images"),
        ("gs://b/data", "expected an empty folder or this conversion"),
    ],
)
def test_a_bucket_that_shards_cannot_be_written_to_is_told(
    gs, data, output, words, tmp_path, capsys
):
  layouts.image(tmp_path / "a.png", 0)
  source = gs.put(tmp_path, "images")
  assert convert_images.main([f"--input={source}", f"--output={output}"]) == 2
  assert words in capsys.readouterr().err


def test_a_file_of_many_parts_is_written_whole(gs, tmp_path):
  part, size = tmp_path / "part", 60 * 2**20  # gcsfs sends 50 MiB at a time
  data = np.random.default_rng(0).bytes(size)
  part.write_bytes(data)
  paths.put(part, paths.path("gs://b/large/whole"))
  assert gs.store.cat_file("gs://b/large/whole") == data
  assert not part.exists()
  paths.remove(paths.path("gs://b/large/whole"))
  assert not gs.store.exists("gs://b/large/whole")


def test_shards_that_cannot_be_copied_into_the_bucket_end_the_conversion(
    images, gs, capsys, monkeypatch
):
  def down(*_, **__):
    raise OSError("down")

  flags = [f"--input={images[1]}", "--output=gs://b/later", "--shards=2"]
  with monkeypatch.context() as patch:
    patch.setattr(paths._store("gs"), "put_file", down)
    assert convert_images.main([*flags, "--workers=1"]) == 2
  assert ".array_record: cannot be written (OSError: down)" in (
      capsys.readouterr().err
  )
  assert convert_images.main([*flags, "--workers=1"]) == 0


@pytest.mark.parametrize("root", ["gs://nowhere/data", "gs://b/nowhere"])
def test_a_bucket_or_folder_that_is_not_there_is_named(gs, root):
  with pytest.raises(UserError) as raised:
    sources.motion("sintel_clean", root, seed=0, size=(8, 8))
  assert f"data_root: expected a folder with files, got {root}" in str(
      raised.value
  )
  assert "gcloud auth application-default login" in str(raised.value)


def test_a_set_or_a_file_that_is_not_there_is_named(gs, data):
  with pytest.raises(UserError, match="^gs://b/data/NoSet: not found; expec"):
    paths.find(paths.path(data[1]), ("NoSet/a",), "*")
  for name in ("gs://b/data/a.png", "gs://nowhere/a.png"):
    with pytest.raises(
        UserError, match=f"^{name}: expected an image, came: no"
    ):
      image_files.read_image(name)


def test_a_file_deleted_after_the_listing_is_a_bad_record(gs, images):
  _, address = images
  read = image_sets.ImageFolder(address)
  gs.store.rm(f"{address}/a/0.png")
  with pytest.raises(
      UserError, match="a/0.png: expected an image, came"
  ) as error:
    read[0]
  assert not isinstance(error.value, paths.Unreachable)


@pytest.mark.parametrize(
    "address", ["ftp://b/data", "gs://", "file:///etc", "gs:///"]
)
def test_an_address_that_cannot_be_read_is_refused(address):
  with pytest.raises(
      UserError, match="expected a local path, gs://BUCKET/NAME"
  ):
    paths.path(address)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
  def no_package(*_, **__):
    raise ImportError("Install s3fs to access S3")

  paths._store.cache_clear()
  monkeypatch.setattr(fsspec, "filesystem", no_package)
  with pytest.raises(UserError, match="s3fs, which is not installed: pip inst"):
    paths.path("s3://somewhere/data").names()


def test_a_cache_that_takes_no_copy_is_named(images, tmp_path):
  cache = tmp_path / "cache"
  read = image_sets.ImageFolder(paths.path(images[1], str(cache)))
  cache.touch()
  with pytest.raises(paths.Unreachable, match=f"cannot be copied into {cache}"):
    read[0]


def _no_waiting(monkeypatch):
  async def sleep(_):
    pass

  from gcsfs import retry

  monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=sleep))


@pytest.mark.parametrize("failures, fails", [(3, False), (99, True)])
def test_a_failure_that_passes_is_tried_again(
    gs, images, monkeypatch, failures, fails
):
  _no_waiting(monkeypatch)
  handle, left = emulator.RequestHandler.do_GET, [failures]

  def failing(handler):
    left[0] -= 1
    if left[0] >= 0:
      handler.send_error(503)
    else:
      handle(handler)

  read = image_sets.ImageFolder(images[1])
  monkeypatch.setattr(emulator.RequestHandler, "do_GET", failing)
  if not fails:
    assert read[0]["image"].shape == (4, 6, 3)
    return
  with pytest.raises(paths.Unreachable, match="cannot be read .*; check the b"):
    read[0]


def test_a_store_that_is_out_of_reach_ends_the_stream(gs, images, monkeypatch):
  from mcjepa_jax.data.pipeline import batches

  _no_waiting(monkeypatch)
  read = image_sets.ImageFolder(images[1])
  source = batches.ContentSource("images", read)
  stream = batches.content_stream([source], batch_size=2, size=8, seed=0)
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")
  with pytest.raises(paths.Unreachable, match="cannot be read"):
    stream[0]


@pytest.mark.slow
def test_workers_read_a_bucket_without_a_cache(gs, images, tmp_path):
  from mcjepa_jax.data.pipeline import batches

  folder, address = images
  shards = tmp_path / "shards"
  convert_images.convert(source=folder, output=shards, shards=2)
  packed = gs.put(shards, "packed")
  read = []
  for images_root, shards_root, workers in (
      (folder, shards, 0),
      (address, packed, 1),
  ):
    mixed = [
        batches.ContentSource("a", image_sets.ImageFolder(images_root)),
        batches.ContentSource("b", record_sets.ConvertedImages(shards_root)),
    ]
    with batches.content_stream(
        mixed, batch_size=3, size=8, seed=0, num_workers=workers
    ) as stream:
      read.append([next(stream) for _ in range(4)])
  for local, remote in zip(*read, strict=True):
    assert local.records == remote.records and not remote.faults
    np.testing.assert_array_equal(local.arrays["views"], remote.arrays["views"])


def test_without_credentials_the_message_says_what_to_do(
    gs, monkeypatch, images
):
  def forbidden(handler):
    handler.send_response(401)
    handler.end_headers()
    handler.wfile.write(b'{"error": {"message": "Anonymous caller"}}')

  monkeypatch.setattr(emulator.RequestHandler, "do_GET", forbidden)
  with pytest.raises(paths.Unreachable) as raised:
    paths.path(f"{images[1]}/other").names()
  assert "Anonymous caller" in str(raised.value)
  assert "gcloud auth application-default login" in str(raised.value)


def test_a_set_in_a_bucket_is_checked(gs, tmp_path, capsys):
  from tests.helpers import faulty_flow

  place = gs.put(faulty_flow.write(tmp_path / "data"), "checked")
  flags = "--allow-partial", f"--output={tmp_path / 'panels'}"
  set_name = "--dataset=flow/sintel_clean"
  assert check_data.main([set_name, f"--root={place}", *flags]) == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert report["sources"]["flow/sintel_clean"]["count"] == 3
  assert check_data.main([set_name, "--root=gs://b/none", *flags]) == 2
  assert "--root: expected a folder with files" in capsys.readouterr().err


def test_a_cache_that_cannot_be_used_is_a_fault_of_the_config(tmp_path):
  from mcjepa_jax.training import validation

  (tmp_path / "file").touch()
  for cache, words in (
      ("gs://b/cache", "data_cache: expected a local folder"),
      (str(tmp_path / "file"), "data_cache: cannot write"),
  ):
    (fault,) = validation.faults(tiny.config(data_cache=cache))
    assert fault.startswith(words)
  assert not validation.faults(tiny.config(data_cache=str(tmp_path / "new")))


def test_who_reads_disks_alone_loads_no_package_of_stores():
  script = (
      "import sys, mcjepa_jax.data.sources as s;"
      "print([m for m in ('fsspec', 'gcsfs', 's3fs', 'aiohttp')"
      " if m in sys.modules])"
  )
  run = subprocess.run(
      [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
  )
  assert run.stdout.strip() == "[]", run.stderr


@pytest.fixture
def s3(monkeypatch):
  """A bucket of s3://."""
  from moto.moto_server import threaded_moto_server

  server = threaded_moto_server.ThreadedMotoServer(port=0, verbose=False)
  server.start()
  _, port = server.get_host_and_port()
  for name, value in {
      "AWS_ENDPOINT_URL": f"http://localhost:{port}",
      "AWS_ACCESS_KEY_ID": "key",
      "AWS_SECRET_ACCESS_KEY": "secret",
      "AWS_DEFAULT_REGION": "us-east-1",
  }.items():
    monkeypatch.setenv(name, value)
  paths._store.cache_clear()
  fsspec.get_filesystem_class("s3").clear_instance_cache()
  store = paths._store("s3")
  store.mkdir("s3://bucket")
  yield _Bucket("s3://bucket", store)
  server.stop()
  paths._store.cache_clear()


def test_s3_is_listed_and_read(s3, tmp_path):
  layouts.write(tmp_path / "data")
  place = s3.put(tmp_path / "data")
  roots = tmp_path / "data", paths.path(place, str(tmp_path / "cache"))
  for name in ("sintel_clean", "flying_chairs"):
    _same(*(sources.motion(name, r, seed=0, size=(8, 8)) for r in roots))
    read = [
        sources.flow_pairs(name, r, seed=0, size=(8, 8), count=1) for r in roots
    ]
    _same(*read)
  s3.store.rm(place, recursive=True)
  _same(*read)
  _forget()
  with pytest.raises(UserError, match="where nothing is: no such bucket or"):
    sources.motion("sintel_clean", "s3://nowhere/x", seed=0, size=(8, 8))
  with pytest.raises(
      UserError, match="s3://bucket/a.png: expected an image, came:"
  ):
    image_files.read_image("s3://bucket/a.png")


_STEPS = 20
_CONFIG = f"""
from configs import quickstart
from tests.helpers import tiny

def get_config():
  config = tiny.config(
      quickstart, num_steps={_STEPS}, workers=1, log_every=1, log_records=True,
      motion__sources=(("sintel_clean", 1.0), ("frames", 1.0)),
      content__sources=(("images", 1.0), ("records", 1.0)),
  )
  return config.lock()
"""


@pytest.mark.proof
@pytest.mark.slow
def test_a_run_on_a_bucket_is_the_run_on_the_folder(gs, tmp_path):
  for scene in ("a", "b"):
    place = tmp_path / "data" / "MPI-Sintel" / "training"
    for number in range(1, 5):
      name = f"{scene}/frame_{number:04d}"
      tiny.save_image(place / "clean" / f"{name}.png", seed=number)
      frame = tmp_path / "data" / "frames" / f"{name}.png"
      layouts.image(frame, 8 * number, size=(40, 48))
      if number < 4:
        layouts.flow(place / "flow" / f"{name}.flo", size=(40, 48))
  for number in range(12):
    image = tmp_path / "data" / "images" / f"{number}.png"
    tiny.save_image(image, seed=number)
  convert_images.convert(
      source=tmp_path / "data" / "images",
      output=tmp_path / "data" / "records",
      shards=2,
  )
  config = tmp_path / "configs" / "remote.py"
  config.parent.mkdir()
  config.write_text(_CONFIG)
  address = gs.put(tmp_path / "data", "train")
  losses, records = [], []
  for name, root, cache in (
      ("local", tmp_path / "data", ""),
      ("remote", address, tmp_path / "cache"),
  ):
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mcjepa_jax.main", f"--config={config}"),
            f"--workdir={tmp_path / name}",
            f"--config.data_root={root}",
            f"--config.data_cache={cache}",
        ],
        env=os.environ
        | {
            "XLA_FLAGS": "",
            "PYTHONPATH": str(ROOT),
            "MCJEPA_CACHE": str(tmp_path / "thumbnails"),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    read = {
        kind: [
            json.loads(line)
            for line in (tmp_path / name / kind).read_text().splitlines()
        ]
        for kind in ("metrics.jsonl", "records.jsonl", "quarantine.jsonl")
        if (tmp_path / name / kind).exists()
    }
    assert not read.get("quarantine.jsonl")
    losses.append([line["loss"] for line in read["metrics.jsonl"]])
    records.append(read["records.jsonl"])
  assert len(losses[0]) == len(records[0]) == _STEPS
  assert np.isfinite(losses[0]).all()
  assert losses[0] == losses[1]
  assert records[0] == records[1]
  assert any((tmp_path / "cache").rglob("*"))
