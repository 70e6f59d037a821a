"""Reads a config from its Python file and applies overrides to it."""

import ast
from collections.abc import Sequence
import difflib
import functools
import importlib.util
import pathlib
import sys
from typing import Any

from mcjepa_jax import errors


def load_config(path: str, overrides: Sequence[tuple[str, str]]) -> Any:
  """The config of a Python file's get_config, with overrides applied.

  Raises:
    UserError: no such file, no config in it, or overrides with a key that it
      has not or a value of another type; all of them are named.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise errors.UserError(f"--config: no file {path}")
  # The file's own imports, `from configs import default`, as from its root.
  root = str(file.resolve().parent.parent)
  if root not in sys.path:
    sys.path.insert(0, root)
  spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
  if spec is None:
    raise errors.UserError(f"--config: expected a .py file, got {path}")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except (Exception, SystemExit) as error:  # whatever the user's file raises
    raise errors.UserError(
        f"--config: {path}: {type(error).__name__}: {error}"
    ) from error
  _check_config(path, config)
  faults = errors.collect(
      *(functools.partial(override, config, *item) for item in overrides)
  )
  if faults:
    raise errors.UserError(*faults)
  return config


def _check_config(path: str, config: Any) -> None:
  """Raises UserError unless the config has the keys of configs/default.py."""
  if not hasattr(config, "unlocked"):
    raise errors.UserError(
        f"--config: {path}: expected get_config to return a ConfigDict, got"
        f" {type(config).__name__}"
    )
  try:
    from configs import default
  except ImportError:  # installed without this repository's configs
    return
  expected, found = set(leaves(default.get_config())), set(leaves(config))
  faults = [
      f"--config: {path}: no such key {key}" for key in sorted(found - expected)
  ] + [
      f"--config: {path}: the key {key} is missing"
      for key in sorted(expected - found)
  ]
  if faults:
    raise errors.UserError(*faults)


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
  """The leaves of a nested config, keyed `part.key`."""
  result = {}
  for key, value in config.items():
    if hasattr(value, "items"):
      result |= leaves(value, f"{prefix}{key}.")
    else:
      result[f"{prefix}{key}"] = value
  return result


def override(config: Any, key: str, text: str) -> None:
  """Sets one leaf of a config from text, as the type that it has.

  Raises:
    UserError: no such key (the nearest is named), or another type.
  """
  if key not in leaves(config):
    raise errors.UserError(
        f"--config.{key}: no such key{_nearest_key(config, key)}"
    )
  *parents, name = key.split(".")
  for parent in parents:
    config = config[parent]
  old = config[name]
  value: Any = text
  if isinstance(old, bool):
    value = {"true": True, "false": False}.get(text.lower(), text)
  elif not isinstance(old, str):
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      pass  # kept as text: the type below does not fit then
    if isinstance(old, float) and type(value) is int:
      value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
      value = tuple(value)
  if type(value) is not type(old):
    raise errors.UserError(
        f"--config.{key}: expected {type(old).__name__}, as {old!r}, got"
        f" {text!r}"
    )
  config[name] = value


def _nearest_key(config: Any, key: str) -> str:
  known = list(leaves(config))
  close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  # A right last part under a wrong parent is nearer than letters tell.
  close = close or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
  return f"; did you mean --config.{close[0]}?" if close else ""
