import importlib
import pathlib

import numpy as np
import pytest

from configs import default
from mcjepa_jax.distributed import sharding
from mcjepa_jax.step import task_schedule
from mcjepa_jax.training import validation
from tests.helpers import tiny

_NAMES = sorted(
    path.stem
    for path in pathlib.Path(default.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "default")
)


def _get(name):
  return importlib.import_module(f"configs.{name}").get_config()


def _keys(config):
  return {
      f"{key}.{k}" if k else key
      for key, value in config.items()
      for k in (_keys(value) if hasattr(value, "items") else [""])
  }


@pytest.mark.parametrize("name", _NAMES)
def test_a_variant_overrides_keys_of_the_default_and_adds_none(name):
  config = _get(name)
  assert config.is_locked
  assert _keys(config) == _keys(default.get_config())
  assert config.name == name


@pytest.mark.parametrize("devices", [32, 64, 128, 256])
def test_the_configs_of_larger_pods_fill_them_and_change_pairs_alone(devices):
  paper, ours = (
      _get(f"mcjepa_convnext_tiny{suffix}") for suffix in ("", f"_{devices}")
  )
  (fault,) = validation.faults(paper, devices=devices)
  assert f"{devices} devices do not divide" in fault
  assert not validation.faults(ours, devices=devices)
  assert ours.motion.batch_size == devices // 2
  ours.motion.batch_size = paper.motion.batch_size
  ours.name = paper.name
  assert ours == paper


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("mcjepa_convnext_tiny", "alternate")
        else pytest.param(name, marks=pytest.mark.proof)
        for name in _NAMES
        # The other sizes differ in what is shrunken.
        if not name.startswith("mcjepa_convnext_tiny_")
    ],
)
def test_a_shrunken_step_of_each_config_is_finite(name):
  module = importlib.import_module(f"configs.{name}")
  cfg = tiny.config(module)
  start = cfg.motion.start_step
  kinds = {task_schedule.kind_at(cfg.mode, start + i, start) for i in range(2)}
  for kind in kinds:
    state, function, mesh = tiny.state_and_step(cfg, kind)
    names = {"content": "views", "motion": "frames"}
    batch = {
        names[t]: tiny.batch()[names[t]] for t in task_schedule.tasks(kind)
    }
    state, logs = function(state, sharding.to_global(batch, mesh))
    assert int(state.step) == 1
    assert all(np.isfinite(float(value)) for value in logs.values())


def test_the_full_size_config_is_the_papers():
  config = _get("mcjepa_convnext_tiny")
  assert config.content.batch_size == 384
  assert config.motion.batch_size == 8
  assert tuple(config.model.encoder.depths) == (3, 3, 9, 3)
  assert tuple(config.model.encoder.dims) == (96, 192, 384, 768)
  assert config.motion.start_step == 10 * 3336
  assert config.num_steps == 100 * 3336
  assert config.motion.weight == 0.1
