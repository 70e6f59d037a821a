"""A checkpoint's model, by the package's public names."""

import jax
import jax.numpy as jnp
import numpy as np

import mcjepa_jax
from mcjepa_jax.distributed import sharding
from tests.helpers import tiny


def test_load_gives_the_model_its_parameters_and_its_meta(untrained):
  model, params, meta = mcjepa_jax.load(untrained)
  assert (meta["step"], meta["config"]) == (3, "tiny")
  assert model == mcjepa_jax.build_model(**tiny.config().model.to_dict())
  images = jnp.zeros((2, 32, 32, 3))
  pooled = model.apply({"params": params}, images, method=model.pooled)
  assert pooled.shape == (2, tiny.config().model.encoder.dims[-1])


def test_parameters_lie_on_one_device_or_whole_on_each_of_a_mesh(untrained):
  mesh = sharding.make_mesh(4)
  _, one, _ = mcjepa_jax.load(untrained)
  _, four, _ = mcjepa_jax.load(untrained, mesh=mesh)
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
    assert x.devices() == {jax.local_devices()[0]}
    assert y.devices() == set(mesh.devices.flat) and y.is_fully_replicated
    np.testing.assert_array_equal(x, y)
