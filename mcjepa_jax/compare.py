"""Evaluations of several runs, side by side, and the paper's numbers.

  python -m mcjepa_jax.compare RUN... [--mean] [--format=plain|markdown|csv]

A RUN is a workdir, whose results.json and evaluation.json are a column each, or
such a file. A row is a result EVAL/SET/METRIC; what a run has not measured is
shown as `-`, empty in csv. Results of single examples are left out. The paper's
number is there where a run measured the whole of a set that the paper reports:
as many examples as were published. With --mean the
runs are seeds of one: their mean and their standard deviation (n - 1) are added
to the rows that all of them have.
"""

from collections.abc import Callable, Mapping, Sequence
import csv
import io
import json
import pathlib
import statistics
import sys

from mcjepa_jax import errors
from mcjepa_jax.data.catalog import datasets
from mcjepa_jax.runtime import command_line

_FILES = ("results.json", "evaluation.json")  # of training, of an evaluation
_MAX_BYTES = 2**26

PAPER_NAME = "MC-JEPA, arXiv 2307.12698"
# Bardes, Ponce, LeCun, 2023, with ConvNeXt-T: EPE on the training sets of Sintel
# and KITTI 2015, mIoU of a linear head on the frozen encoder and of UperNet, J&F
# of DAVIS 2017. Its Fl-all is of KITTI's test set, which has no published truth.
# VOC's training images are the augmented ones, as in VICRegL's configs.
PAPER = {
    "flow/sintel_clean/epe": 2.81,
    "flow/sintel_final/epe": 3.51,
    "flow/kitti_2015/epe": 2.67,
    "segmentation/voc2012_aug/miou": 67.1,
    "segmentation/cityscapes/miou": 65.5,
    "segmentation/ade20k/miou": 30.8,
    "upernet/voc2012_aug/miou": 79.9,
    "upernet/cityscapes/miou": 78.4,
    "upernet/ade20k/miou": 44.2,
    "davis/2017/j_and_f": 70.5,
}
_DAVIS_SEQUENCES = 30  # of DAVIS 2017's val.txt; the catalog has no count

Number = float | int
Results = Mapping[str, Number]


