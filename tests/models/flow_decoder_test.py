"""The decoder's shapes, counts, symmetry, precision and gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.models import flow_decoder

_STRIDES = (2, 4, 8, 16)
_DIMS = (4, 6, 8, 10)


def _pyramid(h: int = 32, w: int = 48, n: int = 4) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(0), len(_STRIDES))
  return [
      jax.random.normal(key, (n, h // stride, w // stride, dim))
      for key, stride, dim in zip(keys, _STRIDES, _DIMS, strict=True)
  ]


def _decoder(**kwargs) -> flow_decoder.FlowDecoder:
  fields = dict(strides=_STRIDES, finest_stride=4, factor=0.125, projection=4)
  return flow_decoder.FlowDecoder(**(fields | kwargs))


def _variables(decoder, pyramid):
  return jax.jit(decoder.init)(jax.random.key(1), pyramid)


def _louder(variables, factor: float):
  """The variables with flow heads that put out larger flows."""
  return jax.tree.map_with_path(
      lambda path, x: x * factor if "head" in jax.tree_util.keystr(path) else x,
      variables,
  )


@pytest.fixture(scope="module")
def variables():
  return _variables(_decoder(), _pyramid())


@pytest.mark.parametrize("factor, millions", [(1.0, 2.296), (2.0, 7.964)])
def test_estimator_and_context_have_the_stated_parameters(factor, millions):
  dims = (96, 96, 192, 384, 768)
  strides = (2, 4, 8, 16, 32)
  decoder = flow_decoder.FlowDecoder(strides=strides, factor=factor)
  pyramid = [
      jax.ShapeDtypeStruct((2, 64 // s, 64 // s, d), jnp.float32)
      for s, d in zip(strides, dims, strict=True)
  ]
  params = jax.eval_shape(decoder.init, jax.random.key(0), pyramid)["params"]

  def count(*names):
    return sum(x.size for x in jax.tree.leaves([params[k] for k in names]))

  np.testing.assert_allclose(
      count("estimator", "context") / 1e6, millions, atol=5e-4
  )
  projected = [f"project_{s}" for s in strides[1:]]
  assert count(*projected) == sum(32 * d + 32 for d in dims[1:])
  assert count(*[f"norm_{s}" for s in strides]) == 2 * sum(dims)
  assert len(params) == 2 + 4 + 5


@pytest.mark.slow
def test_flows_have_the_strides_and_sizes_of_their_levels(variables):
  pyramid = _pyramid()
  features, flows = jax.jit(_decoder().apply)(variables, pyramid)
  assert {s: f.shape for s, f in flows.items()} == {
      16: (4, 2, 3, 2),
      8: (4, 4, 6, 2),
      4: (4, 8, 12, 2),
  }
  # The level finer than the finest flow is normalised all the same.
  for x, y in zip(pyramid, features, strict=True):
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_new_decoder_hardly_moves(variables):
  _, flows = jax.jit(_decoder().apply)(variables, _pyramid())
  for flow in flows.values():
    assert 0 < jnp.abs(flow).max() < 1


def test_swapping_the_frames_swaps_the_directions(variables):
  pyramid = _pyramid()
  swapped = [x[jnp.array([1, 0, 3, 2])] for x in pyramid]
  apply = jax.jit(_decoder().apply)
  _, flows = apply(variables, pyramid)
  _, back = apply(variables, swapped)
  for stride, flow in flows.items():
    assert jnp.abs(flow[0] - flow[1]).max() > 1e-4
    np.testing.assert_allclose(
        back[stride], flow[jnp.array([1, 0, 3, 2])], atol=1e-5
    )


def test_a_pair_does_not_know_of_the_others(variables):
  pyramid = _pyramid()
  other = [x.at[2:].multiply(-2) for x in pyramid]
  apply = jax.jit(_decoder().apply)
  ours, theirs = apply(variables, pyramid)[1], apply(variables, other)[1]
  for stride, flow in ours.items():
    np.testing.assert_allclose(flow[:2], theirs[stride][:2], atol=1e-5)
    assert jnp.abs(flow[2:] - theirs[stride][2:]).max() > 1e-4


def test_flow_stays_within_max_flow_of_the_full_image(variables):
  loud = _louder(variables, 1e4)
  _, flows = jax.jit(_decoder(max_flow=24.0).apply)(loud, _pyramid())
  for stride, flow in flows.items():
    np.testing.assert_allclose(jnp.abs(flow).max(), 24.0 / stride)


@pytest.mark.slow
def test_gradient_reaches_every_parameter_and_every_level(variables):
  decoder, pyramid = _decoder(), _pyramid()
  weight = jax.random.normal(jax.random.key(2), (4, 8, 12, 2))

  @jax.jit
  def gradients(variables, pyramid):
    def loss(variables, pyramid):
      return jnp.sum(weight * decoder.apply(variables, pyramid)[1][4])

    return jax.grad(loss, argnums=(0, 1))(variables, pyramid)

  of_variables, of_pyramid = gradients(variables, pyramid)
  unused = of_variables["params"].pop("norm_2")
  assert not any(jnp.any(x) for x in jax.tree.leaves([unused, of_pyramid[0]]))
  for path, x in jax.tree.leaves_with_path([of_variables, of_pyramid[1:]]):
    assert jnp.isfinite(x).all() and jnp.any(x != 0), path


def test_bfloat16_keeps_parameters_and_flows_float32():
  decoder, pyramid = _decoder(dtype=jnp.bfloat16), _pyramid()
  variables = _variables(decoder, pyramid)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  features, flows = jax.jit(decoder.apply)(variables, pyramid)
  _, exact = jax.jit(_decoder().apply)(variables, pyramid)
  assert all(x.dtype == jnp.float32 for x in features)
  for stride, flow in flows.items():
    assert flow.dtype == jnp.float32
    error = jnp.abs(flow - exact[stride]).mean()
    assert 0 < error < 0.05 * jnp.abs(exact[stride]).mean()


def test_without_context_only_the_finest_flow_changes(variables):
  params = dict(variables["params"])
  del params["context"]
  decoder = _decoder(context=False)
  _, plain = jax.jit(decoder.apply)({"params": params}, _pyramid())
  _, flows = jax.jit(_decoder().apply)(variables, _pyramid())
  np.testing.assert_allclose(plain[8], flows[8], atol=1e-6)
  assert jnp.abs(plain[4] - flows[4]).max() > 1e-4


@pytest.mark.parametrize("dilation", [1, 4, 16])
def test_convolution_has_the_parameters_and_values_of_flax(dilation):
  x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
  theirs = nn.Conv(4, (3, 3), kernel_dilation=dilation)
  variables = jax.jit(theirs.init)(jax.random.key(1), x)
  ours = flow_decoder._Conv(4, dilation)
  np.testing.assert_allclose(
      jax.jit(ours.apply)(variables, x),
      jax.jit(theirs.apply)(variables, x),
      atol=1e-5,
  )


def test_unknown_finest_stride_is_refused_by_name():
  with pytest.raises(errors.UserError, match="finest_stride.*got 3"):
    _decoder(finest_stride=3).init(jax.random.key(0), _pyramid())
