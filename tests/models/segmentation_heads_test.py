import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mcjepa_jax.models import segmentation_heads as heads


def _stages(sides=(16, 8, 4, 2), dims=(4, 6, 8, 10), *, n=2, seed=0):
  rng = np.random.default_rng(seed)
  return [
      jnp.asarray(rng.normal(size=(n, s, s + s // 2, c)), jnp.float32)
      for s, c in zip(sides, dims, strict=True)
  ]


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(16, 16), (7, 5), (4, 9)])
def test_adaptive_mean_is_torchs(bins, size):
  x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
  ours = heads.adaptive_mean(jnp.asarray(x), bins)
  peer = torch.nn.functional.adaptive_avg_pool2d(
      torch.from_numpy(x).permute(0, 3, 1, 2), bins
  )
  np.testing.assert_allclose(ours, peer.permute(0, 2, 3, 1), atol=1e-6)


def test_the_linear_head_is_batchnorm_and_one_matrix():
  stages = _stages()
  head = heads.LinearHead(5)
  variables = head.init(jax.random.key(0), stages, train=False)
  shapes = jax.tree.map(lambda x: x.shape, variables["params"])
  assert shapes["classifier"]["kernel"] == (1, 1, 4 + 6 + 8 + 10, 5)
  assert set(shapes) == {"norm", "classifier"}
  (logits,), updated = head.apply(
      variables, stages, train=True, mutable=["batch_stats"]
  )
  assert logits.shape == (2, 16, 24, 5)
  # As torch: bilinear to the finest stage, then statistics over all pixels.
  resized = [
      torch.nn.functional.interpolate(
          torch.from_numpy(np.array(x)).permute(0, 3, 1, 2),
          size=(16, 24), mode="bilinear", align_corners=False,
      )
      for x in stages
  ]  # fmt: skip
  norm = torch.nn.BatchNorm2d(28)
  y = norm(torch.cat(resized, dim=1)).detach().permute(0, 2, 3, 1).numpy()
  kernel = np.asarray(variables["params"]["classifier"]["kernel"])[0, 0]
  np.testing.assert_allclose(logits, y @ kernel, atol=1e-5)
  mean = updated["batch_stats"]["norm"]["mean"]
  np.testing.assert_allclose(mean, norm.running_mean.numpy(), atol=1e-6)


def test_uperhead_has_the_published_parts():
  head = heads.UperHead(150)
  stages = [
      jax.ShapeDtypeStruct((2, s, s, c), jnp.float32)
      for s, c in ((128, 96), (64, 192), (32, 384), (16, 768))
  ]
  variables = jax.eval_shape(
      lambda x: head.init(jax.random.key(0), x, train=False), stages
  )
  params = variables["params"]

  def kernel(name):
    return params[name]["conv"]["kernel"].shape

  # UPerHead and FCNHead of mmsegmentation with ConvNeXt-T's config.
  for scale in (1, 2, 3, 6):
    assert kernel(f"pool_{scale}") == (1, 1, 768, 512)
  assert kernel("bottleneck") == (3, 3, 768 + 4 * 512, 512)
  for i, dim in enumerate((96, 192, 384)):
    assert kernel(f"lateral_{i}") == (1, 1, dim, 512)
    assert kernel(f"fpn_{i}") == (3, 3, 512, 512)
  assert kernel("fpn_bottleneck") == (3, 3, 4 * 512, 512)
  assert kernel("auxiliary") == (3, 3, 384, 256)
  assert params["classifier"]["kernel"].shape == (1, 1, 512, 150)
  assert params["auxiliary_classifier"]["kernel"].shape == (1, 1, 256, 150)
  assert len(params) == 4 + 1 + 3 + 3 + 1 + 1 + 2 + 4  # and stage_norm_0 to 3


@pytest.mark.slow
def test_uperhead_sees_far_and_near():
  head = heads.UperHead(
      3, channels=8, pool_scales=(2,), auxiliary_channels=4, dropout=0.5
  )
  stages = _stages()

  # One program: op by op this compiles for minutes.
  @jax.jit
  def all_of_it(stages):
    variables = head.init(jax.random.key(0), stages, train=False)

    def corner(stages):
      logits, auxiliary = head.apply(variables, stages, train=False)
      return logits[0, 0, 0, 0], (logits, auxiliary)

    gradient, outputs = jax.grad(corner, has_aux=True)(stages)
    trained = [
        head.apply(
            variables, stages, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(key)},
        )[0][0]
        for key in (0, 1)
    ]  # fmt: skip
    return variables, gradient, outputs, trained

  variables, gradient, (logits, auxiliary), (one, two) = all_of_it(stages)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
  assert logits.shape == (2, 16, 24, 3)
  assert auxiliary.shape == (2, 4, 6, 3)
  near, *_, far = gradient
  # The pooled pyramid reaches the other end; the finest stage does not.
  assert np.abs(far[0, -1, -1]).max() > 0
  assert np.abs(near[0, :3, :3]).max() > 0
  assert np.abs(near[0, -4:, -4:]).max() == 0
  assert np.abs(near[1]).max() == 0
  assert np.abs(one - two).max() > 0