def read(path: pathlib.Path) -> dict[str, Number]:
  """The results EVAL/SET/METRIC of a file.

  Raises:
    UserError: no such file, no JSON object, a result that is no number, or none.
  """
  try:
    size = path.stat().st_size
    if not path.is_file() or size > _MAX_BYTES:
      raise errors.UserError(
          f"{path}: expected a file of at most {_MAX_BYTES} bytes, got {size}"
      )
    values = json.loads(path.read_bytes())
  except OSError as error:
    raise errors.UserError(
        f"{path}: expected a file of results, got: {error.strerror}"
    ) from error
  except (RecursionError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.UserError(f"{path}: expected JSON, got: {error}") from error
  if not isinstance(values, dict):
    raise errors.UserError(
        f"{path}: expected a JSON object, got a {type(values).__name__}"
    )
  results = {key: value for key, value in values.items() if _is_result(key)}
  faults = [
      f"{path}: {key}: expected a number, got {value!r:.80}"
      for key, value in results.items()
      if type(value) not in (int, float)
  ]
  if not results:
    faults.append(
        f"{path}: expected results, as flow/sintel_clean/epe, got none"
    )
  if faults:
    raise errors.UserError(*faults)
  return results


def _is_result(key: str) -> bool:
  return key.count("/") == 2 and not key.startswith("meta/")


def files(run: str) -> dict[str, pathlib.Path]:
  """The files of a run by the names of their columns.

  Raises:
    UserError: no such run, or a folder without results.
  """
  path = pathlib.Path(run).expanduser()
  if not path.is_dir():
    return {run: path}
  found = {name: path / name for name in _FILES if (path / name).exists()}
  if not found:
    raise errors.UserError(
        f"{run}: expected {' or '.join(_FILES)} in the workdir, got neither"
    )
  if len(found) == 1:
    return {run: next(iter(found.values()))}
  return {str(pathlib.Path(run) / name): file for name, file in found.items()}


def load(runs: Sequence[str]) -> dict[str, Results]:
  """The results of runs by the names of their columns.

  Raises:
    UserError: all that is wrong with them, or one that shares no result with
      the others.
  """
  columns: dict[str, Results] = {}

  def one(run):
    found = files(run)
    columns.update((name, read(path)) for name, path in found.items())

  faults = errors.collect(*(lambda run=run: one(run) for run in runs))
  if faults:
    raise errors.UserError(*faults)
  for name, results in columns.items():
    others = [set(other) for n, other in columns.items() if n != name]
    if others and not set().union(*others) & set(results):
      raise errors.UserError(
          f"{name}: expected a result that another run has too, got none of"
          f" {', '.join(sorted(set().union(*others))[:5])}, ..."
      )
  return columns


def spread(columns: Mapping[str, Results]) -> dict[str, Results]:
  """The columns `mean` and `std`, of what all the columns have."""
  rows = {
      key: [results[key] for results in columns.values()]
      for key in set.intersection(*map(set, columns.values()))
  }
  return {
      "mean": {key: statistics.fmean(row) for key, row in rows.items()},
      "std": {key: statistics.stdev(row) for key, row in rows.items()},
  }


def table(columns: Mapping[str, Results]) -> list[list[str]]:
  """The header, then a row for each result; a missing value is empty.

  Rows of one set keep the order in which they were measured.
  """
  sets: dict[str, dict[str, None]] = {}
  for results in columns.values():
    for key in results:
      sets.setdefault(key.rpartition("/")[0], {})[key] = None
  keys = [key for of_set in sets.values() for key in of_set]
  columns = dict(columns)
  paper = {
      key: value
      for key, value in PAPER.items()
      if any(_whole_set(key, results) for results in columns.values())
  }
  if paper:
    columns[PAPER_NAME] = paper
  rows = [["", *columns]]
  for key in keys:
    values = (results.get(key) for results in columns.values())
    rows.append([key, *("" if v is None else _text(v) for v in values)])
  return rows


def _whole_set(key: str, results: Results) -> bool:
  """Whether a result is of as many examples as the set has."""
  eval_set = key.rpartition("/")[0]
  fact = datasets.published(eval_set.replace("upernet/", "segmentation/"))
  count = fact.value if fact else _DAVIS_SEQUENCES
  return key in results and results.get(f"{eval_set}/count") == count


def _text(value: Number) -> str:
  return f"{value:.3f}" if isinstance(value, float) else str(value)


def plain(rows: Sequence[Sequence[str]]) -> str:
  """The table in columns, numbers flush right."""
  rows = [[cell or "-" for cell in row] for row in rows]
  rows[0][0] = ""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "".join(
      "  ".join(
          [row[0].ljust(widths[0])]
          + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
      ).rstrip()
      + "\n"
      for row in rows
  )


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """The table in Markdown."""
  rows = [[cell.replace("|", r"\|") or "-" for cell in row] for row in rows]
  rows[0][0] = "result"
  rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def comma_separated(rows: Sequence[Sequence[str]]) -> str:
  """The table as CSV, missing values empty."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerows([["result", *rows[0][1:]], *rows[1:]])
  return text.getvalue()


_FORMATS: dict[str, Callable[[Sequence[Sequence[str]]], str]] = {
    "plain": plain,
    "markdown": markdown,
    "csv": comma_separated,
}


def main(argv: Sequence[str] | None = None) -> int:
  """The exit code of the command; the table is printed."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    runs = [word for word in argv if not word.startswith("--")]
    words = [word for word in argv if word.startswith("--")]
    flags = command_line.split(words, ("format", "mean")).flags
    flags = {"format": ["plain"], "mean": None} | flags
    (name,) = command_line.single(flags, format="|".join(_FORMATS))
    faults = []
    if name not in _FORMATS:
      faults.append(
          f"--format: expected one of {', '.join(_FORMATS)}, got {name!r}"
      )
    if not runs:
      faults.append("expected RUN..., workdirs or files of results, got none")
    if flags["mean"]:
      faults.append(f"--mean: expected no value, got {flags['mean'][0]!r}")
    if faults:
      raise errors.UserError(*faults)
    runs = list(dict.fromkeys(runs))
    columns = load(runs)
    if flags["mean"] is not None:
      # Two files of one run are no two seeds.
      if not 2 <= len(runs) == len(columns):
        raise errors.UserError(
            "--mean: expected two runs or more of one file each, got"
            f" {', '.join(columns)}"
        )
      columns |= spread(columns)
    print(_FORMATS[name](table(columns)), end="")

  return command_line.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
