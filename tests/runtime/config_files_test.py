"""Configs and their overrides."""

import pytest

from configs import quickstart
from mcjepa_jax import errors
from mcjepa_jax.runtime import config_files


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


def test_a_config_that_raises_is_a_fault_of_the_config(tmp_path):
  path = tmp_path / "configs" / "broken.py"
  path.parent.mkdir()
  path.write_text("def get_config():\n  return 1 / 0\n")
  with pytest.raises(errors.UserError, match="broken.py.*ZeroDivisionError"):
    config_files.load_config(str(path), [])
