import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax.data.sets import synthetic
from mcjepa_jax.distributed import sharding
from mcjepa_jax.losses import content_objective, vicreg
from mcjepa_jax.step import batch_loss, task_schedule, train_state
from mcjepa_jax.training import build
from tests.helpers import arrays, tiny


def _host(tree):
  return jax.tree.map(np.array, tree)


def _norm(tree):
  return float(
      np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
  )


def _take(kind):
  names = {"content": "views", "motion": "frames"}
  keys = [names[task] for task in task_schedule.tasks(kind)]
  return {key: tiny.batch()[key] for key in keys}


def _gradient(cfg, batch, *, devices=1, groups=("encoder",)):
  model, recipe = build.model(cfg), build.recipe(cfg)
  mesh = sharding.make_mesh(devices)
  params = train_state.init_state(model, build.optimizers(cfg), 0).params

  def loss(moving, batch):
    return batch_loss.loss_fn(
        params | moving, model, batch, jax.random.key(0), jnp.array(5), recipe
    )

  moving = {g: params[g] for g in groups}
  function = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, logs), grads = function(moving, sharding.to_global(batch, mesh))
  return float(value), _host(logs), _host(grads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        ("both", {"encoder", "expander", "estimator"}),
        ("content", {"encoder", "expander"}),
        ("motion", {"encoder", "estimator"}),
        ("estimator", {"estimator"}),
    ],
)
def test_a_step_moves_its_groups_and_leaves_the_others_bit_equal(kind, moved):
  state, function, mesh = tiny.state_and_step(tiny.config(), kind)
  before = _host(state)
  state, logs = function(state, sharding.to_global(_take(kind), mesh))
  after = _host(state)
  assert np.isfinite(logs["loss"])
  for group in before.params:
    same = arrays.trees_equal(before.params[group], after.params[group])
    assert same == (group not in moved), group
    # The optimizer's state holds the count of its updates.
    same = arrays.trees_equal(before.opt_state[group], after.opt_state[group])
    assert same == (group not in moved), group


def test_a_step_reads_frames_and_views_and_nothing_else():
  state, function, mesh = tiny.state_and_step(tiny.config(), "content")
  batch = sharding.to_global(tiny.batch(), mesh)
  with pytest.raises(ValueError, match=r"reads \['views'\]"):
    function(state, batch)


@pytest.mark.slow
def test_the_combined_gradient_is_the_weighted_sum_of_the_tasks():
  cfg = tiny.config(motion__weight=0.3)
  batch = tiny.batch()
  _, _, both = _gradient(cfg, batch)
  _, _, content = _gradient(cfg, {"views": batch["views"]})
  cfg = tiny.config(motion__weight=1.0)
  _, _, motion = _gradient(cfg, {"frames": batch["frames"]})
  expected = jax.tree.map(lambda c, m: c + 0.3 * m, content, motion)
  error = _norm(jax.tree.map(np.subtract, both, expected))
  assert error / _norm(expected) < 1e-5


@pytest.mark.proof
@pytest.mark.slow
def test_every_term_with_a_weight_is_logged_unweighted():
  cfg = tiny.config()
  _, logs, _ = _gradient(cfg, tiny.batch())
  expected = {f"content/{kind}" for kind in content_objective.CONTENT_KINDS}
  for kind, weights in cfg.motion.terms.items():
    expected |= {f"motion/{kind}/{s}" for s, w in weights.items() if w}
  terms = {k for k in logs if k.startswith(("content/", "motion/"))}
  assert terms == expected
  cfg = tiny.config(
      content__terms__invariance=50.0, motion__terms__cycle__stride_8=9.0
  )
  _, other, _ = _gradient(cfg, tiny.batch())
  for name in expected:
    np.testing.assert_allclose(other[name], logs[name], rtol=1e-6)
  assert other["loss"] > logs["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices", [pytest.param(2, marks=pytest.mark.proof), 8]
)
def test_loss_and_gradient_do_not_depend_on_the_number_of_devices(devices):
  cfg, batch = tiny.config(), tiny.batch()
  groups = ("encoder", "expander", "estimator")
  loss, _, one = _gradient(cfg, batch, groups=groups)
  other_loss, _, many = _gradient(cfg, batch, devices=devices, groups=groups)
  assert abs(other_loss - loss) / loss < 1e-6
  difference = jax.tree.map(np.subtract, one, many)
  assert _norm(difference) / _norm(one) < 1e-5


@pytest.mark.proof
@pytest.mark.slow
def test_statistics_of_each_shard_would_miss_by_far(monkeypatch):
  cfg, batch = tiny.config(), {"views": tiny.batch()["views"]}
  groups = ("encoder", "expander")
  _, _, whole = _gradient(cfg, batch, groups=groups)
  variance, covariance = vicreg.variance_loss, vicreg.covariance_loss

  def per_shard(function):
    return lambda z: jnp.mean(jnp.stack([function(s) for s in jnp.split(z, 2)]))

  monkeypatch.setattr(vicreg, "variance_loss", per_shard(variance))
  monkeypatch.setattr(vicreg, "covariance_loss", per_shard(covariance))
  _, _, sharded = _gradient(cfg, batch, groups=groups)
  difference = jax.tree.map(np.subtract, whole, sharded)
  assert _norm(difference) / _norm(whole) > 1e-2


