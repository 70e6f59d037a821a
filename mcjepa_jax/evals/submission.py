"""The archives that flow benchmarks take, written, checked and read back.

MPI-Sintel's bundler takes one folder for each pass, in it a folder for each of
the twelve test scenes with frame0001.flo and so on (the README of the bundler,
among its data; github.com/princeton-vl/RAFT, evaluate.py writes the same). KITTI
2015 takes a zip with flow/000000_10.png to 000199_10.png, KITTI 2012 one with
000000_10.png to 000194_10.png in its root, 16-bit as the ground truth is (the
readmes of the development kits).
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
import shutil
from typing import Any
import zipfile
import zlib

from jaxtyping import Float
import numpy as np
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.data.readers import flow_files, image_files
from mcjepa_jax.evals import flow, tiling

_NAMED = 5  # members in an error
_KITTI_RANGE = 511.0  # pixels: longer flow has no place in the code
_KITTI_STEP = 1 / 64

SINTEL_SCENES = (
    "PERTURBED_market_3",
    "PERTURBED_shaman_1",
    "ambush_1",
    "ambush_3",
    "bamboo_3",
    "cave_3",
    "market_1",
    "market_4",
    "mountain_2",
    "temple_1",
    "tiger",
    "wall",
)


def sintel_member(render: str, record: str) -> str:
  """Where the flow of `tiger/frame_0001+1` belongs in an archive."""
  scene, frame = record.removesuffix("+1").split("/")
  return f"{render}/{scene}/{frame.replace('_', '')}.flo"


def kitti_member(year: str, record: str) -> str:
  """Where the flow of `000000_10+1` belongs in an archive."""
  folder = {"2012": "", "2015": "flow/"}[year]
  return f"{folder}{record.removesuffix('+1')}.png"


@dataclasses.dataclass(frozen=True)
class SubmissionPairs:
  """Frame pairs, each by the archive's member that its flow will be."""

  datasets: tuple[Any, ...]
  members: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.members)

  def record_id(self, index: int) -> str:
    """The member."""
    return self.members[index]

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    for dataset in self.datasets:
      if index < len(dataset):
        return dataset[index]
      index -= len(dataset)
    raise IndexError(index)


def frames(
    parts: Mapping[str, Any],
    member: Callable[[str, str], str],
    *,
    count: int,
    scenes: tuple[str, ...] = (),
) -> SubmissionPairs:
  """The pairs of an archive's parts, `count` in each, of just these scenes.

  Raises:
    UserError: others: the benchmark would refuse the archive.
  """
  faults = [
      f"{part}: expected {count} pairs of the test set, came {len(dataset)}"
      for part, dataset in parts.items()
      if len(dataset) != count
  ]
  members = []
  for part, dataset in parts.items():
    records = [dataset.record_id(i) for i in range(len(dataset))]
    members += [member(part, record) for record in records]
    found = {record.partition("/")[0] for record in records}
    if scenes and found != set(scenes):
      faults.append(
          f"{part}: expected the scenes of the test set, came without"
          f" {sorted(set(scenes) - found)} and with {sorted(found - set(scenes))}"
      )
  if faults:
    raise errors.UserError(*faults)
  return SubmissionPairs(tuple(parts.values()), tuple(members))


