"""The environment of a run: versions, commit and devices."""

import importlib.metadata
import pathlib
import subprocess

import jax


def versions() -> str:
  """The versions of what computes, as one string."""
  names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  return " ".join(
      f"{name}={importlib.metadata.version(name)}" for name in names
  )


def commit() -> str:
  """The commit of this code, `unknown` outside a git work tree."""
  folder = pathlib.Path(__file__).resolve().parent
  try:
    run = subprocess.run(
        ["git", "-C", folder, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return run.stdout.strip()


def describe_devices() -> str:
  """Number and kind of the devices."""
  devices = jax.devices()
  return f"{len(devices)} x {devices[0].device_kind}"
