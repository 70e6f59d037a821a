"""The compiled steps of a run, and how much they computed."""

from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax

from mcjepa_jax.compiled import flops
from mcjepa_jax.step import train_state

Key = tuple[Any, ...]
Arrays = Mapping[str, jax.Array | jax.ShapeDtypeStruct]


class CompiledSteps:
  """Each kind of step compiled once for each shape of its batch."""

  def __init__(
      self,
      functions: Mapping[str, Callable[..., Any]],
      *,
      expected: Mapping[str, int],
      devices: int,
  ):
    """Compiles nothing yet.

    Args:
      functions: the jitted step by kind.
      expected: how many programs the config needs, by kind.
      devices: how many share a step.
    """
    self._functions = functions
    self._expected = expected
    self._devices = devices
    self._thread = futures.ThreadPoolExecutor(max_workers=1)
    self._begun: dict[Key, futures.Future[Any]] = {}
    self._compiled: dict[Key, Any] = {}
    self._flops: dict[Key, float] = {}
    self.images = self.pairs = 0
    self.flops = 0.0  # of one device, by all the steps that ran

  @property
  def compiles(self) -> int:
    """How many programs were compiled."""
    return len(self._compiled)

  def beyond(self, kind: str) -> int:
    """How many more steps of a kind were compiled than the config needs."""
    return sum(key[0] == kind for key in self._compiled) - self._expected[kind]

  def _key(self, kind: str, arrays: Arrays) -> Key:
    return kind, *((name, x.shape) for name, x in sorted(arrays.items()))

  def is_compiled(self, kind: str, arrays: Mapping[str, jax.Array]) -> bool:
    """Whether a batch finds its program."""
    return self._key(kind, arrays) in self._compiled

  def begin(
      self, kind: str, state: train_state.TrainState, arrays: Arrays
  ) -> None:
    """Starts to compile the step of such a batch, beside what comes next."""
    function = self._functions[kind]

    def compiled():
      traced = function.trace(state, arrays)
      return traced.lower().compile(), flops.count(traced.jaxpr)

    self._begun[self._key(kind, arrays)] = self._thread.submit(compiled)

  def compile(
      self,
      kind: str,
      state: train_state.TrainState,
      arrays: Mapping[str, jax.Array],
  ) -> None:
    """Compiles the step of a batch, or waits for what was begun."""
    key = self._key(kind, arrays)
    if key not in self._begun:
      self.begin(kind, state, arrays)
    self._compiled[key], operations = self._begun.pop(key).result()
    self._flops[key] = operations / self._devices

  def run(
      self,
      kind: str,
      state: train_state.TrainState,
      arrays: Mapping[str, jax.Array],
      *,
      again: bool = False,
  ) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
    """The step of a batch, dispatched; one that is run `again` counts once."""
    key = self._key(kind, arrays)
    if not again:
      self.flops += self._flops[key]
      self.images += len(arrays.get("views", ())) // 2
      self.pairs += len(arrays.get("frames", ())) // 2
    return self._compiled[key](state, arrays)
