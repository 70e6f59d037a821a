"""Command lines: flags, configs with overrides, faults as lines, exit codes."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import difflib
import os
import pathlib
import sys
import traceback
from typing import Any, NoReturn

from mcjepa_jax import errors
from mcjepa_jax.runtime import config_files


@dataclasses.dataclass
class Arguments:
  """A command line, split."""

  flags: dict[str, list[str]]  # of `--name=value`, `--name v1 v2`, `--name`
  overrides: list[tuple[str, str]]  # of `--config.KEY=VALUE`


def split(argv: Sequence[str], known: Sequence[str]) -> Arguments:
  """The flags and overrides of a command line; `debug` is always known.

  Raises:
    UserError: a flag that is not known, or a word that no flag takes.
  """
  known = (*known, "debug")
  arguments, faults = Arguments({}, []), []
  values: list[str] | None = None
  for word in argv:
    if not word.startswith("--"):
      if values is None:
        faults.append(f"{word}: expected a flag, --NAME=VALUE")
      else:
        values.append(word)
      continue
    name, equals, value = word[2:].partition("=")
    if name.startswith("config.") and "config" in known:
      if not equals:
        faults.append(f"--{name}: expected --{name}=VALUE")
      arguments.overrides.append((name.removeprefix("config."), value))
      values = None
    elif name in known:
      values = arguments.flags.setdefault(name, [])
      if equals:
        values.append(value)
    else:
      faults.append(f"--{name}: no such flag{_nearest(name, known, '--')}")
      values = []
  if faults:
    raise errors.UserError(*faults)
  return arguments


def single(
    flags: Mapping[str, Sequence[str]],
    *,
    remote: Sequence[str] = (),
    **hints: str,
) -> list[str]:
  """The values of flags that take one each, in the order of the hints.

  Raises:
    UserError: a flag without a value, with several, or with the address of a
      store where it is none of those that may be `remote`.
  """
  faults, values = [], []
  for name, hint in hints.items():
    given = flags.get(name, ())
    if len(given) != 1 or not given[0]:
      came = " ".join(repr(value) for value in given) or "nothing"
      faults.append(f"--{name}: expected --{name}={hint}, got {came}")
    elif "://" in given[0] and name not in remote:
      faults.append(f"--{name}: expected a local path, got {given[0]}")
    else:
      values.append(given[0])
  if faults:
    raise errors.UserError(*faults)
  return values


def number(
    flags: Mapping[str, Sequence[str]], name: str, default: int, most: int
) -> int:
  """The number of a flag, from 1 to `most`; `default` if it is not given."""
  if name not in flags:
    return default
  text = " ".join(flags[name])
  digits = text.isascii() and text.isdigit() and len(text) < 20
  if not (digits and 1 <= int(text) <= most):
    raise errors.UserError(
        f"--{name}: expected a number from 1 to {most}, got {text!r}"
    )
  return int(text)


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  if close:
    return f"; did you mean {prefix}{close[0]}?"
  return f"; there are {', '.join(prefix + k for k in sorted(known))}"


def guarded(function: Callable[[], Any], *, debug: bool) -> int:
  """The exit code of a function, its faults printed as `error: ...` lines."""
  try:
    function()
  except errors.UserError as error:
    if debug:
      traceback.print_exc()
    sys.stdout.flush()
    for message in error.messages:
      print("error:", " ".join(message.split()), file=sys.stderr)
    return errors.EXIT_USER_ERROR
  except errors.Stop as stop:
    if debug:
      traceback.print_exc()
    print(stop, file=sys.stderr)
    return stop.code
  except KeyboardInterrupt:
    if debug:
      traceback.print_exc()
    print("interrupted: started again, it goes on", file=sys.stderr)
    return errors.EXIT_INTERRUPTED
  return 0


def leave(code: int) -> NoReturn:
  """Ends this process; of one that failed nothing that still runs is awaited.

  A step that compiles in a thread may take minutes, and cannot be ended.
  """
  if code:
    with contextlib.suppress(OSError):  # a full disk, a pipe that was closed
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(code)
  raise SystemExit(0)


def run(
    argv: Sequence[str] | None,
    function: Callable[[Any, str, Mapping[str, list[str]]], None],
    *,
    flags: Sequence[str] = (),
) -> int:
  """The exit code of `function(config, workdir, flags)` for a command line."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    arguments = split(argv, ("config", "workdir", *flags))
    file, workdir = single(
        arguments.flags,
        remote=("workdir",),
        config="FILE.py",
        workdir="FOLDER",
    )
    config = config_files.load_config(file, arguments.overrides)
    set_up_jax(config.compilation_cache)
    function(config, workdir, arguments.flags)

  return guarded(body, debug="--debug" in argv)


def set_up_jax(compilation_cache: str) -> None:
  """Turns the persistent compilation cache on, and lets Grain's flags be read."""
  # Imported here, so that a misspelt flag is told at once.
  from absl import flags
  import jax

  # Grain's workers read absl's flags, which only app.run would parse.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  if compilation_cache and not jax.config.jax_compilation_cache_dir:
    folder = pathlib.Path(compilation_cache).expanduser() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
