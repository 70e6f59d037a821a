"""Checks data sets before a training: layout, counts, files, true flow.

  python -m mcjepa_jax.check_data --config=FILE.py [--config.KEY=VALUE ...]
  python -m mcjepa_jax.check_data --dataset=NAME --root=FOLDER
    both: [--samples=16] [--output=data_check] [--allow-partial]

The first checks every source that the config's mode trains on and every eval;
the second a set by its name in a config, as all that it is (motion, content,
flow, knn, segmentation, davis), or as one: flow/sintel_clean. Of each

- the layout is found, or the first path that is not as expected is named, with
  the page where the set is downloaded;
- the examples are counted, pairs as neighbours whatever motion.gaps says. Fewer
  than are published is a fault, with --allow-partial a warning; more is a fault
  (FlyingChairs without its split file);
- a sample is decoded, always the same;
- true flow is held against its frames (see data.flow_faults);
- shards of convert_images are read and compared with their sha256;
- a panel is drawn, OUTPUT/KIND_NAME.png: of flow the pair that fits worst.

The last line of stdout is a JSON object: {"ok": ..., "sources": {KIND/NAME:

  count, published    examples found; None where no page says how many
  decoded             examples of the sample
  faults, warnings    a line each, also on stderr
  flow                max, mean: length in pixels; valid: share of pixels
  warp                error_still, error_warped: median difference of the frames,
                      frame 2 as it is and warped, in grey levels of 255;
                      best_explanation, of `pairs` that can tell
  panel, ok}}}

flow and warp are None where there is no true flow. Exit code: 0 if all is well,
2 for a fault.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json
import pathlib
import sys
from typing import Any
import zlib

import cv2
import numpy as np
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.data import flow_sanity, sources
from mcjepa_jax.data.catalog import datasets
from mcjepa_jax.data.pipeline import geometry, labelled_crops
from mcjepa_jax.data.readers import array_records, image_files
from mcjepa_jax.data.sets import record_sets
from mcjepa_jax.runtime import command_line, config_files, visualize
from mcjepa_jax.storage import paths

_SAMPLES = 16
_MAX_SAMPLES = 2**20
_OUTPUT = "data_check"
_MAX_FAULTS = 10  # of one source that are told
_GENERATED = 1000  # examples of the procedural sets
_TILE = 384  # pixels, the width of a frame in a panel
_VIEWS = 8  # images in a panel
_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a run would read its sources."""

  root: str | paths.Location
  seed: int = 0
  size: tuple[int, int] = (64, 64)  # of generated pairs
  # Options of pipeline.geometry.two_views, which cuts content's views.
  views: dict[str, Any] = dataclasses.field(
      default_factory=lambda: {"size": 96}
  )


_OPEN: dict[str, Callable[[str, Settings], Any]] = {
    "motion": lambda name, s: sources.motion(
        name, s.root, seed=s.seed, size=s.size
    ),
    "content": lambda name, s: sources.images(
        name, s.root, seed=s.seed, size=s.views["size"]
    ),
    "flow": lambda name, s: sources.flow_pairs(
        name, s.root, seed=_held_out(s), size=s.size, count=_GENERATED
    ),
    "knn": lambda name, s: sources.labelled(
        name, s.root, seed=_held_out(s), size=s.views["size"], count=_GENERATED
    ),
    "segmentation": lambda name, s: sources.segmentation(name, s.root).test,
    "segmentation_train": lambda name, s: (
        sources.segmentation(name, s.root).train
    ),
    "davis": lambda name, s: sources.mask_sequences(name, s.root),
}
# Of label maps in a panel; void is black.
_COLOURS = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
_COLOURS[labelled_crops.VOID] = 0


def _held_out(settings: Settings) -> int:
  return sources.held_out_seed(settings.seed)


