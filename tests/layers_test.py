"""Holds the floors: which package may import which; how long a module may be."""

import ast
import functools
import graphlib
import json
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TESTS = _ROOT / "tests"
_PACKAGE = "mcjepa_jax"

# A package imports only packages of earlier rows; `errors` is open to all. Within
# a package only circles are refused.
_FLOORS = (
    ("errors",),
    ("ops", "storage"),
    ("runtime", "losses", "models", "data"),
    ("distributed",),
    ("step",),
    ("compiled", "evals"),
    ("training",),
    ("loading",),
    # The commands.
    (
        *("check_data", "compare", "convert_images", "evaluate"),
        *("predict", "preflight", "replay", "train"),
    ),
    # The command that picks one.
    ("main",),
)
_FLOOR = {name: floor for floor, row in enumerate(_FLOORS) for name in row}
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


def _package(module: str) -> str:
  return module.partition(".")[0]


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
def test_package_imports_only_earlier_packages(name: str):
  package = _package(name)
  assert package in _FLOOR, (
      f"{_PACKAGE}/{package} has no floor: the top of the package holds"
      " commands, and a package one concern; add it to _FLOORS"
  )
  wrong = {
      other
      for other in _internal(_MODULES[name])
      if _package(other) != package
      and _FLOOR[_package(other)] >= _FLOOR[package]
  }
  assert not wrong, f"{name} imports {sorted(wrong)} of a later floor"


def test_packages_and_commands_are_those_of_the_floors():
  assert {_package(name) for name in _MODULES} == set(_FLOOR)


def test_no_module_imports_itself_by_others():
  order = graphlib.TopologicalSorter(
      {name: _internal(path) for name, path in _MODULES.items()}
  )
  order.prepare()  # raises CycleError, which names the circle


@_modules
def test_module_knows_no_torch_or_tensorflow(name: str):
  assert not _external(_MODULES[name]) & {"tensorflow", "torch", "torchvision"}


@_modules
def test_nothing_below_training_knows_ml_collections(name: str):
  if _FLOOR[_package(name)] < _FLOOR["training"]:
    assert "ml_collections" not in _external(_MODULES[name])


@pytest.mark.parametrize("name", [n for n in _MODULES if _package(n) == "data"])
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
    "path", sorted((_ROOT / _PACKAGE).glob("*/**/__init__.py")), ids=str
)
def test_files_of_inner_packages_are_empty(path: pathlib.Path):
  # An import there would be one that the floors do not show.
  assert not path.read_text()


@_modules
def test_module_and_its_functions_are_short(name: str):
  path = _MODULES[name]
  assert len(path.read_text().splitlines()) <= _MAX_MODULE_LINES
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = node.end_lineno - node.lineno + 1
      assert lines <= _MAX_FUNCTION_LINES, f"{name}.{node.name}: {lines} lines"


def _loaded(names: tuple[str, ...], *statements: str) -> list[str]:
  """Those of some modules that statements load, in a process of their own."""
  script = "; ".join(
      ("import json, sys", *statements)
      + (f"print(json.dumps([m for m in {names!r} if m in sys.modules]))",)
  )
  result = subprocess.run(
      [sys.executable, "-c", script],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)


def test_commands_load_no_torch_or_tensorflow():
  # All modules from the train step up.
  first = _FLOOR["step"]
  names = [n for n in _MODULES if _FLOOR[_package(n)] >= first]
  statements = [f"import {_PACKAGE}.{name}" for name in names]
  assert not _loaded(("torch", "tensorflow"), *statements)


@pytest.mark.parametrize("module", [_PACKAGE, f"{_PACKAGE}.main"])
def test_import_loads_no_jax(module: str):
  # A Grain worker imports both.
  assert not _loaded(("jax", "jaxlib", "flax"), f"import {module}")


def test_import_of_the_package_loads_no_module_of_it():
  names = tuple(f"{_PACKAGE}.{name}" for name in _MODULES)
  assert not _loaded(names, f"import {_PACKAGE}")


def test_public_names_are_loaded_when_they_are_asked_for():
  import mcjepa_jax
  from mcjepa_jax import loading
  from mcjepa_jax.models import mcjepa

  assert mcjepa_jax.load is loading.load
  assert mcjepa_jax.build_model is mcjepa.build
  # The second access is the first one's, and no submodule hides a name.
  assert mcjepa_jax.load is loading.load
  assert not set(mcjepa_jax.__all__) & set(_FLOOR)
  assert set(mcjepa_jax.__all__) <= set(dir(mcjepa_jax))
  with pytest.raises(AttributeError, match="mcjepa_jax.*no attribute 'lode'"):
    _ = mcjepa_jax.lode


def test_the_readme_names_what_is_there():
  _, _, section = (_ROOT / "README.md").read_text().partition("## Where things")
  table, _, _ = section.partition("\n## ")
  files = re.findall(r"`([\w/]+)\.py`(?:: ((?:`\w+`(?:, )?)+))?", table)
  assert len(files) > 10
  for file, names in files:
    tree = _tree(_MODULES[file.replace("/", ".")])
    there = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    missing = set(re.findall(r"\w+", names)) - there
    assert not missing, f"README.md: {file}.py has no {missing}"
  packages = set(
      re.findall(r"^\| `(\w+)/`(?:, `(\w+)/`)?", table, re.MULTILINE)
  )
  named = {name for row in packages for name in row if name}
  assert named == {p for p in _FLOOR if (_ROOT / _PACKAGE / p).is_dir()}


def test_folders_of_the_tests_are_those_of_the_package():
  folders = {path.parent for path in _TESTS.rglob("*_test.py")}
  named = {str(folder.relative_to(_TESTS)) for folder in folders}
  wrong = [name for name in named if not (_ROOT / _PACKAGE / name).is_dir()]
  assert not wrong, f"expected packages of {_PACKAGE}, got {wrong}"
  tested = {name.partition("/")[0] for name in named}
  packages = {p for p in _FLOOR if (_ROOT / _PACKAGE / p).is_dir()}
  assert packages <= tested, f"no tests of {packages - tested}"


@pytest.mark.parametrize(
    "path", sorted(_TESTS.rglob("*.py")), ids=lambda path: path.stem
)
def test_no_test_imports_another(path: pathlib.Path):
  parts = {part for name in _imports(path) for part in name.split(".")}
  wrong = [part for part in parts if part.endswith("_test")]
  assert not wrong, f"{path.name} imports {wrong}; share it in tests/helpers"
