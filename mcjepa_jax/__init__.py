"""MC-JEPA: one visual encoder, pre-trained on motion and content together.

  load          a checkpoint's model, its parameters and its meta
  build_model   the model that a config's `model` part describes

Both are loaded when they are first asked for: a Grain worker imports this
package, and needs no JAX. Training is mcjepa_jax.train.train.
"""

import importlib
from typing import Any

# Each public name, and the module and the name that it stands for there. None
# may be a module of this package: importing that would replace it.
_PUBLIC = {
    "build_model": ("mcjepa_jax.models.mcjepa", "build"),
    "load": ("mcjepa_jax.loading", "load"),
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, attribute = _PUBLIC[name]
  value = getattr(importlib.import_module(module), attribute)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_PUBLIC})