class _Source:
  """One source, and what is found about it."""

  def __init__(self, use: str, settings: Settings):
    self.use = use
    self.kind, _, self.name = use.partition("/")
    self.faults: list[str] = []
    self.warnings: list[str] = []
    self.judge = flow_sanity.Judge()
    self.decoded = 0
    self._unreachable = False
    self._settings = settings
    # Of the panel: the pair, the error left in it, and columns of images.
    self._pair: dict[str, Any] | None = None
    self._left = -1.0
    self._columns: list[list[tuple[str, np.ndarray]]] = []
    self.dataset = None
    try:
      self.dataset = _OPEN[self.kind](self.name, settings)
    except errors.UserError as error:
      self.faults += [f"{m}{_origin(self.name)}" for m in error.messages]

  def count(self, allow_partial: bool) -> None:
    """Holds the number of examples against what is published."""
    message = datasets.miscount(self.use, len(self.dataset))
    if message is None:
      return
    fewer = len(self.dataset) < datasets.published(self.use).value
    (self.warnings if fewer and allow_partial else self.faults).append(message)

  def sample(self, samples: int) -> list[int]:
    """Returns the examples to decode, the same ones at any time."""
    count = len(self.dataset)
    if count <= samples:
      return list(range(count))
    rng = np.random.default_rng(zlib.crc32(self.use.encode()))
    chosen = rng.choice(count, samples, replace=False, shuffle=False)
    return sorted(chosen.tolist())

  def decode(self, index: int) -> None:
    """Decodes an example and looks at it."""
    if self._unreachable:
      return
    try:
      example = self.dataset[index]
    except errors.UserError as error:
      self.faults += error.messages
      self._unreachable = error.final
      return
    self.decoded += 1
    self.faults += [fault for _, fault in example.get("faults", ())]
    if self.kind == "flow":
      left = self.judge.add(example)
      if left > self._left:
        self._left, self._pair = left, example
    elif self.kind == "motion":
      self._pair = self._pair or example
    elif len(self._columns) < _VIEWS:
      self._columns.append(self._column(index, example))

  def _column(
      self, index: int, example: dict[str, Any]
  ) -> list[tuple[str, np.ndarray]]:
    """Returns labels and pictures of an image: the square's, and its views."""
    image, views = example["image"], self._settings.views
    square = geometry.center_resize(image, views["size"])
    if "labels" in example:
      labels = _COLOURS[example["labels"]]
      labels = geometry.center_resize(labels, views["size"])
      return [("image", square), ("classes", labels)]
    if self.kind == "davis":
      mask = np.where(example["mask"][..., None] > 0, image, image // 4)
      masked = geometry.center_resize(mask, views["size"])
      return [("first frame", square), ("its objects", masked)]
    if self.kind == "knn":
      label = int(example["label"])
      classes = getattr(self.dataset, "classes", None)
      return [(f"{label} {classes[label]}" if classes else f"{label}", square)]
    rng = np.random.default_rng((zlib.crc32(self.use.encode()), index))
    first, second = geometry.two_views(image, rng, **views)
    return [("image", square), ("view 1", first), ("view 2", second)]

  def _panel(self) -> np.ndarray | None:
    if self._pair is not None:
      draw = _flow_panel if self.kind == "flow" else _motion_panel
      return draw(self._pair)
    if not self._columns:
      return None
    tiles = [tile for row in zip(*self._columns, strict=True) for tile in row]
    labels, images = zip(*tiles, strict=True)
    return visualize.labelled_grid(np.stack(images), labels, len(self._columns))

  def verify_shards(self) -> None:
    """Reads all shards of convert_images and compares them with the manifest."""
    if not isinstance(self.dataset, record_sets.ConvertedImages):
      return
    folder = self.dataset.folder
    shards = array_records.read_manifest(folder)["shards"]
    total = sum(shard["bytes"] for shard in shards)
    label = f"{self.use}: shards"
    with tqdm.tqdm(desc=label, total=total, unit="B", unit_scale=True) as bar:
      for shard in shards:
        path, digest = folder / shard["name"], hashlib.sha256()
        with image_files.opened(path, "a shard", again=True) as (file, _):
          while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
        if digest.hexdigest() != shard.get("sha256"):
          self.faults.append(
              f"{path}: expected the sha256 {shard.get('sha256')}, as"
              f" {array_records.MANIFEST} says, came {digest.hexdigest()}"
          )

  def report(self, output: pathlib.Path) -> dict[str, Any]:
    """Returns all that was found; the panel is written."""
    if self.decoded and self.kind == "flow":
      self.faults[:0] = self.judge.faults()
      if self.judge.explanation() is None:
        self.warnings.append("too little moves in the sample to judge the flow")
    panel, path = self._panel(), None
    if panel is not None:
      path = output / f"{self.kind}_{self.name}.png"
      _write(path, panel)
    fact = datasets.published(self.use)
    has_flow = self.kind == "flow" and self.decoded > 0
    faults = list(dict.fromkeys(self.faults))
    more = len(faults) - _MAX_FAULTS
    if more > 0:
      faults[_MAX_FAULTS:] = [f"and {more} more"]
    return {
        "count": None if self.dataset is None else len(self.dataset),
        "published": fact and fact.value,
        "decoded": self.decoded,
        "faults": faults,
        "warnings": self.warnings,
        "flow": self.judge.flow() if has_flow else None,
        "warp": self.judge.warp() if has_flow else None,
        "panel": path and str(path),
        "ok": not faults,
    }


def _origin(name: str) -> str:
  """Returns where a set is found and how it lies, if that is known."""
  for dataset in datasets.DATASETS:
    if name in (use.partition("/")[2] for use in dataset.reads):
      return (
          f"; {dataset.title} is downloaded from {dataset.download} and lies as"
          f" {', '.join(dataset.layout)}"
      )
  return ""


def _write(path: pathlib.Path, panel: np.ndarray) -> None:
  try:
    visualize.save_png(path, panel)
  except OSError as error:
    raise errors.UserError(
        f"--output: {path} cannot be written: {error.strerror}"
    ) from error


def _tile(image: np.ndarray) -> np.ndarray:
  """Returns a frame at the width of a panel's; small ones in larger pixels."""
  height, width = image.shape[:2]
  if width > _TILE:
    size = (_TILE, max(1, round(height * _TILE / width)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  return visualize.enlarge(image[None], max(1, _TILE // 2 // width))[0]


def _strip(tiles: dict[str, np.ndarray]) -> np.ndarray:
  images = np.stack([_tile(image) for image in tiles.values()])
  return visualize.labelled_grid(images, list(tiles), len(tiles))


def _difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return np.abs(x.astype(np.int16) - y).astype(np.uint8)


def _motion_panel(example: dict[str, Any]) -> np.ndarray:
  frame_1, frame_2 = example["frame_1"], example["frame_2"]
  return _strip(
      {
          "frame 1": frame_1,
          "frame 2": frame_2,
          "difference": _difference(frame_1, frame_2),
      }
  )


def _flow_panel(example: dict[str, Any]) -> np.ndarray:
  frame_1, frame_2 = example["frame_1"], example["frame_2"]
  valid = (example["valid"] > 0) & np.isfinite(example["flow"]).all(
      axis=-1, keepdims=True
  )
  flow = np.where(valid, example["flow"], 0)
  longest = float(np.linalg.norm(flow, axis=-1).max())
  warped = np.round(visualize.warp(frame_2, flow) * valid).astype(np.uint8)
  # Where nothing is warped there is no error.
  seen = valid & (visualize.warp(np.full_like(frame_2, 255), flow) > 0)
  return _strip(
      {
          "frame 1": frame_1,
          "frame 2": frame_2,
          f"true flow, longest {longest:.3g} px": (
              visualize.flow_to_color(flow) * valid
          ),
          "frame 2 warped": warped,
          "error": _difference(frame_1, warped) * seen,
      }
  )


def check(
    uses: Sequence[str],
    settings: Settings,
    *,
    samples: int = _SAMPLES,
    output: image_files.Path = _OUTPUT,
    allow_partial: bool = False,
) -> dict[str, Any]:
  """Returns what is found about sources, each KIND/NAME; panels are written.

  Raises:
    UserError: the output cannot be written.
  """
  output = pathlib.Path(output).expanduser()
  try:
    output.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
        f"--output: {output} cannot be made: {error.strerror}"
    ) from error
  found = [_Source(use, settings) for use in dict.fromkeys(uses)]
  opened = [source for source in found if source.dataset is not None]
  for source in opened:
    source.count(allow_partial)
    source.faults += errors.collect(source.verify_shards)
  plan = [(s, index) for s in opened for index in s.sample(samples)]
  with tqdm.tqdm(plan, "decoding", unit="example") as bar:
    for source, index in bar:
      bar.set_postfix_str(source.use, refresh=False)
      source.decode(index)
  reports = {source.use: source.report(output) for source in found}
  return {"ok": all(r["ok"] for r in reports.values()), "sources": reports}


def of_config(config: Any) -> tuple[list[str], Settings]:
  """Returns what a config reads, each KIND/NAME, and how.

  Raises:
    UserError: all that `train` would find wrong with the config itself.
  """
  # Imported here: they load JAX, for which a check of one set has no use.
  from mcjepa_jax.step import task_schedule
  from mcjepa_jax.training import validation

  faults = validation.faults(config)
  if faults:
    raise errors.UserError(*faults)
  motion, content = config.motion, config.content
  uses = [
      f"{task}/{name}"
      for task in task_schedule.tasks_of_mode(config.mode)
      for name, *_ in config[task].sources
  ]
  for entry in config.evals:
    kind, _, name = entry.partition("/")
    read = _of_eval(kind, name) if name else ()
    if not read:
      faults.append(
          "evals: expected flow/SET, knn/SET, linear/SET, finetune/SET,"
          " rankme/SET, segmentation/SET, upernet/SET, davis/SET or submit/SET,"
          f" got {entry!r}"
      )
    uses += read
  if faults:
    raise errors.UserError(*faults)
  settings = Settings(
      root=sources.data_root(config.data_root, config.data_cache),
      seed=config.seed,
      size=tuple(motion.size),
      views=dict(
          size=content.size,
          scale=tuple(content.scale),
          ratio=tuple(content.ratio),
          flip=content.flip,
      ),
  )
  return list(dict.fromkeys(uses)), settings


def _of_eval(kind: str, name: str) -> tuple[str, ...]:
  """Returns what an eval reads, nothing if there is none of that kind."""
  if kind in ("flow", "davis"):
    return (f"{kind}/{name}",)
  if kind in ("segmentation", "upernet"):
    return (f"segmentation_train/{name}", f"segmentation/{name}")
  if kind in ("knn", "linear", "finetune", "rankme"):
    return tuple(f"knn/{part}" for part in sources.label_parts(name))
  if kind == "submit":
    tests = {
        "sintel": ("sintel_test_clean", "sintel_test_final"),
        "kitti": ("kitti_2015_test",),
        "kitti_2012": ("kitti_2012_test",),
    }
    return tuple(
        f"motion/{test}"
        for test in sources.choice(tests, name, "evals: submit")
    )
  return ()


def _names(kind: str) -> tuple[str, ...]:
  try:
    _OPEN[kind]("", Settings(root=""))
  except sources.UnknownName as error:
    return error.names
  raise AssertionError(f"{kind}: a source without a name")


def of_name(name: str) -> list[str]:
  """Returns the uses that a name stands for: itself, or one of each kind.

  Raises:
    UserError: no source is called so.
  """
  kind, slash, rest = name.partition("/")
  kinds = [kind] if slash else list(_OPEN)
  uses, known = [], []
  for kind in kinds:
    if kind in _OPEN:
      names = _names(kind)
      known += [f"{kind}/{n}" for n in names]
      uses += [f"{kind}/{rest or name}"] if (rest or name) in names else []
  if not uses:
    raise errors.UserError(
        f"--dataset: expected NAME or KIND/NAME of {', '.join(known)}; got"
        f" {name!r}"
    )
  return uses


def _asked(arguments: command_line.Arguments) -> tuple[list[str], Settings]:
  """Returns what a command line asks to be checked, and how it is read."""
  flags = arguments.flags
  if ("config" in flags) == ("dataset" in flags):
    raise errors.UserError(
        "expected either --config=FILE.py or --dataset=NAME with --root=FOLDER"
    )
  if "dataset" in flags:
    if arguments.overrides:
      raise errors.UserError(
          f"--config.{arguments.overrides[0][0]}: expected --config=FILE.py too"
      )
    name, root = command_line.single(
        flags, remote=("root",), dataset="NAME", root="FOLDER"
    )
    folder = paths.require(paths.path(root), "--root")
    if not folder.is_dir():
      raise errors.UserError(f"--root: expected a folder, got {root}")
    return of_name(name), Settings(root=folder)
  (file,) = command_line.single(flags, config="FILE.py")
  if "root" in flags:
    raise errors.UserError("--root: expected --config.data_root=FOLDER instead")
  return of_config(config_files.load_config(file, arguments.overrides))


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code of the command; what it found is printed."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    known = ("config", "dataset", "root", "samples", "output", "allow-partial")
    arguments = command_line.split(argv, known)
    flags = {"output": [_OUTPUT]} | arguments.flags
    if flags.get("allow-partial"):
      raise errors.UserError(
          f"--allow-partial: takes no value, got {flags['allow-partial'][0]!r}"
      )
    samples = command_line.number(flags, "samples", _SAMPLES, _MAX_SAMPLES)
    (output,) = command_line.single(flags, output="FOLDER")
    report = check(
        *_asked(arguments),
        samples=samples,
        output=output,
        allow_partial="allow-partial" in flags,
    )
    faults = []
    for use, source in report["sources"].items():
      faults += [f"{use}: {fault}" for fault in source["faults"]]
      for warning in source["warnings"]:
        print(f"warning: {use}: {warning}", file=sys.stderr)
    print(json.dumps(report), flush=True)
    if faults:
      raise errors.UserError(*faults)

  return command_line.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