def run(
    name: str,
    dataset: SubmissionPairs,
    predictor: tiling.Predictor,
    folder: pathlib.Path,
    *,
    batch_size: int,
    max_pixels: int,
    progress: bool = True,
) -> dict[str, float | int]:
  """Counts and the largest change by the format, keyed `submit/NAME/METRIC`.

  Writes FOLDER/NAME, the files as the benchmark wants them, and FOLDER/NAME.zip
  of the same; each file is read back and compared, and the archive checked.

  Raises:
    UserError: a file cannot be written, or does not hold what was written.
  """
  unpacked, archive = folder / name, folder / f"{name}.zip"
  try:
    # A file that is left of an earlier archive would be bundled too.
    shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink(missing_ok=True)
    for parent in {(unpacked / member).parent for member in dataset.members}:
      parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
        f"{error.filename}: cannot be written: {error.strerror}"
    ) from error
  change, sizes = 0.0, {}
  bar = tqdm.tqdm(
      *(None, f"submit/{name}", len(dataset)),
      disable=not progress,
      leave=False,
  )
  for group in flow.batches(
      dataset, batch_size=batch_size, max_pixels=max_pixels
  ):
    images = np.stack([x[k] for x in group for k in ("frame_1", "frame_2")])
    flows = tiling.predict(predictor, images, max_pixels)
    for example, field in zip(group, flows, strict=True):
      member = example["record"]
      sizes[member] = example["frame_1"].shape[:2]
      change = max(change, _write(unpacked / member, field))
      bar.update()
  bar.close()
  _pack(archive, unpacked, sizes)
  check(archive, sizes)
  return {
      f"submit/{name}/count": len(dataset),
      f"submit/{name}/largest_change": change,
  }


def _write(path: pathlib.Path, field: Float[np.ndarray, "h w 2"]) -> float:
  """The largest change, in pixels, that a file makes to the flow in it."""
  written, tolerance = field, 0.0
  if path.suffix == ".png":
    written, tolerance = (
        np.clip(field, -_KITTI_RANGE, _KITTI_RANGE),
        _KITTI_STEP,
    )
    flow_files.write_kitti_flow(path, written)
  else:
    flow_files.write_flo(path, written)
  read, valid = flow_files.read_flow(path)
  change = float(np.abs(read - written).max()) if valid.all() else np.inf
  if change > tolerance:
    raise errors.UserError(
        f"{path}: expected the flow that was written, up to {tolerance} px,"
        f" came {change} px more or less, or pixels without flow"
    )
  return float(np.abs(read - field).max())  # with what the format cuts off


def _pack(archive, unpacked, members):
  partial = archive.with_name(f".{archive.name}")
  try:
    # Flow hardly shrinks: 1 is the fastest.
    with zipfile.ZipFile(
        partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as packed:
      for member in members:
        packed.write(unpacked / member, member)
    partial.replace(archive)
  except OSError as error:
    raise errors.UserError(
        f"{archive}: cannot be written: {error.strerror}"
    ) from error


def check(archive: pathlib.Path, sizes: Mapping[str, tuple[int, int]]) -> None:
  """Raises UserError unless a zip holds just these members, whole.

  `sizes` are the (h, w) of each member's flow.
  """
  with image_files.opened(archive, "a zip archive") as (file, _):
    try:
      with zipfile.ZipFile(file) as packed:
        _check_members(archive, packed, sizes)
    except errors.UserError:
      raise
    # What zipfile raises for bytes that are no archive.
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, ValueError),
        *(NotImplementedError, RuntimeError),
    ) as error:
      raise errors.UserError(
          f"{archive}: expected a zip archive, came: {error}"
      ) from error


def _check_members(archive, packed, sizes):
  names = packed.namelist()
  faults = []
  for told, some in (
      ("is missing", sizes.keys() - set(names)),
      ("does not belong there", set(names) - sizes.keys()),
      ("comes twice", {name for name in sizes if names.count(name) > 1}),
  ):
    more = f" and {len(some) - _NAMED} more" if len(some) > _NAMED else ""
    faults += [f"{archive}: {n} {told}{more}" for n in sorted(some)[:_NAMED]]
  if faults:
    raise errors.UserError(*faults)
  for name, (height, width) in sizes.items():
    with packed.open(name) as member:
      head = member.read(24)
    # Width and height, after the magic number of either format.
    at, order = (16, ">u4") if name.endswith(".png") else (4, "<u4")
    came = np.frombuffer(head[at : at + 8].ljust(8, b"\0"), order).tolist()
    if came != [width, height]:
      faults.append(
          f"{archive}: {name}: expected {width}x{height}, came"
          f" {came[0]}x{came[1]}"
      )
  if faults:
    raise errors.UserError(*faults)
  if damaged := packed.testzip():
    raise errors.UserError(f"{archive}: {damaged} is damaged")