@pytest.mark.slow
def test_large_parameters_are_sharded_and_the_state_keeps_its_shardings():
  cfg = tiny.config()
  state, function, mesh = tiny.state_and_step(
      cfg, "both", devices=8, min_mib=0.0005
  )
  before = jax.tree.map(lambda x: x.sharding, state)
  kernel = state.params["expander"]["fc_1"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 8
  state, _ = function(state, sharding.to_global(tiny.batch(), mesh))
  after = jax.tree.map(lambda x: x.sharding, state)
  assert jax.tree.all(jax.tree.map(lambda a, b: a == b, before, after))


@pytest.mark.proof
@pytest.mark.slow
def test_parameters_sharded_in_each_half_of_the_devices_learn_the_same():
  results = []
  for data in (1, 2):
    state, function, mesh = tiny.state_and_step(
        tiny.config(), "both", devices=8, data=data, min_mib=0.0005
    )
    state, logs = function(state, sharding.to_global(tiny.batch(), mesh))
    assert mesh.devices.shape == (data, 8 // data)
    specs = [x.sharding.spec for x in jax.tree.leaves(state)]
    assert {name for spec in specs for name in spec} == {None, "shard"}
    kernel = state.params["expander"]["fc_1"]["kernel"]
    shard = kernel.addressable_shards[0].data
    assert shard.size == kernel.size // (8 // data)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    results.append((float(logs["loss"]), _host(moments), _host(state.params)))
  # Adam's first step is the gradient's sign: where that is zero but for noise,
  # a parameter moves by a whole step, up or down.
  for one, other, most in zip(*results, (1e-5, 1e-5, 1e-4), strict=True):
    difference = jax.tree.map(np.subtract, one, other)
    assert _norm(difference) / _norm(one) < most


@pytest.mark.slow
def test_the_old_state_is_donated():
  state, function, mesh = tiny.state_and_step(tiny.config(), "content")
  old = state.params["encoder"]["stem_0"]["kernel"]
  function(state, sharding.to_global(_take("content"), mesh))
  assert old.is_deleted()


@pytest.mark.slow
def test_accumulation_of_motion_equals_the_whole_batch():
  # L_vc's statistics are of a micro-batch, so it is left out here.
  changes = {
      f"motion__terms__{kind}__stride_8": 0.0
      for kind in ("variance", "covariance")
  } | {"motion__out_of_frame": False, "motion__occlusion": "none"}
  batch = {"frames": tiny.batch()["frames"]}
  results = []
  for count in (1, 2):
    cfg = tiny.config(accumulate=count, optimizer__clip_norm=0.0, **changes)
    state, function, mesh = tiny.state_and_step(cfg, "motion")
    _, logs = function(state, sharding.to_global(batch, mesh))
    results.append(_host(logs))
  for name in ("loss", "gradient_norm/encoder", "gradient_norm/estimator"):
    np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5)


@pytest.mark.slow
def test_no_motion_term_is_computed_before_flow_start():
  assert task_schedule.kind_at("combined", 2, 3) == "content"
  assert task_schedule.kind_at("combined", 3, 3) == "both"
  _, logs, _ = _gradient(tiny.config(), {"views": tiny.batch()["views"]})
  assert not any(name.startswith("motion/") for name in logs)


@pytest.mark.slow
def test_noise_for_ground_truth_leaves_the_training_bit_identical(monkeypatch):
  def noisy(getitem):
    def replaced(self, index):
      record, rng = getitem(self, index), np.random.default_rng(index)
      seen = ("frame_1", "frame_2", "image")
      return {
          key: value if key in seen else rng.normal(size=np.shape(value))
          for key, value in record.items()
      }

    return replaced

  cfg = tiny.config()
  trained = []
  first, function, mesh = tiny.state_and_step(cfg, "both")
  initial = _host(first)
  for noise in (False, True):
    if noise:
      for source in (synthetic.Pairs, synthetic.Images):
        monkeypatch.setattr(source, "__getitem__", noisy(source.__getitem__))
      example = synthetic.Pairs(seed=0, num_examples=1)[0]
      assert np.asarray(example["label"]).dtype.kind == "f"
    state = jax.tree.map(jax.device_put, initial)
    streams = build.streams(cfg)
    for number in range(2):
      batch = streams["content"][number][0] | streams["motion"][number][0]
      state, _ = function(state, sharding.to_global(batch, mesh))
    trained.append(_host(state.params))
  jax.tree.map(np.testing.assert_array_equal, *trained)
  moved = jax.tree.map(np.array_equal, trained[0], initial.params)
  assert not jax.tree.all(moved)
