import subprocess
import sys

import pytest

from configs import quickstart
from mcjepa_jax import errors
from mcjepa_jax.runtime import command_line, config_files


def test_overrides_take_the_type_that_the_key_has():
  config = quickstart.get_config()
  config_files.override(config, "num_steps", "7")
  config_files.override(config, "motion.weight", "2")
  config_files.override(config, "motion.out_of_frame", "false")
  config_files.override(config, "data_root", "12")
  config_files.override(config, "evals", "['flow/synthetic']")
  assert config.num_steps == 7
  assert isinstance(config.motion.weight, float)
  assert config.motion.weight == 2.0
  assert config.motion.out_of_frame is False
  assert config.data_root == "12"
  assert config.evals == ("flow/synthetic",)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("num_step", "7", "did you mean --config.num_steps?"),
        ("weight_decay", "1", "weight_decay?"),
        ("motion", "7", "no such key"),
        ("num_steps", "many", "expected int"),
        ("num_steps", "1.5", "expected int"),
        ("motion.out_of_frame", "1", "expected bool"),
        ("motion.size", "64", "expected tuple"),
    ],
)
def test_a_wrong_override_names_key_and_expectation(key, text, words):
  with pytest.raises(errors.UserError, match=key) as caught:
    config_files.override(quickstart.get_config(), key, text)
  assert words in caught.value.messages[0]


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


def test_a_config_that_raises_is_a_fault_of_the_config(tmp_path):
  path = tmp_path / "configs" / "broken.py"
  path.parent.mkdir()
  path.write_text("def get_config():\n  return 1 / 0\n")
  with pytest.raises(errors.UserError, match="broken.py.*ZeroDivisionError"):
    config_files.load_config(str(path), [])
