"""The formats that are fuzzed: whole files of each, their readers, their cases."""

from collections.abc import Callable
import io
import json
import pathlib
import re
import tempfile
from typing import NamedTuple
import zlib

from array_record.python import array_record_module
import cv2
import h5py
import numpy as np
from PIL import Image

from benchmarks import fuzz_mutations as mutations
from mcjepa_jax.data.readers import (
    array_records,
    flow_files,
    image_files,
    video_files,
)
from mcjepa_jax.data.sets import (
    flow_sets,
    image_sets,
    mask_sets,
    record_sets,
    segmentation_sets,
)

Files = dict[str, bytes]  # by their names in one folder

_SIZE = (24, 32)
_MAX_REAL = 2**17  # bytes: a larger file is mostly pixels, and slow
_REAL = 4  # files of each format
# Bytes that a decoded pixel takes while it is decoded, in all copies.
_PIXEL_BYTES = 16
_SMALLEST_SHARD = 2**16  # ArrayRecord pads so far
_TFDS_SHARD = "fuzz-train.array_record-00000-of-00001"
_EBML = b"\x1a\x45\xdf\xa3"
# The numbers that FFmpeg draws for a file and its track, and their checksums.
_MATROSKA_RANDOM = re.compile(
    rb"(?<=\x73\xa4\x90).{16}|(?<=[\x63\x73]\xc5\x88).{8}|(?<=\xbf\x84).{4}",
    re.DOTALL,
)


class Format(NamedTuple):
  """How files of a format are made, damaged and read.

  A reader raises UserError, or AssertionError where what it read is not well
  formed. Reading takes at most `floor` bytes of memory, and `bytes_per_byte` for
  each byte of the case.
  """

  make: Callable[[], list[Files]]
  read: Callable[[pathlib.Path], None]
  bytes_per_byte: int
  damage: mutations.Damage = mutations.damaged
  suffixes: tuple[str, ...] = ()  # of real files
  seal: Callable[[Files, np.random.Generator], Files] | None = None
  floor: int = 24 * 2**20  # decoders' tables and threads, Python's own


def _photograph(seed: int = 0, size: tuple[int, int] = _SIZE) -> np.ndarray:
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (4, 5, 3), np.uint8)
  return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def _encoded(kind: str, *, mode: str = "RGB", seed: int = 0, **options):
  file = io.BytesIO()
  Image.fromarray(_photograph(seed)).convert(mode).save(file, kind, **options)
  return file.getvalue()


def _images(kind: str, *variants: dict) -> Callable[[], list[Files]]:
  name = f"a.{kind.lower()}"
  return lambda: [{name: _encoded(kind, **options)} for options in variants]


def _only_file(folder: pathlib.Path) -> pathlib.Path:
  (path,) = folder.iterdir()
  return path


def _check_image(image: np.ndarray) -> None:
  assert image.dtype == np.uint8 and image.ndim == 3, image.dtype
  assert image.shape[2] == 3 and image.size, image.shape


def _read_image(folder: pathlib.Path) -> None:
  path = _only_file(folder)
  _check_image(image_files.read_image(path))
  # A smaller decode is another path through the decoders.
  _check_image(image_files.read_image(path, min_side=8))


def _flow() -> tuple[np.ndarray, np.ndarray]:
  flow = np.random.default_rng(0).normal(0, 9, (*_SIZE, 2)).astype(np.float32)
  valid = np.ones((*_SIZE, 1), np.float32)
  valid[:3] = 0
  return flow, valid


def _written(name: str, *writers: Callable[[pathlib.Path], None]):
  """Returns what each of the writers puts into a file of that name."""

  def make() -> list[Files]:
    made = []
    for writer in writers:
      with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        writer(path)
        made.append({name: path.read_bytes()})
    return made

  return make


