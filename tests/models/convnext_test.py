"""ConvNeXt against timm, and what timm does not have."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mcjepa_jax.models import convnext

TINY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))


@pytest.fixture(scope="module")
def timm_convnext():
  """timm's class, also where torchvision's compiled operators are missing.

  A torchvision built for another torch cannot load them, and then dies as it
  registers fake versions of the two that it never declared.
  """
  try:
    import torchvision  # noqa: F401
  except (RuntimeError, AttributeError):
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
  return pytest.importorskip("timm.models.convnext").ConvNeXt


def _randomized(params):
  """The same tree with nothing left at zero or one, so that each leaf counts."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params
  )


def _init(model, size=(64, 64)):
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *size, 3)))


def _timm_state(params):
  """A torch state dict under timm's names."""
  state = {}
  for path, value in jax.tree_util.tree_leaves_with_path(params["params"]):
    name = ".".join(key.key for key in path)
    name = re.sub(r"(stem|stages|blocks|downsample)_(\d)", r"\1.\2", name)
    name = re.sub(r"^norm\.", "head.norm.", name)
    name = re.sub(r"(kernel|scale)$", "weight", name)
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
    state[name] = torch.tensor(np.transpose(value, axes))
  return state


@pytest.mark.parametrize(
    "sizes, conv_mlp, layer_scale",
    [(convnext.VARIANTS["atto"], True, None), (TINY, False, 0.5)],
    ids=["atto", "tiny_with_layer_scale"],
)
def test_stage_outputs_equal_timm(timm_convnext, sizes, conv_mlp, layer_scale):
  model = convnext.ConvNeXt(**sizes, stem="patch", layer_scale=layer_scale)
  params = _randomized(_init(model))
  reference = timm_convnext(
      **sizes, conv_mlp=conv_mlp, ls_init_value=layer_scale, num_classes=0
  ).eval()
  state = _timm_state(params)
  shapes = {name: p.shape for name, p in reference.state_dict().items()}
  assert state.keys() == shapes.keys()
  # conv_mlp only adds two axes of size 1 to fc1 and fc2.
  reference.load_state_dict({k: v.reshape(shapes[k]) for k, v in state.items()})

  images = np.random.default_rng(1).uniform(size=(2, 64, 96, 3))
  pyramid = jax.jit(model.apply)(params, images.astype(np.float32))
  x = (images - convnext.IMAGENET_MEAN) / convnext.IMAGENET_STD
  with torch.no_grad():
    expected = reference.forward_intermediates(
        torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32),
        intermediates_only=True,
    )
  assert model.strides == (4, 8, 16, 32)
  for level, stage in zip(pyramid, expected, strict=True):
    stage = stage.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(level, stage, atol=1e-4, rtol=1e-4)


