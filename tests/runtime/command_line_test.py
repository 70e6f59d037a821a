import subprocess
import sys

import pytest

from mcjepa_jax import errors
from mcjepa_jax.runtime import command_line


def test_all_faults_of_a_command_line_are_found():
  with pytest.raises(errors.UserError) as caught:
    command_line.split(["--confg=a", "word", "--inputs", "a", "b"], ("config",))
  messages = caught.value.messages
  assert any("did you mean --config?" in m for m in messages)
  assert any("--inputs" in m for m in messages)


def test_a_flag_takes_the_words_after_it():
  split = command_line.split(
      ["--inputs", "a", "b", "--output=c"], ("inputs", "output")
  )
  assert split.flags == {"inputs": ["a", "b"], "output": ["c"]}


def test_each_fault_is_a_line_and_the_code_is_2(capsys):
  def fails():
    raise errors.UserError("one\nfault", "another")

  assert command_line.guarded(fails, debug=False) == 2
  captured = capsys.readouterr()
  assert captured.err.splitlines() == ["error: one fault", "error: another"]
  assert command_line.guarded(fails, debug=True) == 2
  assert "Traceback" in capsys.readouterr().err


def test_a_stop_ends_with_its_own_code(capsys):
  def stops():
    raise errors.Stop(errors.EXIT_ALARM, "step 3: not finite: loss")

  assert command_line.guarded(stops, debug=False) == 76
  assert capsys.readouterr().err == "step 3: not finite: loss\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=nowhere.py", "--workdir=w"], "no file nowhere.py"),
        (["--config=configs/quickstart.py"], "--workdir"),
        (
            ["--config=configs/quickstart.py", "--wrkdir=w"],
            "did you mean --workdir?",
        ),
        (
            ["--config=configs/quickstart.py", "--workdir=w",
             "--config.motion.batchsize=3", "--config.num_steps=x"],
            "did you mean --config.motion.batch_size?",
        ),
    ],
)  # fmt: skip
def test_the_command_ends_a_wrong_line_with_code_2_and_no_traceback(
    arguments, words
):
  run = subprocess.run(
      [sys.executable, "-m", "mcjepa_jax.main", *arguments],
      capture_output=True,
      text=True,
  )
  assert run.returncode == 2
  assert words in run.stderr
  assert all(line.startswith("error: ") for line in run.stderr.splitlines())