def _check_flow(flow: np.ndarray, valid: np.ndarray) -> None:
  assert flow.dtype == valid.dtype == np.float32
  assert flow.ndim == 3 and flow.shape[2] == 2 and flow.size, flow.shape
  assert valid.shape == (*flow.shape[:2], 1), valid.shape
  assert np.isfinite(flow).all() and np.isin(valid, (0, 1)).all()
  assert not (flow * (1 - valid)).any()


def _read_flow(folder: pathlib.Path) -> None:
  _check_flow(*flow_files.read_flow(_only_file(folder)))


def _flo5(
    libver: str = "earliest", **options
) -> Callable[[pathlib.Path], None]:
  def write(path: pathlib.Path) -> None:
    with h5py.File(path, "w", libver=libver) as store:
      store.create_dataset("flow", data=_flow()[0], **options)

  return write


def _npz_flow(save: Callable) -> Callable[[pathlib.Path], None]:
  u, v = np.moveaxis(_flow()[0], -1, 0)
  return lambda path: save(path, u=u, v=v.astype(np.float64))


def _npz_images(path: pathlib.Path) -> None:
  files = [_encoded(kind) for kind in ("JPEG", "PNG", "WEBP")]
  ends = np.cumsum([0, *map(len, files)])
  data = np.frombuffer(b"".join(files), np.uint8)
  classes = np.array(["cat", "dog"])
  np.savez(path, data=data, offsets=ends, labels=[0, 1, 1], classes=classes)


def _check_set(images) -> None:
  """Reads some of a set of images, whose labels must be of its classes."""
  assert len(images) > 0
  for i in range(min(len(images), 4)):
    example = images[i]
    _check_image(example["image"])
    assert isinstance(images.record_id(i), str)
    assert ("label" in example) == bool(images.classes)
    assert 0 <= example.get("label", 0) < max(len(images.classes), 1)


def _binary(side: int, names: Files) -> Callable[[], list[Files]]:
  rows = np.random.default_rng(0).integers(0, 256, (2, 3 * side**2), np.uint8)
  label = b"\1" if "batches.meta.txt" in names else b""
  data = b"".join(label + row.tobytes() for row in rows)
  return lambda: [{k: v or data for k, v in names.items()}]


def _records(records: list[bytes], options: str) -> bytes:
  with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/shard"
    writer = array_record_module.ArrayRecordWriter(path, options)
    for record in records:
      writer.write(record)
    writer.close()
    return pathlib.Path(path).read_bytes()


def _converted() -> list[Files]:
  images = [_encoded(kind) for kind in ("JPEG", "PNG")]
  made = []
  for options in (array_records.WRITE_OPTIONS, "group_size:2,uncompressed"):
    records = [array_records.pack(i, f"{i}", x) for i, x in enumerate(images)]
    name = array_records.shard_name(0, 1)
    shard = {"name": name, "records": 2, "bytes": 0}
    manifest = {"count": 2, "classes": ["cat", "dog"], "shards": [shard]}
    manifest |= {"format": array_records.FORMAT, "skipped": []}
    text = json.dumps(manifest).encode()
    files = {name: _records(records, options), array_records.MANIFEST: text}
    made.append(_sealed(files, None))
  return made


def _sealed(files: Files, rng: np.random.Generator | None) -> Files:
  """Returns a manifest with a checksum, and but for some cases sizes, that fit."""
  text = files[array_records.MANIFEST]
  try:
    manifest = json.loads(text)
    manifest.pop("checksum", None)
    if rng is None or rng.random() < 0.8:
      for shard in manifest["shards"]:
        if shard["name"] in files:
          shard["bytes"] = len(files[shard["name"]])
    manifest["checksum"] = array_records.digest(manifest)
    text = json.dumps(manifest).encode()
  # What is no such manifest any more is tried as it is.
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    pass
  return files | {array_records.MANIFEST: text}


