"""Packs any folder of images into ArrayRecord shards that are fast to read.

  python -m mcjepa_jax.convert_images --input=FOLDER --output=FOLDER \
    [--shards=64] [--workers=CORES] [--skip-bad]

The input may be in a bucket, of gs:// or s3://, and the output in one of gs://:
there each shard is written below $TMPDIR, copied when it is whole, and read
back from the bucket at the end.

Each image is decoded once to see that it can be, and kept as the file it was,
with its label and path (see data.array_records). Of n shards, shard k holds
images k, k + n, k + 2n, ... of the listing, which is sorted: that needs no seed,
gives shards of one size with images of every class, and is the same for any
number of processes. Training shuffles over all shards by itself.

Started again after an interruption it goes on with the shards that are missing.
At the end every record is read back and compared with its file, byte by byte,
and only then the manifest is written. Files that do not decode are listed and
end the run, unless --skip-bad leaves them out. The last line is a JSON object.

Exit code: 0 when all is converted, 2 for a fault of the input.
"""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
from concurrent.futures import process
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import signal
import sys
import tempfile
import threading
from typing import Any

from array_record.python import array_record_module
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.data.readers import array_records, image_files
from mcjepa_jax.data.sets import image_sets
from mcjepa_jax.runtime import command_line
from mcjepa_jax.storage import paths

_SHARDS = 64
_MAX_WORKERS = 512
# Says, until the manifest does, what the shards in a folder were made of.
_STATE = "conversion.json"

Fault = tuple[str, str]  # a file's path under the input, what is wrong with it


@dataclasses.dataclass(frozen=True)
class _Shard:
  """What one shard is to hold."""

  path: paths.Location
  part: pathlib.Path  # where it is written, until it is whole
  root: paths.Location
  names: list[str]
  labels: list[int]


# Of a worker: images done by all of them, negative once they are to stop.
_progress = None


def _start_worker(progress: Any) -> None:
  global _progress
  _progress = progress
  # A thread of the command itself leaves it its signals.
  if threading.current_thread() is not threading.main_thread():
    return
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch():
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

  # A worker whose parent was killed would wait for work for ever.
  threading.Thread(target=watch, daemon=True).start()


def _count() -> None:
  with _progress.get_lock():
    if _progress.value < 0:
      raise RuntimeError("stopped")
    _progress.value += 1


def _read(shard: _Shard, name: str) -> bytes | Fault:
  path = shard.root / name
  try:
    return image_files.read_encoded(path)
  except paths.Unreachable:
    raise  # no fault of the image
  except errors.UserError as error:
    return name, str(error).removeprefix(f"{path}: ")


def _undecodable(name: str, data: bytes) -> Fault | None:
  try:
    # Smaller takes a third of the time, and still reads a JPEG to its end.
    image_files.decode_image(data, name, min_side=1)
  except errors.UserError as error:
    return name, str(error).removeprefix(f"{name}: ")
  return None


def _write(shard: _Shard, skip_bad: bool) -> list[Fault]:
  """Writes a shard, unless it has faults that are not skipped; returns them."""
  faults = []
  try:
    writer = array_record_module.ArrayRecordWriter(
        os.fspath(shard.part), array_records.WRITE_OPTIONS
    )
    for name, label in zip(shard.names, shard.labels, strict=True):
      data = _read(shard, name)
      fault = _undecodable(name, data) if isinstance(data, bytes) else data
      if fault:
        faults.append(fault)
      else:
        writer.write(array_records.pack(label, name, data))
      _count()
    writer.close()
    if faults and not skip_bad:
      shard.part.unlink()
      return faults
    paths.put(shard.part, shard.path)
  except OSError as error:
    raise _cannot_write(shard.path, error.strerror) from error
  except RuntimeError as error:  # of the writer
    raise _cannot_write(shard.path, error) from error
  return faults


def _cannot_write(path: paths.Location, reason: Any) -> errors.UserError:
  return errors.UserError(f"{path}: cannot be written: {reason}")


def _verify(shard: _Shard) -> tuple[dict[str, Any], list[Fault]] | None:
  """Returns a shard's entry in the manifest and the files that it leaves out.

  None if it does not hold the bytes of all its files that decode.
  """
  try:
    local, is_spare = paths.copied(shard.path)
  except OSError:
    return None
  try:
    return _compared(shard, local)
  finally:
    if is_spare:
      os.unlink(local)


