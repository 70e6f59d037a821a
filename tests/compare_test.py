import csv
import json
import subprocess
import sys

import pytest

from mcjepa_jax import compare

_FIRST = {
    "flow/sintel_clean/epe": 4.5,
    "flow/sintel_clean/epe_zero": 6.25,
    "flow/sintel_clean/count": 1041,
    "flow/sintel_clean/alley_1/epe": 1.0,
    "seconds/total": 12.0,
    "meta/config": "first",
}
_SECOND = {
    "davis/2017/j_and_f": 55.0,
    "davis/2017/count": 30,
    "flow/sintel_clean/epe": 3.123456,
    "meta/a/b": "text",
}


def _workdir(tmp_path, name, results, file="results.json"):
  path = tmp_path / name / file
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(results))
  return str(path.parent)


@pytest.fixture
def runs(tmp_path):
  first = _workdir(tmp_path, "first", _FIRST)
  return first, _workdir(tmp_path, "second", _SECOND, "evaluation.json")


def _printed(capsys, *arguments):
  assert compare.main(list(arguments)) == 0
  captured = capsys.readouterr()
  assert captured.err == ""
  return captured.out


def _fault(capsys, *arguments):
  assert compare.main(list(arguments)) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  (line,) = captured.err.splitlines()
  assert line.startswith("error: ")
  return line


def test_runs_stand_side_by_side_with_the_papers_numbers(capsys, runs):
  lines = _printed(capsys, *runs).splitlines()
  assert lines[0].split(None, 2) == [*runs, compare.PAPER_NAME]
  assert [line.split() for line in lines[1:]] == [
      ["flow/sintel_clean/epe", "4.500", "3.123", "2.810"],
      ["flow/sintel_clean/epe_zero", "6.250", "-", "-"],
      ["flow/sintel_clean/count", "1041", "-", "-"],
      ["davis/2017/j_and_f", "-", "55.000", "70.500"],
      ["davis/2017/count", "-", "30", "-"],
  ]
  assert len({len(line) for line in lines}) == 1


def test_the_paper_is_left_out_beside_a_part_of_its_set(capsys, tmp_path):
  key = "flow/sintel_clean/epe"
  for results in ({key: 1.5, "flow/sintel_clean/count": 4}, {key: 1.5}):
    run = _workdir(tmp_path, "run", results)
    assert compare.PAPER_NAME not in _printed(capsys, run)


def test_the_papers_voc_is_that_of_the_augmented_training_set(capsys, tmp_path):
  for name, told in (("voc2012", False), ("voc2012_aug", True)):
    key = f"segmentation/{name}/miou"
    results = {key: 60.0, f"segmentation/{name}/count": 1449}
    text = _printed(capsys, _workdir(tmp_path, name, results))
    assert (compare.PAPER_NAME in text) == told
    assert ("67.100" in text) == told


def test_the_paper_is_left_out_where_it_has_no_row(capsys, tmp_path):
  run = _workdir(tmp_path, "run", {"knn/synthetic/top1": 40.9})
  assert _printed(capsys, run).splitlines()[1:] == [
      f"knn/synthetic/top1  {'40.900':>{len(run)}}"
  ]


def test_seeds_have_a_mean_and_a_standard_deviation(capsys, tmp_path):
  epe, count = "flow/flying_chairs/epe", "flow/flying_chairs/count"
  runs = [
      _workdir(tmp_path, str(i), {epe: value, count: 4, **extra})
      for i, (value, extra) in enumerate(
          [(1.0, {}), (2.0, {"knn/cifar10/top1": 40.0}), (6.0, {})]
      )
  ]
  lines = _printed(capsys, *runs, "--mean").splitlines()
  assert lines[0].split() == [*runs, "mean", "std"]
  assert [line.split() for line in lines[1:]] == [
      # The std of 1, 2, 6: sqrt((4 + 1 + 9) / 2).
      [epe, "1.000", "2.000", "6.000", "3.000", "2.646"],
      [count, "4", "4", "4", "4.000", "0.000"],
      ["knn/cifar10/top1", "-", "40.000", "-", "-", "-"],
  ]
  assert "expected two runs or more" in _fault(capsys, runs[0], "--mean")
  _workdir(tmp_path, "0", {epe: 9.0}, "evaluation.json")
  fault = _fault(capsys, *runs, "--mean")
  assert f"of one file each, got {runs[0]}/results.json" in fault
  assert "expected no value, got 'yes'" in _fault(capsys, *runs, "--mean=yes")