def _damage_records(data: bytes, rng: np.random.Generator) -> bytes:
  """Damages JSON, or a shard's records under checksums that are right."""
  if data[:1] in (b"{", b"["):
    return json.dumps(mutations.odd_value(json.loads(data), rng)).encode()
  if len(data) < _SMALLEST_SHARD:
    return mutations.damaged(data, rng)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "shard")
    path.write_bytes(data)
    records = array_record_module.ArrayRecordReader(str(path)).read_all()
  i = int(rng.integers(len(records)))
  record = records[i]
  if record[:4] == b"MCJ1" and rng.random() < 0.8:
    record = record[:8] + mutations.damaged(record[8:], rng)
    crc = zlib.crc32(record[8:]).to_bytes(4, "little")
    records[i] = record[:4] + crc + record[8:]
  else:
    records[i] = mutations.damaged(record, rng)
  if rng.random() < 0.1:
    records[i] = bytes(2**22)
  ours = array_records.WRITE_OPTIONS
  options = (ours, ours, ours, "group_size:1", "group_size:9")
  return _records(records, mutations.pick(rng, options))


def _read_converted(folder: pathlib.Path) -> None:
  # It holds files open, by their path.
  array_records._reader.cache_clear()
  _check_set(record_sets.ConvertedImages(folder))


def _prepared() -> list[Files]:
  import tensorflow_datasets as tfds
  from tensorflow_datasets.proto import tf_example_pb2

  features = tfds.features.FeaturesDict(
      {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(names=["cat", "dog"]),
      }
  )
  records = []
  for label, kind in enumerate(("JPEG", "PNG")):
    example = {"image": _encoded(kind), "label": label}
    packed = features.serialize_example(example)
    # A map has another order in each process.
    parsed = tf_example_pb2.Example.FromString(packed)
    records.append(parsed.SerializeToString(deterministic=True))
  split = {
      "name": "train",
      "shardLengths": ["2"],
      "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
  }
  info = {"name": "fuzz", "version": "1.0.0", "fileFormat": "array_record"}
  with tempfile.TemporaryDirectory() as folder:
    features.save_config(folder)
    files = {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}
  files[_TFDS_SHARD] = _records(records, "group_size:1")
  files["dataset_info.json"] = json.dumps(info | {"splits": [split]}).encode()
  return [files]


def _read_prepared(folder: pathlib.Path) -> None:
  array_records._reader.cache_clear()
  _check_set(record_sets.TfdsImages(folder, "train"))


def _chairs() -> list[Files]:
  with tempfile.TemporaryDirectory() as folder:
    flow_files.write_flo(path := pathlib.Path(folder, "a.flo"), *_flow())
    flow = path.read_bytes()
  files = {"FlyingChairs_train_val.txt": b"1\n2\n1\n"}
  for i in range(1, 4):
    image = _encoded("PPM", seed=i)
    files |= {f"0000{i}_img1.ppm": image, f"0000{i}_img2.ppm": image}
    files[f"0000{i}_flow.flo"] = flow
  return [files]


def _damage_chairs(data: bytes, rng: np.random.Generator) -> bytes:
  if len(data) < 64 and rng.random() < 0.5:
    lines = ("1", "2", "1", "2", "3", "0", "11", "../1", "\u0661", "1\0", "")
    ends = ("\n", "\r\n", " ", "\r", "\v")
    text = [mutations.pick(rng, lines) for _ in range(int(rng.integers(2, 5)))]
    return (mutations.pick(rng, ends).join(text)).encode()
  return mutations.damaged(data, rng)


def _read_chairs(folder: pathlib.Path) -> None:
  count = 0
  for split in ("training", "validation"):
    pairs = flow_sets.flying_chairs(folder, split)
    count += len(pairs)
    for i in range(len(pairs)):
      example = pairs[i]
      _check_image(example["frame_1"])
      _check_flow(example["flow"], example["valid"])
  assert count == 3, count