def _compared(
    shard: _Shard, local: image_files.Path
) -> tuple[dict[str, Any], list[Fault]] | None:
  faults = []
  try:
    count = array_records.num_records(local)
    records = array_records.Records([local], [count], uncompressed=True)
    done = 0
    for name, label in zip(shard.names, shard.labels, strict=True):
      data = _read(shard, name)
      if isinstance(data, bytes):
        record = array_records.pack(label, name, data)
        if done < count and records[done] == record:
          fault, done = None, done + 1
        else:
          fault = _undecodable(name, data)
          if not fault:
            return None
      else:
        fault = data
      faults += [fault] if fault else []
      _count()
    if done != count:
      return None
    with open(local, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
      size = os.fstat(file.fileno()).st_size
  except paths.Unreachable:
    raise  # nothing is known of the shard
  except (errors.UserError, OSError):
    return None
  entry = {"name": shard.path.name, "records": count, "bytes": size}
  return entry | {"sha256": digest}, faults


class _Pool:
  """Processes, or for one a thread, that run functions of shards."""

  def __init__(self, workers: int):
    context = multiprocessing.get_context("spawn")
    self._progress = context.Value("q", 0)
    start = {"initializer": _start_worker, "initargs": (self._progress,)}
    if workers == 1:
      self._pool = concurrent.futures.ThreadPoolExecutor(1, **start)
    else:
      self._pool = concurrent.futures.ProcessPoolExecutor(
          workers, mp_context=context, **start
      )

  def run(
      self, label: str, function: Callable[[_Shard], Any], shards: list[_Shard]
  ) -> Iterator[tuple[_Shard, Any]]:
    """Yields each shard and what the function returns for it, as they come."""
    self._progress.value = 0
    images = sum(len(shard.names) for shard in shards)
    with tqdm.tqdm(desc=label, total=images, unit="image") as bar:
      try:
        waiting = {self._pool.submit(function, s): s for s in shards}
        while waiting:
          done, _ = concurrent.futures.wait(
              waiting, 0.5, concurrent.futures.FIRST_COMPLETED
          )
          bar.update(self._progress.value - bar.n)
          for future in done:
            yield waiting.pop(future), future.result()
      except process.BrokenProcessPool as error:
        raise errors.UserError(
            "--workers: a process was killed: it may want more memory than is "
            "here"
        ) from error

  def __enter__(self) -> "_Pool":
    return self

  def __exit__(self, kind, *exception) -> None:
    if kind:
      self._progress.value = -(2**62)
    self._pool.shutdown(cancel_futures=True)


def convert(
    *,
    source: image_files.Path,
    output: image_files.Path,
    shards: int = _SHARDS,
    workers: int = 1,
    skip_bad: bool = False,
) -> dict[str, Any]:
  """Returns counts of what was converted; the shards are written and verified.

  Raises:
    UserError: folders that cannot be used, or images that do not decode: all
      are named.
  """
  root = paths.require(paths.path(source), "--input")
  folder = paths.path(output)
  listing = image_sets.find_images(root)
  _check_links(root, listing.links)
  names = list(listing.names)
  labels = [-1] * len(names)
  if listing.labels is not None:
    labels = listing.labels.tolist()
  count = min(shards, len(names))
  digest = array_records.digest([names, labels, listing.classes])
  with contextlib.ExitStack() as stack:
    parts = folder
    if isinstance(folder, paths.Remote):
      parts = tempfile.TemporaryDirectory(prefix="mcjepa_")
      parts = pathlib.Path(stack.enter_context(parts))
    plan = []
    for number in range(count):
      name = array_records.shard_name(number, count)
      plan.append(
          _Shard(
              path=folder / name,
              part=parts / f"{name}.part",
              root=root,
              names=names[number::count],
              labels=labels[number::count],
          )
      )
    _prepare(folder, plan, digest)
    pool = stack.enter_context(_Pool(min(workers, count)))
    entries, skipped = _written(pool, folder, plan, skip_bad)
  array_records.write_manifest(
      folder,
      {
          "count": sum(entry["records"] for entry in entries),
          "classes": listing.classes,
          "shards": entries,
          "skipped": [{"path": n, "fault": f} for n, f in skipped],
      },
  )
  return {
      "images": sum(entry["records"] for entry in entries),
      "skipped": len(skipped),
      "classes": len(listing.classes),
      "shards": count,
      "bytes": sum(entry["bytes"] for entry in entries),
  }


def _written(
    pool: _Pool, folder: paths.Location, plan: list[_Shard], skip_bad: bool
) -> tuple[list[dict[str, Any]], list[Fault]]:
  """Returns the manifest's entries and all faults, of shards that are whole."""
  root, whole, skipped = plan[0].root, {}, []
  # A shard of an earlier start that is not whole is written once more.
  for _ in range(2):
    faults = []
    paths.forget(folder)
    missing = [shard for shard in plan if not shard.path.exists()]
    write = functools.partial(_write, skip_bad=skip_bad)
    if missing:
      # What it says of these shards may be no longer so.
      _remove(folder / array_records.MANIFEST)
      for _, found in pool.run("writing", write, missing):
        faults += found
    if not skip_bad:
      _raise_faults(root, faults)
    unsure = [shard for shard in plan if shard.path not in whole]
    for shard, result in pool.run("verifying", _verify, unsure):
      if result is None:
        _remove(shard.path)
      else:
        whole[shard.path], found = result
        skipped += found
    if len(whole) == len(plan):
      break
  else:
    raise errors.UserError(
        f"{folder}: expected shards that hold what {root} holds, "
        f"came {len(plan) - len(whole)} that differ, though just written: do "
        "the images change?"
    )
  if not skip_bad:
    _raise_faults(root, skipped)
  entries = [whole[shard.path] for shard in plan]
  if not any(entry["records"] for entry in entries):
    raise errors.UserError(f"{root}: expected images, came none that decodes")
  return entries, sorted(skipped)


def _remove(path: paths.Location) -> None:
  try:
    paths.remove(path)
  except OSError as error:
    raise errors.UserError(
        f"{path}: cannot be removed: {error.strerror}"
    ) from error


def _raise_faults(root: paths.Location, faults: list[Fault]) -> None:
  if faults:
    raise errors.UserError(
        *(f"{root / n}: {fault}" for n, fault in sorted(faults))
    )


def _check_links(root: paths.Location, links: list[str]) -> None:
  """Raises UserError for symbolic links that lead out of the folder."""
  if not links:
    return
  inside = root.resolve()
  faults = [
      f"{root / link}: expected no link out of {root}, came one to {target}"
      for link in links
      if not (target := (root / link).resolve()).is_relative_to(inside)
  ]
  if faults:
    raise errors.UserError(*faults)


def _is_inside(folder: paths.Location, root: paths.Location) -> bool:
  if isinstance(folder, paths.Remote):
    return f"{folder}/".startswith(f"{root}/")
  return isinstance(root, pathlib.Path) and folder.resolve().is_relative_to(
      root.resolve()
  )


def _prepare(folder: paths.Location, plan: list[_Shard], source: str) -> None:
  """Makes the output folder, or sees that it holds this very conversion."""
  root = plan[0].root
  if _is_inside(folder, root):
    raise errors.UserError(f"--output: expected a folder outside of {root}")
  if isinstance(folder, paths.Remote) and folder.scheme != "gs":
    raise errors.UserError(
        f"--output: expected a local folder or gs://BUCKET/FOLDER, got {folder}"
    )
  state = {"format": array_records.FORMAT, "source": source}
  ours = {_STATE, array_records.MANIFEST, *(shard.path.name for shard in plan)}
  ours |= {f"{name}.part" for name in ours}
  try:
    if isinstance(folder, pathlib.Path):
      folder.mkdir(parents=True, exist_ok=True)
    paths.forget(folder)
    found = set(paths.names(folder))
  except OSError as error:
    raise _cannot_write(folder, error.strerror) from error
  if found - ours:
    raise errors.UserError(
        f"--output: expected an empty folder or this conversion, into "
        f"{len(plan)} shards, came {folder} with {min(found - ours)}"
    )
  if found - {f"{_STATE}.part"}:
    before = array_records.read_json(folder / _STATE)
    if before != state:
      raise errors.UserError(
          f"--output: expected an empty folder or this conversion, came "
          f"{folder} with one of other files than {plan[0].root} holds now"
      )
  array_records.write_json(folder / _STATE, state)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code of the command; its counts are printed."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    known = ("input", "output", "shards", "workers", "skip-bad")
    flags = command_line.split(argv, known).flags
    values = {}
    cores = min(os.cpu_count() or 1, _MAX_WORKERS)
    faults = errors.collect(
        lambda: values.update(
            zip(
                ("source", "output"),
                command_line.single(
                    flags,
                    remote=("input", "output"),
                    input="FOLDER",
                    output="FOLDER",
                ),
                strict=True,
            )
        ),
        lambda: values.update(
            shards=command_line.number(
                flags, "shards", _SHARDS, array_records.MAX_SHARDS
            )
        ),
        lambda: values.update(
            workers=command_line.number(flags, "workers", cores, _MAX_WORKERS)
        ),
    )
    if flags.get("skip-bad"):
      faults.append(f"--skip-bad: takes no value, got {flags['skip-bad'][0]!r}")
    if faults:
      raise errors.UserError(*faults)
    report = convert(**values, skip_bad="skip-bad" in flags)
    print(json.dumps(report), flush=True)

  return command_line.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