def test_split_stem_has_a_level_at_stride_2():
  model = convnext.ConvNeXt(**TINY)
  images = jnp.zeros((2, 64, 32, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), images)
  pyramid = jax.eval_shape(model.apply, params, images)
  assert model.strides == (2, 4, 8, 16, 32)
  assert [level.shape for level in pyramid] == [
      (2, 64 // stride, 32 // stride, dim)
      for stride, dim in zip(model.strides, (8, 8, 16, 24, 32), strict=True)
  ]


def test_stride_2_level_is_normalized_and_before_the_gelu():
  model = convnext.ConvNeXt(**TINY)
  params = _init(model)
  images = jax.random.uniform(jax.random.key(1), (1, 32, 32, 3))
  level = jax.jit(model.apply)(params, images)[0]
  np.testing.assert_allclose(level.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(level.std(-1), 1, atol=1e-2)


@pytest.mark.parametrize(
    "variant, millions", [("atto", 3.37), ("tiny", 27.82), ("large", 196.23)]
)
def test_patch_stem_has_the_known_number_of_parameters(variant, millions):
  # timm's own counts with num_classes=0 and layer scale on.
  model = convnext.ConvNeXt(
      **convnext.VARIANTS[variant], stem="patch", layer_scale=1e-6
  )
  shapes = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  count = sum(p.size for p in jax.tree.leaves(shapes))
  assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
  model = convnext.ConvNeXt(**TINY, dtype=jnp.bfloat16)
  images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
  params = _init(model, (32, 32))
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  pyramid = jax.eval_shape(model.apply, params, images)
  assert {level.dtype for level in pyramid} == {jnp.dtype("bfloat16")}
  pooled = jax.eval_shape(
      lambda p, x: model.apply(p, x, method="pool"), params, pyramid
  )
  assert pooled.dtype == jnp.float32 and pooled.shape == (2, 32)


def test_pool_normalizes_each_position_before_the_mean():
  model = convnext.ConvNeXt(**TINY)
  params = _init(model, (32, 32))
  level = jax.random.normal(jax.random.key(1), (2, 3, 3, 32))
  # A position ten times as loud counts as much as any other.
  louder = level.at[:, 0, 0].multiply(10)
  pooled = [model.apply(params, [x], method="pool") for x in (level, louder)]
  np.testing.assert_allclose(pooled[0], pooled[1], atol=1e-5)


def test_drop_path_drops_whole_branches_per_example_and_keeps_the_mean():
  block = convnext.Block()
  x = jnp.broadcast_to(
      jax.random.normal(jax.random.key(0), (1, 4, 4, 8)), (512, 4, 4, 8)
  )
  params = _randomized(block.init(jax.random.key(1), x[:1]))
  branch = block.apply(params, x[:1]) - x[:1]
  y = block.apply(params, x, drop_path=0.25, key=jax.random.key(2))
  scale = jnp.sum((y - x) * branch, (1, 2, 3)) / jnp.sum(branch**2)
  kept = scale > 0.5
  np.testing.assert_allclose(scale, jnp.where(kept, 1 / 0.75, 0), atol=1e-4)
  assert 0.68 < kept.mean() < 0.82


def _assert_near(x, y):
  np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def test_what_backward_computes_again_it_does_not_keep():
  images = jnp.asarray(
      np.random.default_rng(0).random((2, 64, 64, 3)), "float32"
  )
  plain = convnext.ConvNeXt(depths=(2, 3), dims=(8, 16), drop_path=0.5)
  params = _randomized(_init(plain))
  results, kept = {}, {}
  for remat in convnext.REMAT:
    model = plain.clone(remat=remat)
    assert jax.tree.structure(_init(model)) == jax.tree.structure(params)

    def loss(params, model=model):
      pyramid = model.apply(
          params,
          images,
          deterministic=False,
          rngs={"drop_path": jax.random.key(0)},
      )
      return sum(jnp.sum(jnp.sin(x)) for x in pyramid)

    results[remat] = jax.jit(jax.value_and_grad(loss))(params)
    residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
    kept[remat] = sum(x.size for x in jax.tree.leaves(residuals))
  for remat in ("stage", "block"):
    jax.tree.map(_assert_near, results[remat], results["none"])
  assert kept["stage"] < kept["block"] < 0.4 * kept["none"], kept


_PROOF = (pytest.mark.slow, pytest.mark.proof)


@pytest.mark.parametrize(
    "dtype, remat",
    [
        (jnp.float32, "none"),
        pytest.param(jnp.float32, "block", marks=_PROOF),
        pytest.param(jnp.bfloat16, "none", marks=_PROOF),
    ],
)
def test_a_loop_over_blocks_is_the_blocks_in_turn(dtype, remat):
  images = jnp.asarray(
      np.random.default_rng(0).random((3, 32, 32, 3)), "float32"
  )
  plain = convnext.ConvNeXt(
      depths=(2, 3), dims=(8, 16), drop_path=0.5, layer_scale=0.1, dtype=dtype,
      remat=remat, loop=False,
  )  # fmt: skip
  looped = plain.clone(loop=True)
  params = _randomized(_init(plain))
  assert jax.tree.structure(_init(looped)) == jax.tree.structure(params)

  def loss(model, params):
    pyramid = model.apply(
        params,
        images,
        deterministic=False,
        batch_rows=(jnp.array([4, 0, 2]), 6),
        rngs={"drop_path": jax.random.key(0)},
    )
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in pyramid)

  results = [
      jax.jit(jax.value_and_grad(lambda p, model=model: loss(model, p)))(params)
      for model in (plain, looped)
  ]
  if dtype == jnp.float32:
    jax.tree.map(_assert_near, *results)
  else:
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-2)
  sizes = [
      len(str(jax.make_jaxpr(functools.partial(loss, model))(params)))
      for model in (plain, looped)
  ]
  assert sizes[1] < 0.7 * sizes[0]


def test_an_unknown_remat_is_refused():
  model = convnext.ConvNeXt(**TINY, remat="layer")
  with pytest.raises(ValueError, match="remat is one of"):
    _init(model)


def test_drop_path_rates_grow_linearly_over_all_blocks():
  model = convnext.ConvNeXt(**TINY, drop_path=0.4)
  stages = model.bind({}).stages
  rates = [rate for stage in stages for rate in stage.drop_paths]
  np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    "stem, size", [("split", (48, 64)), ("patch", (64, 8))]
)
def test_a_size_that_the_coarsest_stride_does_not_divide_is_refused(stem, size):
  model = convnext.ConvNeXt(**TINY, stem=stem)
  images = jnp.zeros((1, *size, 3))
  with pytest.raises(ValueError, match=f"multiples of 32.*{size[0]}x{size[1]}"):
    jax.eval_shape(model.init, jax.random.key(0), images)


def test_an_unknown_stem_is_refused():
  model = convnext.ConvNeXt(**TINY, stem="overlap")
  with pytest.raises(ValueError, match="'overlap'"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
