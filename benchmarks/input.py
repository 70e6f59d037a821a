"""Speed of the input pipeline against plain Pillow and the bare decode.

  python -m benchmarks.input --json=PATH [--only=content] [--repeats=N]

Without --data_root it makes its own images: 1/f spectrum, photographs' bytes a
pixel. A worker is pinned to one core and the reader to another, where there are
two. Rates are the best of N turns; ours and the reference take turns, so that a
busy machine slows both. A target is the least ratio ours / reference of a rate,
and the largest of anything else; the exit code is 1 if a row misses its own.
"""

from collections.abc import Callable, Iterable
import importlib.metadata
import io
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

from absl import app, flags
import cv2
import grain
import numpy as np
import PIL
from PIL import Image
import psutil
import simplejpeg
import tqdm

from benchmarks import report
from mcjepa_jax.data import sources
from mcjepa_jax.data.pipeline import batches, geometry, stream

_JSON = flags.DEFINE_string("json", None, "Where to write the rows.")
_ONLY = flags.DEFINE_string("only", "", "Part of the name of what is measured.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Turns of each form.")
_RECORDS = flags.DEFINE_integer(
    "records", 10_000, "Images over which a worker's memory must not grow."
)
_ROOT = flags.DEFINE_string("data_root", "", "Data sets, in their layouts.")

_SIZE = 224  # of a view
_BATCH = 64  # images
_PAIRS = 8  # of a batch
# ImageNet's mean file is 110 KB for some 500x375 pixels, mostly without chroma
# subsampling.
_BYTES_PER_PIXEL = 0.6
_COUNT = 96  # files of each kind made
# Set, its files, size of a frame that is made, size of a crop.
_PAIR_SETS = {
    "pairs_sintel": (
        "sintel_clean",
        "MPI-Sintel/training/clean/*/*.png",
        (436, 1024),
        (384, 832),
    ),
    "pairs_chairs": (
        "flying_chairs",
        "FlyingChairs_release/data/*.ppm",
        (384, 512),
        (320, 448),
    ),
}


def photograph(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
  """An image u8[h w 3] with amplitudes that fall as 1 / frequency."""
  frequency = np.hypot(
      np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
  )
  amplitude = 1 / np.maximum(frequency, 1 / max(height, width))
  noise = rng.normal(size=(2, 3, *amplitude.shape))
  planes = np.fft.irfft2(
      (noise[0] + 1j * noise[1]) * amplitude, s=(height, width)
  )
  planes /= planes.std(axis=(1, 2), keepdims=True)
  # Brightness varies more than colour.
  mix = np.array([[40, 12, 4], [40, 0, -8], [40, -12, 4]])
  image = np.tensordot(mix, planes, 1) + 115
  return np.clip(image, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def _jpeg(image: np.ndarray) -> bytes:
  """The finest JPEG with at most a photograph's bytes a pixel."""
  limit = _BYTES_PER_PIXEL * image.shape[0] * image.shape[1]
  for quality in range(96, 50, -2):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    if file.tell() <= limit:
      break
  return file.getvalue()


def make_data(root: pathlib.Path, only: str = "") -> None:
  """Writes images in the layouts of ImageNet, MPI-Sintel and FlyingChairs."""
  rng = np.random.default_rng(0)
  folders = {
      "content": root / "imagenet" / "train" / "n00000001",
      "pairs_sintel": root / "MPI-Sintel" / "training" / "clean" / "made_1",
      "pairs_chairs": root / "FlyingChairs_release" / "data",
  }
  for name in folders:
    if name.startswith("pairs") and only not in name:
      continue
    folders[name].mkdir(parents=True)
    bar = tqdm.trange(_COUNT if name == "content" else 24, desc=f"made: {name}")
    for i in bar:
      if name == "content":
        encoded = _jpeg(photograph(375, 500, rng))
        (folders[name] / f"n00000001_{i}.JPEG").write_bytes(encoded)
        continue
      image = Image.fromarray(photograph(*_PAIR_SETS[name][2], rng))
      file = (
          f"frame_{i + 1:04d}.png"
          if name == "pairs_sintel"
          else f"{i // 2 + 1:05d}_img{i % 2 + 1}.ppm"
      )
      image.save(folders[name] / file)


class Pinned:
  """A data set, repeated, whose worker stays on the given cores."""

  def __init__(self, dataset: Any, cores: set[int]):
    self._dataset = dataset
    self._cores = cores
    self._parent = os.getpid()

  def __len__(self) -> int:
    # As long as ImageNet: Grain's shuffle takes 3 ms an index of 12.
    return 2**20

  def record_id(self, index: int) -> str:
    """Returns the record's own name."""
    return self._dataset.record_id(index % len(self._dataset))

  def __getitem__(self, index: int) -> Any:
    if os.getpid() != self._parent:
      _pin(self._cores)
    return self._dataset[index % len(self._dataset)]


def _pin(cores: set[int]) -> None:
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, cores)


def _cores() -> list[int]:
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count()))


