"""Eight CPU devices, a compilation cache and the real samples for tests."""

import importlib.abc
import importlib.machinery
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Most of the tests' time is LLVM's; what it compiles runs a few times.
    "--xla_backend_optimization_level=1",
)
for _flag in _FLAGS:
  if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}"

from absl import flags  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Through the environment, so that the commands that tests start share it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
jax.config.update(
    "jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]
)
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)
# Grain workers read absl flags, which only app.run parses.
flags.FLAGS.mark_as_parsed()


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
  """Declares torchvision's operators before its import, where it is needed.

  The registry's torchvision is built against CUDA torch. Beside CPU torch its
  compiled operators do not load, and its import, and timm's, dies at the first
  of these two. No test calls them.
  """

  def find_spec(self, fullname, path=None, target=None):
    """Returns None: the import goes on as if this were not here."""
    del path, target
    if fullname != "torchvision":
      return None
    sys.meta_path.remove(self)
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
      return None
    import torch

    folder = pathlib.Path(spec.submodule_search_locations[0])
    try:
      for library in [*folder.glob("_C*.so"), *folder.glob("_C*.dylib")]:
        torch.ops.load_library(str(library))
      loaded = hasattr(torch.ops.torchvision, "nms")
    except OSError:
      loaded = False
    if not loaded:
      for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
    return None


sys.meta_path.insert(0, _TorchvisionFinder())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Returns what deals tests to processes: those that share runs, to one."""
  from xdist.scheduler import LoadScopeScheduling

  class Scheduling(LoadScopeScheduling):
    """Deals test by test, and train_test.py, which it begins with, as one."""

    def _split_scope(self, nodeid):
      file, _, _ = nodeid.partition("::")
      return file if file.endswith("train_test.py") else nodeid

  return Scheduling(config, log)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """The folder of real samples; skips, saying so, where there is none."""
  path = pathlib.Path(
      os.environ.get("MCJEPA_SHARED_DATA", _ROOT.parent / "shared" / "data")
  )
  if not path.is_dir():
    pytest.skip(f"no real samples at {path} (set MCJEPA_SHARED_DATA)")
  return path


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> pathlib.Path:
  """A workdir with a checkpoint of an untrained, tiny model."""
  from tests.helpers import tiny

  return tiny.save_checkpoint(tmp_path_factory.mktemp("untrained"))
