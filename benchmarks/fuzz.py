"""Every reader of files that others made, against files that are damaged.

  python -m benchmarks.fuzz --json=PATH [--cases=N] [--only=png] [--seed=S]

A case is a small whole file, or a folder of them, damaged in a way that (seed,
format, case) alone decides: its bits, bytes, length and numbers, two files
spliced, or what lies behind checksums and compression. The first cases are the
whole files, which must be read. A case must be read, as what it claims to be,
or be refused with a UserError that names it; all else is a crash, and so is a
file opened outside of its folder. The exit code is 1 on a crash, a hang (5 s),
or more memory than its bytes allow. --keep=DIR takes the files of such cases.

Cases run in a process of their own, which may die. The memory of a case is the
larger of two peaks, each above what was there before it: of resident pages
(VmHWM, reset by /proc/self/clear_refs; its growth where that is not allowed,
nothing where there is no /proc), and of what its reader asked Python and NumPy
for (tracemalloc). malloc hands blocks of 128 KB or more back at once, so that
no case runs in what an earlier one left. The bound is a format's floor and so
many bytes for each byte of the case, see fuzz_formats.FORMATS. Where TMPDIR is
in memory, as /dev/shm, cases take less time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
import faulthandler
import multiprocessing
import os
import pathlib
import platform
import resource
import shutil
import sys
import tempfile
import time
import traceback
import tracemalloc
from typing import NamedTuple
import warnings

from absl import app, flags
import tqdm

from benchmarks import fuzz_formats, report
from mcjepa_jax.errors import UserError

HANG = 5.0  # seconds
_START = 120.0  # seconds that a worker may take to import and warm up
_CEILING = 2**33  # bytes of address space, so that the machine survives
_FAULTS = ("crashes", "hangs", "over_bound")


class Outcome(NamedTuple):
  """What became of a case."""

  kind: str  # rejected, accepted, or one of _FAULTS
  detail: str = ""
  peak: int = 0  # bytes


class _Opened:
  """Paths that Python opens while it watches; a hook cannot be removed."""

  def __init__(self):
    self.paths: list[str] | None = None
    sys.addaudithook(self._see)

  def _see(self, event: str, arguments: tuple) -> None:
    if self.paths is None or event != "open":
      return
    if isinstance(arguments[0], str | bytes):
      self.paths.append(os.fsdecode(arguments[0]))

  def outside(self, folder: pathlib.Path) -> list[str]:
    """Returns the paths that lie neither in the folder nor in Python's own."""
    own = (str(folder), sys.prefix, sys.base_prefix, "/proc", "/dev")
    roots = tuple(os.path.realpath(path) + os.sep for path in own)
    real = map(os.path.realpath, self.paths)
    return [path for path in real if not (path + os.sep).startswith(roots)]


_opened: _Opened | None = None


def outcome(
    kind: fuzz_formats.Format, files: fuzz_formats.Files, folder: pathlib.Path
) -> Outcome:
  """Writes a case into a new folder, reads it, and returns what came.

  Its peak is of what Python and NumPy asked for: tracing doubles the time of
  whatever Python does, and so it is of the reader alone.
  """
  global _opened
  _opened = _opened or _Opened()
  folder.mkdir()
  for name, data in files.items():
    (folder / name).write_bytes(data)
  _opened.paths, error = [], None
  with warnings.catch_warnings(record=True) as warned:
    tracemalloc.start(1)
    try:
      kind.read(folder)
    except Exception as raised:
      error = raised
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  # Whatever looks at the error opens sources.
  outside, _opened.paths = _opened.outside(folder), None
  shutil.rmtree(folder)
  # Of arithmetic; others tell of a file that is odd.
  warned = [w for w in warned if issubclass(w.category, RuntimeWarning)]
  fault = ""
  if outside:
    fault = f"opened {outside[:9]}"
  elif error and not isinstance(error, UserError):
    fault = "".join(traceback.format_exception(error))
  elif error and str(folder) not in str(error):
    fault = f"a UserError without the file's name: {error}"
  elif warned:
    fault = f"warned: {warned[0]}"
  if fault:
    return Outcome("crashes", fault, peak)
  return Outcome("rejected" if error else "accepted", "", peak)


def _memory(key: str) -> int:
  """Returns a figure of /proc/self/status in bytes, 0 where there is none."""
  try:
    text = pathlib.Path("/proc/self/status").read_text()
  except OSError:
    return 0
  return 1024 * int(text.split(f"{key}:")[1].split()[0])


def _measured(
    kind: fuzz_formats.Format, files: fuzz_formats.Files, folder: pathlib.Path
) -> Outcome:
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    resident = _memory("VmRSS")
  except OSError:
    resident = _memory("VmHWM")
  result = outcome(kind, files, folder)
  peak = max(result.peak, _memory("VmHWM") - resident)
  size = sum(map(len, files.values()))
  bound = kind.floor + kind.bytes_per_byte * size
  if peak > bound and result.kind != "crashes":
    fault = f"{peak} bytes of memory for {size}, expected at most {bound}"
    return Outcome("over_bound", fault, peak)
  return result._replace(peak=peak)


