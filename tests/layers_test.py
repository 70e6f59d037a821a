"""Holds the layers: which module may import which, and how long it may be."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGE = "mcjepa_jax"

# A module imports lower layers only. `errors` is open to all.
_LAYERS = (
    """data.catalog.facts data.check data.convert data.sets.sequences evals.result_table losses.weighting ops.cost_volume ops.depthwise ops.representation runtime.config_files runtime.environment runtime.process_memory runtime.run_clock runtime.signals runtime.tensorboard step.augmentation step.optimizer storage.local_files storage.paths storage.workdir_lock""",
    """storage.checkpoint_reader""",
    """data.catalog.flow_facts data.catalog.image_facts data.pipeline.shared_memory data.readers.image_files""",
    """compiled.flops compiled.hlo_bytes data.catalog.published data.flow_sanity data.pipeline.geometry data.pipeline.labelled_crops data.readers.flow_files data.sets.synthetic evals.mask_metrics evals.metrics evals.tiling losses.vicreg models.convnext models.vit ops.flow_ops runtime.command_line runtime.goodput runtime.visualize""",
    """ops.occlusion""",
    """losses.content_objective""",
    """data.sets.flow_pairs distributed.cluster distributed.heartbeat""",
    """distributed.rendezvous""",
    """data.pipeline.stream data.readers.array_records data.readers.video_files data.sets.cutouts data.sets.flow_sets data.sets.image_sets data.sets.mask_sets data.sets.segmentation_sets distributed.sharding losses.flow_losses models.flow_decoder models.segmentation_heads runtime.log_files storage.checkpoint storage.run_folder""",
    """data.sets.record_sets""",
    """step.accumulation""",
    """data.sets.frame_folders runtime.process_lifetimes""",
    """convert_images data.pipeline.batches data.sources distributed.hosts losses.motion_objective models.mcjepa""",
    """step.batch_loss step.task_schedule step.train_state""",
    """step.gradients""",
    """evals.eval_subject""",
    """loading""",
    """evals.davis evals.flow evals.frozen_features evals.segmentation step.update""",
    """evals.knn evals.rank_me""",
    """step.diagnostics""",
    """compiled.compiled_steps evals.finetune evals.inference evals.linear evals.submission training.alarms training.bad_steps training.build""",
    """evals.adapters.davis_adapter evals.adapters.flow_adapter evals.adapters.image_adapter""",
    """evals.adapters.submission_adapter""",
    """training.context""",
    """training.recovery""",
    """training.pictures training.progress training.validation""",
    """training.batch_search""",
    """evals.adapters.segmentation_adapter""",
    """evals.registry""",
    """training.reports""",
    """training.saving""",
    """evaluate training.preconditions training.step_watcher""",
    """check_data compare export predict preflight replay report train""",
    """main""",
)
_LAYER = {
    name: layer for layer, names in enumerate(_LAYERS) for name in names.split()
}
# Nothing below knows what a config is.
_FIRST_WITH_CONFIG = _LAYER["training.build"]
_COMMANDS_IN_DATA = ("check_data", "convert_images")
_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "clu"}
_MAX_MODULE_LINES = 600
_MAX_FUNCTION_LINES = 110


def _name(path: pathlib.Path) -> str:
  parts = path.relative_to(_ROOT / _PACKAGE).with_suffix("").parts
  return ".".join(parts)


_MODULES = {
    _name(path): path
    for path in sorted((_ROOT / _PACKAGE).rglob("*.py"))
    if path.name != "__init__.py"
}
_CONFIGS = sorted((_ROOT / "configs").glob("*.py"))


@functools.cache
def _tree(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(), filename=str(path))


def _imports(path: pathlib.Path) -> set[str]:
  """Absolute names of all that a file imports, also inside functions."""
  names = set()
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path.name}:{node.lineno}: a relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def _external(path: pathlib.Path) -> set[str]:
  return {name.split(".")[0] for name in _imports(path)}


def _internal(path: pathlib.Path) -> set[str]:
  """The package's own modules that a file imports, `errors` left out."""
  found = set()
  for name in _imports(path):
    first, _, rest = name.partition(".")
    if first != _PACKAGE:
      continue
    # `from mcjepa_jax.a import b`: b is a module, or a name inside a.
    own = [m for m in (rest, rest.rpartition(".")[0]) if m in _MODULES]
    assert own, f"{path.name} imports {name}, which is no module"
    found.add(own[0])
  return found - {"errors"}


def _reachable(name: str) -> set[str]:
  found, new = set(), {name}
  while new:
    found |= new
    new = set().union(*(_internal(_MODULES[n]) for n in new)) - found
  return found


_modules = pytest.mark.parametrize("name", list(_MODULES))


@_modules
def test_module_imports_only_lower_layers(name: str):
  if name == "errors":
    assert not _internal(_MODULES[name])
    return
  assert name in _LAYER, (
      f"{_PACKAGE}/{name.replace('.', '/')}.py has no layer: add {name} to"
      " _LAYERS in tests/layers_test.py, one above the highest that it imports"
  )
  wrong = {n for n in _internal(_MODULES[name]) if _LAYER[n] >= _LAYER[name]}
  assert not wrong, f"{name}, layer {_LAYER[name]}, imports {sorted(wrong)}"


@_modules
def test_module_knows_no_torch_or_tensorflow(name: str):
  assert not _external(_MODULES[name]) & {"tensorflow", "torch", "torchvision"}


@_modules
def test_only_commands_know_ml_collections(name: str):
  if _LAYER.get(name, 0) < _FIRST_WITH_CONFIG and name not in _COMMANDS_IN_DATA:
    assert "ml_collections" not in _external(_MODULES[name])


@pytest.mark.parametrize(
    # No Grain worker imports a command.
    "name",
    [
        n
        for n in _MODULES
        if n.startswith("data.") and n not in _COMMANDS_IN_DATA
    ],
)
def test_data_reaches_no_jax(name: str):
  for reached in _reachable(name):
    found = _external(_MODULES[reached]) & _JAX
    # A backend initialised in a Grain worker takes the accelerator.
    assert not found, f"{name} reaches {reached}, which imports {found}"


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_config_is_data(path: pathlib.Path):
  assert _external(path) <= {"configs", "ml_collections"} | set(
      sys.stdlib_module_names
  )


@pytest.mark.parametrize(
    "path", sorted((_ROOT / _PACKAGE).rglob("__init__.py")), ids=str
)
def test_package_files_are_empty(path: pathlib.Path):
  # An import there would be one that the layers do not show.
  assert not _imports(path)


@_modules
def test_module_and_its_functions_are_short(name: str):
  path = _MODULES[name]
  assert len(path.read_text().splitlines()) <= _MAX_MODULE_LINES
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = node.end_lineno - node.lineno + 1
      assert lines <= _MAX_FUNCTION_LINES, f"{name}.{node.name}: {lines} lines"


def test_commands_load_no_torch_or_tensorflow():
  commands = [
      f"{_PACKAGE}.{name}" for name in _MODULES if _LAYER.get(name, 0) >= 4
  ]
  script = (
      f"import sys, {', '.join(['json', *commands])};"
      "print(json.dumps([m for m in sys.modules"
      " if m in ('torch', 'tensorflow')]))"
  )
  result = subprocess.run(
      [sys.executable, "-c", script],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == "[]", f"importing {commands} loads these"