def _video(code: str) -> Callable[[pathlib.Path], None]:
  def write(path: pathlib.Path) -> None:
    fourcc = cv2.VideoWriter.fourcc(*code)
    size = (64, 48)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, fourcc, 25, size)
    assert writer.isOpened(), code
    for t in range(5):
      writer.write(np.roll(_photograph(size=size[::-1]), 2 * t, axis=1))
    writer.release()
    data = path.read_bytes()
    if data.startswith(_EBML):
      data = _MATROSKA_RANDOM.sub(lambda found: bytes(len(found[0])), data)
      path.write_bytes(data)

  return write


def _read_video(folder: pathlib.Path) -> None:
  path = _only_file(folder)
  cache = folder / "cache"
  frames = video_files.VideoFrames(path, cache_dir=cache, progress=False)
  assert len(frames) > 0 and frames.thumbnails().shape == (
      *(len(frames), 32, 32, 3),
  )
  for i in (0, -1):
    _check_image(frames.frame(i))


def _image_format(kind: str, *variants: dict, **fields) -> Format:
  ratio = _PIXEL_BYTES * image_files._PIXELS_PER_BYTE[kind]
  return Format(_images(kind, *variants), _read_image, ratio, **fields)


def _label_format(
    read: Callable[[pathlib.Path], np.ndarray], *modes: str
) -> Format:
  def check(folder: pathlib.Path) -> None:
    labels = read(_only_file(folder))
    assert labels.dtype == np.uint8 and labels.ndim == 2 and labels.size

  make = _images("PNG", *({"mode": mode} for mode in modes))
  return Format(make, check, _ANY_IMAGE, damage=mutations.png)


def _flow_format(suffix: str, ratio: int, *writers, **fields) -> Format:
  return Format(_written(f"a{suffix}", *writers), _read_flow, ratio, **fields)


# A float and its copies; deflated, of 2 bytes and more.
_FLOAT = 8
_DEFLATED_FLOAT = _FLOAT * image_files.DEFLATE_RATIO
# A set of images holds images of any format.
_ANY_IMAGE = _PIXEL_BYTES * max(image_files._PIXELS_PER_BYTE.values())
# FFmpeg makes a decoder's tables, a byte a pixel, for what MPEG-4's own header
# claims (8191x8191 at most), before the size that it read can be checked.
_VIDEO = _PIXEL_BYTES * video_files._PIXELS_PER_BYTE
# FFmpeg allocates what an element claims, up to 256 MB (libavformat/
# matroskadec.c, max_lengths in ebml_parse_elem), before it looks for it.
_MATROSKA = 2**28 + 24 * 2**20

