"""The subject of an evaluation, and the type of its results."""

import dataclasses
import pathlib
from typing import Any

import jax

from mcjepa_jax.models import mcjepa

Params = Any
Results = dict[str, float | int]  # by EVAL/SET/METRIC


@dataclasses.dataclass(frozen=True)
class Subject:
  """The subject of an evaluation; `initial` are its parameters before training."""

  config: Any
  model: mcjepa.MCJEPA
  params: Params
  initial: Params
  mesh: jax.sharding.Mesh
  workdir: pathlib.Path
  limit: int = 0  # examples of an eval, spread over its set; 0 is all
  # The features of the last labelled set: several evals read the same.
  held: dict[str, Any] = dataclasses.field(default_factory=dict)