def test_markdown_and_csv_hold_the_same_table(capsys, tmp_path):
  one = _workdir(tmp_path, "a,b|c", _FIRST)
  two = _workdir(tmp_path, "two", _SECOND)
  text = _printed(capsys, "--format=csv", one, two)
  rows = list(csv.reader(text.splitlines()))
  assert rows[0] == ["result", one, two, compare.PAPER_NAME]
  assert rows[2] == ["flow/sintel_clean/epe_zero", "6.250", "", ""]
  lines = _printed(capsys, one, "--format=markdown", two).splitlines()
  assert lines[1] == "| --- | ---: | ---: | ---: |"
  assert lines[3] == "| flow/sintel_clean/epe_zero | 6.250 | - | - |"
  assert len(lines) == len(rows) + 1
  cells = {line.replace(r"\|", "").count("|") for line in lines}
  assert cells == {5}


def test_both_files_of_a_workdir_are_columns(capsys, tmp_path):
  run = _workdir(tmp_path, "run", _FIRST)
  _workdir(tmp_path, "run", _SECOND, "evaluation.json")
  header = _printed(capsys, run).splitlines()[0]
  assert f"{run}/results.json" in header
  assert f"{run}/evaluation.json" in header


def test_a_run_named_twice_is_one_column(capsys, runs):
  assert _printed(capsys, runs[0], runs[0]) == _printed(capsys, runs[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected JSON"),
        ('{"flow/', "expected JSON"),
        ("\udcff", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[1]", "expected a JSON object, got a list"),
        ("{}", "expected results, as flow/sintel_clean/epe, got none"),
        ('{"flow/a/epe": "4"}', "flow/a/epe: expected a number, got '4'"),
        ('{"flow/a/epe": null}', "flow/a/epe: expected a number, got None"),
        ('{"flow/a/epe": true}', "flow/a/epe: expected a number, got True"),
        ('{"flow/a/epe": [1]}', "flow/a/epe: expected a number, got [1]"),
    ],
)
def test_a_file_of_another_form_is_told(capsys, tmp_path, text, words):
  path = tmp_path / "results.json"
  path.write_text(text, errors="surrogateescape")
  line = _fault(capsys, str(path))
  assert "results.json: " in line and words in line


def test_what_is_missing_is_told(capsys, tmp_path, runs):
  line = _fault(capsys, *runs, str(tmp_path / "none"))
  assert "none: expected a file of results, got: No such file" in line
  (tmp_path / "empty").mkdir()
  line = _fault(capsys, str(tmp_path / "empty"))
  assert "expected results.json or evaluation.json" in line
  assert "expected RUN..." in _fault(capsys)
  assert "--format: expected one of plain" in _fault(
      capsys, runs[0], "--format=html"
  )
  assert "--form: no such flag" in _fault(capsys, runs[0], "--form=csv")


def test_all_faults_are_told_at_once(capsys, tmp_path):
  (tmp_path / "a.json").write_text("[]")
  assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
  assert len(capsys.readouterr().err.splitlines()) == 2


def test_runs_without_a_common_result_are_told(capsys, tmp_path, runs):
  other = _workdir(tmp_path, "other", {"knn/synthetic/top1": 40.9})
  line = _fault(capsys, *runs, other)
  assert f"{other}: expected a result that another run has too" in line


def test_the_command_loads_no_jax(runs):
  script = (
      "import sys; from mcjepa_jax import compare;"
      f"code = compare.main({[*runs]!r}); assert 'jax' not in sys.modules;"
      "sys.exit(code)"
  )
  result = subprocess.run([sys.executable, "-c", script], check=False)
  assert result.returncode == 0