FORMATS = {
    "jpeg": _image_format(
        "JPEG",
        {},
        {"progressive": True, "subsampling": 0},
        {"mode": "L"},
        {"mode": "CMYK", "restart_marker_blocks": 2},
        damage=mutations.jpeg,
        suffixes=(".jpg", ".jpeg"),
    ),
    "png": _image_format(
        "PNG",
        *({"mode": mode} for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        damage=mutations.png,
        suffixes=(".png",),
    ),
    "ppm": _image_format("PPM", {}, {"mode": "L"}, suffixes=(".ppm",)),
    "webp": _image_format(
        "WEBP",
        {},
        {"lossless": True},
        {"mode": "RGBA"},
        damage=mutations.riff,
        suffixes=(".webp",),
    ),
    "bmp": _image_format(
        "BMP", {}, {"mode": "P"}, {"mode": "1"}, suffixes=(".bmp",)
    ),
    "flo": _flow_format(
        ".flo",
        _FLOAT,
        lambda path: flow_files.write_flo(path, *_flow()),
        suffixes=(".flo",),
    ),
    "pfm": _flow_format(
        ".pfm",
        _FLOAT,
        lambda path: flow_files.write_pfm(path, *_flow()),
        suffixes=(".pfm",),
    ),
    "kitti_png": _flow_format(
        ".png",
        _DEFLATED_FLOAT,
        lambda path: flow_files.write_kitti_flow(path, *_flow()),
        damage=mutations.png,
    ),
    "flo5": _flow_format(
        ".flo5",
        _DEFLATED_FLOAT,
        _flo5(),
        _flo5(compression="gzip"),
        _flo5(compression="gzip", shuffle=True, chunks=(7, 9, 1)),
        _flo5(compression="gzip", libver="latest"),
    ),
    "npy": _flow_format(
        ".npy",
        _FLOAT,
        lambda path: np.save(path, _flow()[0]),
        damage=mutations.npy,
    ),
    "npz": _flow_format(
        ".npz",
        _DEFLATED_FLOAT,
        _npz_flow(np.savez),
        _npz_flow(np.savez_compressed),
        damage=mutations.npz,
    ),
    "npz_images": Format(
        _written("a.npz", _npz_images),
        lambda folder: _check_set(image_sets.NpzImages(_only_file(folder))),
        _ANY_IMAGE,
        damage=mutations.npz,
    ),
    "cifar": Format(
        _binary(
            32, {"test_batch.bin": b"", "batches.meta.txt": b"cat\ndog\n\n"}
        ),
        lambda folder: _check_set(image_sets.cifar10_binary(folder, "test")),
        _FLOAT,
    ),
    "stl": Format(
        _binary(
            96,
            {
                "test_X.bin": b"",
                "test_y.bin": b"\1\2",
                "class_names.txt": b"cat\ndog\n",
            },
        ),
        lambda folder: _check_set(image_sets.stl10_binary(folder, "test")),
        _FLOAT,
    ),
    "mask": _label_format(mask_sets.read_labels, "P", "1"),
    "label_map": _label_format(
        lambda path: segmentation_sets.read_label_map(path, _SIZE),
        *("P", "L"),
    ),
    "records": Format(
        _converted,
        _read_converted,
        _ANY_IMAGE,
        damage=_damage_records,
        seal=_sealed,
    ),
    "tfds": Format(
        _prepared, _read_prepared, _ANY_IMAGE, damage=_damage_records
    ),
    "chairs": Format(_chairs, _read_chairs, _FLOAT, damage=_damage_chairs),
    "avi": Format(
        _written("a.avi", _video("MJPG"), _video("XVID")),
        _read_video,
        _VIDEO,
        damage=mutations.riff,
    ),
    "mp4": Format(
        _written("a.mp4", _video("mp4v")),
        _read_video,
        _VIDEO,
        damage=mutations.mp4,
    ),
    "mkv": Format(
        _written("a.mkv", _video("mp4v")),
        _read_video,
        _VIDEO,
        floor=_MATROSKA,
    ),
}


def seeds(name: str, data_root: str = "") -> list[Files]:
  """Returns whole files of a format, and small real ones where there are any."""
  kind = FORMATS[name]
  made = kind.make()
  found = sorted(pathlib.Path(data_root).rglob("*")) if data_root else []
  found = [p for p in found if p.suffix.lower() in kind.suffixes]
  found = [p for p in found if p.is_file() and p.stat().st_size <= _MAX_REAL]
  (suffix,) = {pathlib.Path(next(iter(f))).suffix for f in made[:1]}
  for path in found[:: max(len(found) // _REAL, 1)][:_REAL]:
    made.append({f"a{suffix}": path.read_bytes()})
  return made


def case(name: str, whole: list[Files], seed: int, number: int) -> Files:
  """Returns the files of a case; the first are whole, as `seeds` gave them."""
  if number < len(whole):
    return whole[number]
  kind = FORMATS[name]
  rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
  files = mutations.pick(rng, whole)
  file = mutations.pick(rng, sorted(files))
  turn = rng.random()
  if turn < 0.1:
    other = mutations.pick(rng, whole)
    other = other.get(file) or mutations.pick(rng, list(other.values()))
    data = mutations.splice(files[file], other, rng)
  else:
    data = files[file]
    if turn > 0.4:
      data = kind.damage(data, rng)
    if turn < 0.4 or turn > 0.9:
      data = mutations.damaged(data, rng)
  files = files | {file: data}
  return kind.seal(files, rng) if kind.seal else files
