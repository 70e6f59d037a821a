"""Exact accumulation against the step that takes the batch whole."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.distributed import sharding
from mcjepa_jax.losses import flow_losses, vicreg
from mcjepa_jax.models import convnext, mcjepa
from mcjepa_jax.step import accumulation, augmentation, batch_loss, gradients
from mcjepa_jax.training import build
from tests.helpers import tiny

_KEY, _STEP = 0, 5


def _config(**changes):
  """Masks that depend on the flow, both augmentations, drop path, L_vc twice."""
  return tiny.config(
      model__encoder__drop_path=0.5,
      motion__batch_size=8,
      content__batch_size=8,
      motion__erase=0.5,
      motion__ramp_steps=0,
      motion__start_step=0,
      motion__weight=1.0,
      motion__terms__variance__stride_16=0.5,
      motion__terms__covariance__stride_4=0.5,
      **changes,
  )


@functools.cache
def _start(devices):
  cfg = _config()
  batch = sharding.to_global(tiny.batch(8, 8), sharding.make_mesh(devices))
  model = build.model(cfg)
  params = sharding.call_once(lambda: mcjepa.init_params(model, 0))
  return params, batch


@functools.cache
def _gradient(how, count=1, devices=1, tasks=("frames", "views")):
  cfg = _config(accumulate=count, accumulation=how)
  model, recipe = build.model(cfg), build.recipe(cfg)
  params, batch = _start(devices)
  batch = {k: batch[k] for k in tasks}

  def gradient(params, batch):
    key, step = jax.random.key(_KEY), jnp.array(_STEP)
    if how == "exact":
      return gradients.exact_value_and_grad(
          params, {}, model, batch, key, step, recipe
      )

    def loss(params, batch, key):
      return batch_loss.loss_fn(params, model, batch, key, step, recipe)

    return gradients._value_and_grad(loss, params, batch, key, count)

  # What takes LLVM its time is speed, of which nothing is asked here.
  compiled = jax.jit(
      gradient, compiler_options={"xla_backend_optimization_level": "0"}
  )
  return jax.device_get(compiled(params, batch))


def _distance(grads, others):
  def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))

  return norm(jax.tree.map(np.subtract, grads, others)) / norm(others)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count",
    [*(pytest.param(n, marks=pytest.mark.proof) for n in (1, 4)), 2],
)
def test_the_gradient_is_that_of_the_whole_batch(count):
  logs, grads = _gradient("exact", count)
  whole_logs, whole = _gradient("plain")
  assert _distance(grads, whole) < 1e-5
  for group in mcjepa.GROUPS:
    assert _distance(grads[group], whole[group]) < 1e-5, group
  assert logs.keys() == whole_logs.keys()
  for name in logs:
    if name.startswith(("loss", "content/", "motion/", "feature_std/p")):
      np.testing.assert_allclose(logs[name], whole_logs[name], rtol=2e-5)
  if count > 1:  # which plain accumulation misses by far
    assert _distance(_gradient("plain", count)[1], whole) > 1e-2


@pytest.mark.proof
@pytest.mark.slow
def test_the_gradient_does_not_depend_on_the_devices():
  _, grads = _gradient("exact", 2, devices=8)
  _, whole = _gradient("plain")
  assert _distance(grads, whole) < 1e-5


@pytest.mark.proof
@pytest.mark.slow
def test_a_step_accumulates_as_its_config_says():
  results = []
  batch = {"views": tiny.batch(8, 8)["views"]}
  for changes in ({}, dict(accumulate=4, accumulation="exact")):
    state, function, mesh = tiny.state_and_step(_config(**changes), "content")
    _, logs = function(state, sharding.to_global(batch, mesh))
    results.append(jax.device_get(logs))
  assert results[0].keys() == results[1].keys()
  for name, value in results[0].items():
    np.testing.assert_allclose(results[1][name], value, rtol=1e-5)


def test_covariance_of_parts_is_that_of_all():
  rng = np.random.default_rng(0)
  # A mean far above the spread, where a difference of squares would lose it.
  x = jnp.asarray(30 + rng.normal(size=(4, 50, 6)), jnp.float32)
  parts = [accumulation.moments(part.reshape(2, 5, 5, 6)) for part in x]
  means, within = jnp.stack([m for m, _ in parts]), sum(c for _, c in parts)
  covariance = accumulation.covariance(means, within, 200)
  flat = x.reshape(200, 6)
  expected = np.cov(np.asarray(flat, np.float64), rowvar=False)
  np.testing.assert_allclose(covariance, expected, atol=2e-6)
  np.testing.assert_allclose(
      vicreg.std_hinge(jnp.diag(covariance) / 4),
      vicreg.variance_loss(flat / 2),
      rtol=1e-5,
  )
  np.testing.assert_allclose(
      vicreg.off_diagonal(covariance), vicreg.covariance_loss(flat), rtol=1e-4
  )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_micro_batches_keep_pairs_and_come_back(count):
  x = jnp.arange(24).reshape(12, 2)
  micro = accumulation.micro_batches(x, count)
  assert micro.shape == (count, 12 // count, 2)
  np.testing.assert_array_equal(micro[:, 1::2, 0], micro[:, ::2, 0] + 2)
  np.testing.assert_array_equal(accumulation.whole(micro), x)


@pytest.mark.slow
def test_a_part_of_a_batch_draws_what_it_would_in_the_whole():
  images = jnp.asarray(tiny.batch(8, 8)["views"])
  indices = jnp.array([2, 3, 6, 7, 14, 15])
  key = jax.random.key(1)
  encoder = convnext.ConvNeXt(depths=(2,), dims=(4,), drop_path=0.9)
  params = jax.jit(encoder.init)(key, jnp.zeros((1, 4, 4, 3)))

  def pooled(images, batch_rows):
    pyramid = encoder.apply(
        params,
        images / 255.0,
        deterministic=False,
        batch_rows=batch_rows,
        rngs={"drop_path": key},
    )
    return pyramid[-1]

  for augmented in (
      lambda x, indices: augmentation.content_views(x, key, indices=indices),
      lambda x, indices: augmentation.motion_frames(
          x, key, erase_probability=0.5, indices=indices
      )[1],
      lambda x, indices: pooled(
          x, indices if indices is None else (indices, len(images))
      ),
  ):
    augmented = jax.jit(augmented)
    whole = augmented(images, None)
    part = augmented(images[indices], indices)
    np.testing.assert_allclose(part, whole[indices], atol=1e-5)
    moved = augmented(images[indices], None)
    assert np.max(np.abs(moved - whole[indices])) > 1e-2


def test_means_over_masks_count_the_pixels_of_all_micro_batches():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(8, 4, 4, 3)), jnp.float32)
  mask = jnp.asarray(rng.random((8, 4, 4, 1)) < 0.3, jnp.float32)
  mask = mask.at[:4].set(0)  # nothing counts in the first micro-batch

  def forward(params, micro, indices, mean):
    # Two maps of one call each, so that the order of the counts matters.
    loss = mean(params * micro["x"], micro["mask"])
    loss += 2 * mean(params * jnp.square(micro["x"]), 1 - micro["mask"])
    return (loss, {"loss": loss}), {}, {}

  def finish(params, rows, sums):
    return jnp.zeros(()), {}

  def expected(params):
    mean = flow_losses.masked_mean
    return mean(params * x, mask) + 2 * mean(params * jnp.square(x), 1 - mask)

  logs, gradient = accumulation.value_and_grad(
      forward, finish, jnp.ones(()), {"x": x, "mask": mask}, 2
  )
  np.testing.assert_allclose(logs["loss"], expected(1.0), rtol=1e-6)
  np.testing.assert_allclose(gradient, jax.grad(expected)(1.0), rtol=1e-6)


def test_batch_normalisation_is_refused_with_its_place():
  class Expander(mcjepa.Expander):

    @nn.compact
    def __call__(self, x):
      return nn.BatchNorm(use_running_average=False, name="norm_0")(x)

  cfg = _config(accumulate=2, accumulation="exact", mode="content")
  model = dataclasses.replace(build.model(cfg), expander=Expander())
  params = jax.eval_shape(lambda: mcjepa.init_params(model, 0))
  views = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8)

  def gradient(params, views):
    return gradients.exact_value_and_grad(
        params,
        {},
        model,
        {"views": views},
        jax.random.key(0),
        jnp.array(0),
        build.recipe(cfg),
    )

  with pytest.raises(errors.UserError, match="got .*expander/norm_0"):
    jax.eval_shape(gradient, params, views)


@pytest.mark.proof
@pytest.mark.slow
def test_the_loop_that_accelerators_run_gives_the_same(monkeypatch):
  # Of the images alone: the CPU's compiler spoils the warps' gradient there.
  monkeypatch.setattr(accumulation, "unroll", lambda count: 1)
  _, rolled = _gradient.__wrapped__("exact", 2, tasks=("views",))
  _, whole = _gradient("plain", tasks=("views",))
  assert _distance(rolled, whole) < 1e-5