class PillowFiles:
  """The files of a folder set, as Pillow opens them."""

  def __init__(self, folder: Any):
    self._folder = folder

  def __len__(self) -> int:
    return len(self._folder)

  def __getitem__(self, index: int) -> Image.Image:
    path = self._folder.root / self._folder.record_id(index)
    return Image.open(path).convert("RGB")

  def record_id(self, index: int) -> str:
    """Returns the folder's own name of the record."""
    return self._folder.record_id(index)


def pillow_views(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
  """The two views of geometry.two_views, cut by Pillow from the same draws."""
  views = []
  for _ in range(2):
    box = geometry.random_box(image.height, image.width, rng)
    top, left, height, width = box
    view = image.crop((left, top, left + width, top + height))
    view = view.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
      view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    views.append(np.asarray(view))
  return np.stack(views)


def _pillow_element(index: int, image: Image.Image) -> np.ndarray:
  return pillow_views(image, np.random.default_rng(index))


def _pillow_batch(views: list[np.ndarray]) -> stream.TaskBatch:
  return stream.TaskBatch({"views": np.concatenate(views)}, [], [])


def pillow_stream(dataset: Any, num_workers: int) -> stream.Stream:
  """The content stream with nothing but Pillow in it."""
  examples = (
      grain.MapDataset.source(dataset)
      .shuffle(seed=0)
      .repeat()
      .map_with_index(_pillow_element)
      .batch(_BATCH, drop_remainder=True, batch_fn=_pillow_batch)
  )
  return stream.Stream(
      examples, {"stream": "Pillow content"}, num_workers=num_workers
  )


def content_stream(dataset: Any, num_workers: int) -> stream.Stream:
  """Ours."""
  source = batches.ContentSource("images", dataset)
  return batches.content_stream(
      [source], batch_size=_BATCH, size=_SIZE, seed=0, num_workers=num_workers
  )


def _children_seconds() -> float:
  """CPU time of the worker processes so far."""
  used = [process.cpu_times() for process in psutil.Process().children()]
  return sum(times.user + times.system for times in used)


def _rate(
    source: stream.Stream, rows: int, num_batches: int
) -> tuple[float, float]:
  """(rows a second, minus the CPU seconds a row), with the queues used up.

  Both are better when larger. The second is hardly touched by a busy machine.
  """
  for _ in range(8):
    next(source)
  start, used = time.perf_counter(), _children_seconds()
  for _ in range(num_batches):
    next(source)
  count = num_batches * rows
  rate = count / (time.perf_counter() - start)
  return rate, (used - _children_seconds()) / count


def _seconds(program: Callable[[int], Any], count: int) -> float:
  """Seconds a call, over calls with 0, 1, ..."""
  start = time.perf_counter()
  for i in range(count):
    program(i)
  return (time.perf_counter() - start) / count


def _row(
    name: str,
    shape: tuple[int, ...],
    ours: float,
    reference: float,
    reference_name: str,
    unit: str,
    target: float | None = None,
) -> dict[str, Any]:
  ratio = ours / reference
  passed = target is None or (
      ratio >= target if unit.endswith("/s") else ratio <= target
  )
  return {
      "name": name,
      "shape": list(shape),
      "ours": ours,
      "reference": reference,
      "reference_name": reference_name,
      "unit": unit,
      "ratio": ratio,
      "target": target,
      "passed": passed,
  }


def _on_core(function: Callable[..., Any], core: int, *arguments: Any) -> Any:
  """The result of the function in a process of its own on one core."""
  context = multiprocessing.get_context("spawn")
  with context.Pool(1, _start_on_core, (core,)) as pool:
    return pool.apply(function, arguments)


def _start_on_core(core: int) -> None:
  _pin({core})
  cv2.setNumThreads(0)


def content_parts(folder: Any, repeats: int) -> dict[str, tuple[float, float]]:
  """Seconds an image of each part: ours, Pillow's; the least of the repeats."""
  files = PillowFiles(folder)
  count = min(len(folder), _COUNT)
  arrays = [folder[i]["image"] for i in range(count)]
  pictures = [files[i] for i in range(count)]
  views = [np.zeros((2, _SIZE, _SIZE, 3), np.uint8)] * _BATCH
  programs = {
      "decode": (lambda i: folder[i], lambda i: files[i]),
      "resize": (
          lambda i: geometry.two_views(
              arrays[i], np.random.default_rng(i), size=_SIZE
          ),
          lambda i: pillow_views(pictures[i], np.random.default_rng(i)),
      ),
      "copies": (lambda i: np.concatenate(views) if i % _BATCH == 0 else None,)
      * 2,
  }
  least = {name: [float("inf")] * 2 for name in programs}
  for _ in range(repeats):
    for name, forms in programs.items():
      for k, form in enumerate(forms):
        least[name][k] = min(least[name][k], _seconds(form, count))
  return {name: tuple(values) for name, values in least.items()}


def content_differences(folder: Any, count: int) -> np.ndarray:
  """Mean absolute difference from Pillow of each view, of 255."""
  files = PillowFiles(folder)
  differences = []
  for i in range(count):
    record = i % len(folder)
    ours, theirs = (
        np.stack(views).astype(np.int16)
        for views in (
            geometry.two_views(
                folder[record]["image"], np.random.default_rng(i), size=_SIZE
            ),
            pillow_views(files[record], np.random.default_rng(i)),
        )
    )
    differences.append(abs(ours - theirs).mean(axis=(1, 2, 3)))
  return np.concatenate(differences)


def content_rows(root: str, repeats: int) -> Iterable[dict[str, Any]]:
  """Rates, what bounds them, and the difference of the views."""
  folder = sources.images("imagenet", root, seed=0, size=_SIZE)
  shape = folder[0]["image"].shape[:2]
  cores = _cores()
  own = {cores[0]}
  _pin({cores[-1]})
  ours = content_stream(Pinned(folder, own), 1)
  pillow = pillow_stream(Pinned(PillowFiles(folder), own), 1)
  turns = []
  with ours, pillow:
    for _ in range(repeats):
      turns.append([_rate(source, _BATCH, 20) for source in (ours, pillow)])
  (rate, used), (pillow_rate, pillow_used) = np.max(turns, axis=0).tolist()
  yield _row("content", shape, rate, pillow_rate, "Pillow", "images/s", 1.4)
  yield _row(
      "content_worker_cpu",
      shape,
      -1e3 * used,
      -1e3 * pillow_used,
      "Pillow",
      "ms",
  )
  parts = _on_core(content_parts, cores[0], folder, repeats)
  for name, seconds in parts.items():
    yield _row(
        f"content_{name}", shape, *(1e3 * s for s in seconds), "Pillow", "ms"
    )
  left = -used - sum(seconds for seconds, _ in parts.values())
  yield _row(
      "content_grain", shape, 1e3 * left, -1e3 * used, "the worker's CPU", "ms"
  )
  differences = content_differences(folder, 4 * _COUNT)
  yield _row(
      "content_difference_p95",
      shape,
      float(np.quantile(differences, 0.95)),
      2.0,
      "bound",
      "/255",
      1.0,
  )
  _pin(set(cores))
  for workers in (1, 2):
    with content_stream(Pinned(folder, set(cores)), workers) as source:
      rate, _ = max(_rate(source, _BATCH, 20) for _ in range(repeats))
    one = rate if workers == 1 else one
  yield _row("content_2_workers", shape, rate, one, "1 worker", "images/s")


def memory_row(root: str, records: int) -> dict[str, Any]:
  """A worker's own memory, against that after a tenth of the records."""
  folder = sources.images("imagenet", root, seed=0, size=_SIZE)
  before = set(psutil.Process().children())
  with content_stream(Pinned(folder, set(_cores())), 1) as source:
    num_batches = max(records // _BATCH, 10)
    early, late = [], []
    for k in tqdm.trange(num_batches, desc="memory"):
      next(source)
      if k < 0.1 * num_batches or 0.2 * num_batches <= k < 0.9 * num_batches:
        continue
      # The worker is the largest, beside multiprocessing's own.
      used = max(
          process.memory_full_info().uss
          for process in set(psutil.Process().children()) - before
      )
      (late if k >= 0.9 * num_batches else early).append(used)
  return _row(
      "worker_memory",
      (num_batches * _BATCH,),
      float(np.median(late)) / 2**20,
      float(np.median(early)) / 2**20,
      "after a tenth",
      "MiB",
      1.05,
  )


def decode_files(paths: list[pathlib.Path]) -> tuple[float, float]:
  """(seconds, CPU seconds) to decode a file by Pillow."""

  def decode(i):
    np.array(Image.open(paths[i % len(paths)]).convert("RGB"))

  decode(0)
  start = time.process_time()
  seconds = _seconds(decode, 2 * len(paths))
  return seconds, (time.process_time() - start) / (2 * len(paths))


def pair_rows(name: str, root: str, repeats: int) -> Iterable[dict[str, Any]]:
  """The rate of pairs against the bare decode on the same core."""
  set_name, files, _, size = _PAIR_SETS[name]
  pairs = sources.motion(set_name, root, seed=0, size=size)
  shape = pairs[0]["frame_1"].shape[:2]
  paths = sorted(pathlib.Path(root).glob(files))[:48]
  cores = _cores()
  _pin({cores[-1]})
  source = batches.MotionSource(name, Pinned(pairs, {cores[0]}), size)
  num_batches = 4 if name == "pairs_sintel" else 40
  with batches.motion_stream(
      [source], batch_size=_PAIRS, seed=0, num_workers=1
  ) as source:
    turns, bare = [], []
    for _ in range(repeats):
      turns.append(_rate(source, _PAIRS, num_batches))
      bare.append(_on_core(decode_files, cores[0], paths))
  _pin(set(cores))
  rate, used = np.max(turns, axis=0).tolist()
  seconds, cpu = (2 * np.min(bare, axis=0)).tolist()
  yield _row(name, shape, rate, 1 / seconds, "Pillow decode", "pairs/s", 0.8)
  yield _row(
      f"{name}_worker_cpu", shape, -1e3 * used, 1e3 * cpu, "Pillow decode", "ms"
  )


def _rows(root: str) -> Iterable[dict[str, Any]]:
  if _ONLY.value in "content":
    yield from content_rows(root, _REPEATS.value)
  for name in _PAIR_SETS:
    if _ONLY.value in name:
      yield from pair_rows(name, root, _REPEATS.value)
  if _ONLY.value in "worker_memory":
    yield memory_row(root, _RECORDS.value)


def main(argv: list[str]) -> None:
  """Prints the table, writes the JSON, exits 1 if a target is missed."""
  del argv
  rows = []
  known = ("content", *_PAIR_SETS, "worker_memory")
  if not any(_ONLY.value in name for name in known):
    sys.exit(f"--only: expected a part of {known}, got {_ONLY.value!r}")
  with tempfile.TemporaryDirectory() as made:
    root = _ROOT.value
    if not root:
      root = made
      make_data(pathlib.Path(made), _ONLY.value)
    print(
        f"{'name':24} {'shape':>9} {'ours':>10} {'reference':>10} ratio target"
    )
    for row in _rows(root):
      shape = "x".join(map(str, row["shape"]))
      target = "" if row["target"] is None else f"{row['target']:.2f}"
      print(
          f"{row['name']:24} {shape:>9} {row['ours']:10.2f}"
          f" {row['reference']:10.2f} {row['ratio']:5.2f} {target:>6}"
          f" {row['unit']}, {row['reference_name']}"
          + ("" if row["passed"] else "  MISSED"),
          flush=True,
      )
      rows.append(row)
  meta = {
      "cores": len(_cores()),
      "opencv": cv2.__version__,
      "pillow": PIL.__version__,
      "simplejpeg": simplejpeg.__version__,
      "grain": importlib.metadata.version("grain"),
      "repeats": _REPEATS.value,
      "data_root": bool(_ROOT.value),
      "load": os.getloadavg()[0],
  }
  report.end(
      _JSON.value, meta, rows, failed=not all(row["passed"] for row in rows)
  )


if __name__ == "__main__":
  app.run(main)