def _work(
    pipe, name: str, seed: int, start: int, stop: int, data_root: str
) -> None:
  """Sends None when it is ready, then the outcome of each case in turn."""
  faulthandler.enable()  # a library that dies says where it was called
  resource.setrlimit(resource.RLIMIT_AS, (_CEILING, _CEILING))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  kind = fuzz_formats.FORMATS[name]
  seeds = fuzz_formats.seeds(name, data_root)
  with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
    # Libraries load at their first file, which is not the file's memory.
    for files in seeds:
      outcome(kind, files, pathlib.Path(root, "warm"))
    pipe.send(None)
    for number in range(start, stop):
      files = fuzz_formats.case(name, seeds, seed, number)
      result = _measured(kind, files, pathlib.Path(root, str(number)))
      if number < len(seeds) and result.kind == "rejected":
        result = Outcome("crashes", "a whole file is refused", result.peak)
      pipe.send(result)


def outcomes(
    name: str,
    seed: int,
    cases: int,
    data_root: str = "",
    *,
    work: Callable[..., None] = _work,
) -> Iterator[Outcome]:
  """Yields what becomes of each case; one that kills its worker is a crash."""
  context = multiprocessing.get_context("spawn")
  done, late = 0, None
  while done < cases:
    pipe, other = context.Pipe()
    arguments = (other, name, seed, done, cases, data_root)
    worker = context.Process(target=work, args=arguments, daemon=True)
    worker.start()
    other.close()
    try:
      if not pipe.poll(_START):
        raise RuntimeError(f"{name}: no worker within {_START:.0f} s")
      pipe.recv()
      while done < cases:
        if not pipe.poll(HANG):
          # A busy machine may be what is slow, though hardly twice.
          if late == done:
            yield Outcome("hangs", f"no end after {HANG:.0f} s, twice")
            done += 1
          late = done
          break
        done += 1
        try:
          yield pipe.recv()
        except EOFError:
          worker.join()
          yield Outcome("crashes", f"exit code {worker.exitcode}")
          break
      else:
        worker.join(_START)
    finally:
      worker.kill()
      worker.join()


def _keep(folder: pathlib.Path, files: fuzz_formats.Files, detail: str):
  folder.mkdir(parents=True, exist_ok=True)
  for name, data in files.items():
    (folder / name).write_bytes(data)
  (folder / "fault.txt").write_text(detail + "\n")


def _row(name: str) -> dict[str, int | float | str]:
  """Returns the counts of a format; its faults are printed as they come."""
  flag, seeds = flags.FLAGS, None
  counts, peak, start = Counter(), 0, time.perf_counter()
  results = outcomes(name, flag.seed, flag.cases, flag.data_root)
  bar = tqdm.tqdm(results, name, flag.cases, unit="case", leave=False)
  for number, result in enumerate(bar):
    counts[result.kind] += 1
    peak = max(peak, result.peak)
    if result.kind not in _FAULTS:
      continue
    bar.write(f"{name}, case {number}: {result.kind}: {result.detail.strip()}")
    if flag.keep:
      seeds = seeds or fuzz_formats.seeds(name, flag.data_root)
      files = fuzz_formats.case(name, seeds, flag.seed, number)
      _keep(pathlib.Path(flag.keep, f"{name}-{number}"), files, result.detail)
  kinds = ("rejected", "accepted", *_FAULTS)
  return {
      "format": name,
      "cases": flag.cases,
      **{kind: counts[kind] for kind in kinds},
      "peak_mb": round(peak / 1e6, 2),
      "seconds": round(time.perf_counter() - start, 1),
  }


def main(argv: list[str]) -> None:
  """Prints the table, writes the JSON, exits 1 if a case has a fault."""
  del argv
  flag = flags.FLAGS
  names = [n for n in fuzz_formats.FORMATS if not flag.only or n == flag.only]
  if not names:
    raise app.UsageError(f"--only: one of {', '.join(fuzz_formats.FORMATS)}")
  # Of the workers, before each starts: see above.
  os.environ |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
  rows = []
  for name in tqdm.tqdm(names, "formats", unit="format"):
    rows.append(row := _row(name))
    report.show(row, first=len(rows) == 1, widths=(14, 11))
  meta = {
      "seed": flag.seed,
      "data_root": bool(flag.data_root),
      "hang_s": HANG,
      "cores": os.cpu_count(),
      "python": platform.python_version(),
  }
  report.end(
      flag.json,
      meta,
      rows,
      failed=any(row[fault] for row in rows for fault in _FAULTS),
  )


def _define_flags() -> None:
  """Defines the flags, but not in a process that only imports this."""
  flags.DEFINE_string("json", None, "Where to write the rows.")
  flags.DEFINE_string("only", "", "Run this format alone.")
  flags.DEFINE_integer("cases", 2000, "Cases of each format.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Another one makes other cases.")
  flags.DEFINE_string("keep", "", "A folder for the files of faulty cases.")
  flags.DEFINE_string("data_root", "", "A folder of real files to start from.")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
