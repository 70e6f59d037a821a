"""Loads a checkpoint: its model, its parameters and its meta."""

import os
from typing import Any

import jax

from mcjepa_jax import errors
from mcjepa_jax.distributed import sharding
from mcjepa_jax.models import mcjepa
from mcjepa_jax.storage import checkpoint_reader

Params = Any


def model_and_meta(
    path: str | os.PathLike,
) -> tuple[mcjepa.MCJEPA, dict[str, Any]]:
  """The model of a checkpoint and its meta; no array is read.

  Raises:
    UserError: no checkpoint there, or one that describes no model.
  """
  meta = checkpoint_reader.read_meta(path)
  try:
    model = mcjepa.build(**meta["model"])
    meta["seed"] = int(meta["seed"])
    _ = model.encoder.strides  # fails here for depths that are none
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
        f"checkpoint {path}: expected the model and the seed in its meta, got"
        f" {sorted(meta)} ({type(error).__name__}: {error})"
    ) from error
  return model, meta


def load(
    path: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None
) -> tuple[mcjepa.MCJEPA, Params, dict[str, Any]]:
  """The model that a checkpoint describes, its parameters and its meta.

  The path is a workdir, its checkpoints folder or one step in it, here or in
  gs://. The parameters are whole on each device of the mesh; without one, on
  this host's first device.

  Raises:
    UserError: no checkpoint there, one that cannot be read, or one whose
      parameters are not finite.
  """
  model, meta = model_and_meta(path)
  if mesh is None:
    mesh = sharding.mesh_of(jax.local_devices()[:1])
  replicated = sharding.replicated(mesh)
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
      jax.eval_shape(lambda: mcjepa.init_params(model, 0)),
  )
  params = checkpoint_reader.restore_params(path, abstract)
  checkpoint_reader.check_finite(path, params)
  return model, params, meta
