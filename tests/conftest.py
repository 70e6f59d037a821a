"""Eight CPU devices, a compilation cache and the real samples for tests."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"

from absl import flags  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Grain workers read absl flags, which only app.run parses.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """The folder of real samples; skips, saying so, where there is none."""
  path = pathlib.Path(
      os.environ.get("MCJEPA_SHARED_DATA", _ROOT.parent / "shared" / "data")
  )
  if not path.is_dir():
    pytest.skip(f"no real samples at {path} (set MCJEPA_SHARED_DATA)")
  return path
