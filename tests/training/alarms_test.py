"""Each alarm, fired by a training that goes wrong in its way."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax import errors, train
from mcjepa_jax.data.sets import synthetic
from mcjepa_jax.distributed import sharding
from mcjepa_jax.losses import flow_losses
from mcjepa_jax.ops import occlusion, representation
from mcjepa_jax.step import diagnostics, train_state
from mcjepa_jax.training import alarms, build
from tests.helpers import tiny

_STEPS = 40
_SOON = dict(
    mesh__devices=1,
    num_steps=_STEPS,
    log_every=1,
    save_every=1000,
    alarms__warm_up=5,
    alarms__window=5,
    alarms__diagnoses=2,
    alarms__diagnose_every=0,
    optimizer__encoder__learning_rate=1e-2,
)
_COLLAPSE = dict(mode="content", content__terms__variance=0.0)


def _fired(workdir, **changes):
  """The alarms of a run by name, each with the step where it first fired."""
  results = train.train(tiny.config(**_SOON | changes), workdir)
  path = workdir / "alarms.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  first = {}
  for line in map(json.loads, lines):
    first.setdefault(line["alarm"], line["step"])
  counted = {k: n for k, n in results.items() if k.startswith("alarm/") and n}
  assert set(counted) == {f"alarm/{name}" for name in first}
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  assert {k: last[k] for k in counted} == counted
  return first


@pytest.mark.proof
@pytest.mark.slow
def test_a_collapse_of_the_embeddings(tmp_path):
  fired = _fired(
      tmp_path,
      **_COLLAPSE,
      alarms__diagnose_every=5,
      # Of eight embeddings with 16 dimensions any two are correlated.
      alarms__most_correlation=0.1,
  )
  assert {"embedding_std", "rank_me", "correlation"} <= set(fired)
  # The warm-up and a window; one value is not judged.
  assert all(step >= 9 for step in fired.values())


@pytest.mark.proof
@pytest.mark.slow
def test_flow_that_is_the_same_everywhere_occludes_nothing(tmp_path):
  fired = _fired(
      tmp_path,
      mode="motion",
      motion__occlusion="forward_backward",
      motion__terms__smoothness__stride_1=0.5e4,
  )
  assert {"constant_flow", "occluded"} <= set(fired)


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.5, 0.5e4])
def test_smooth_flow_of_scenes_that_mostly_stand_still_is_zero(
    tmp_path, monkeypatch, weight
):
  plain = synthetic.scene_layers

  def standing(*args):
    still = dict(translation=(0.0, 0.0), rotation=0.0, log_zoom=0.0)
    return [
        # The background and the main object; the small ones move.
        dataclasses.replace(layer, **still) if layer.segment < 2 else layer
        for layer in plain(*args)
    ]

  monkeypatch.setattr(synthetic, "scene_layers", standing)
  fired = _fired(
      tmp_path, mode="motion", motion__terms__smoothness__stride_1=weight
  )
  assert ("zero_flow" in fired) == (weight > 1)


@pytest.mark.proof
@pytest.mark.slow
def test_flow_that_cannot_leave_zero_explains_nothing(tmp_path):
  fired = _fired(tmp_path, mode="motion", model__estimator__max_flow=1e-3)
  assert {"zero_flow", "photometric"} <= set(fired)


@pytest.mark.proof
@pytest.mark.slow
def test_a_mask_that_occludes_everything(tmp_path, monkeypatch):
  monkeypatch.setattr(
      occlusion, "visible_range_map", lambda flow: jnp.zeros_like(flow[..., :1])
  )
  fired = _fired(tmp_path, mode="motion", motion__occlusion="range_map")
  assert "occluded" in fired


def _motion_terms(**weights):
  """The weights of motion's terms, all others off; `variance_8=1.0`."""
  off = {
      f"motion__terms__{kind}__stride_{stride}": 0.0
      for kind in ("regression", "cycle", "variance", "covariance")
      for stride in (8, 16)
  } | {
      f"motion__terms__{kind}__stride_1": 0.0
      for kind in ("reconstruction", "smoothness")
  }
  on = {}
  for name, weight in weights.items():
    kind, stride = name.split("_")
    on[f"motion__terms__{kind}__stride_{stride}"] = weight
  return off | on


@pytest.mark.proof
@pytest.mark.slow
def test_features_that_forget_their_images(tmp_path):
  fired = _fired(
      tmp_path, alarms__diagnose_every=4, **_motion_terms(regression_8=1e3)
  )
  # At the default bounds, all four.
  assert {"feature_std", "embedding_std", "rank_me", "correlation"} <= set(
      fired
  )


@pytest.mark.proof
@pytest.mark.slow
def test_a_task_that_no_longer_counts(tmp_path):
  fired = _fired(
      tmp_path, motion__weight=1e-8, alarms__diagnose_every=5, num_steps=16
  )
  assert {"gradient_share", "gradient_norm"} <= set(fired)


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_tasks_of_which_one_undoes_what_the_other_does(
    tmp_path, monkeypatch, sign
):
  plain = flow_losses.feature_variance_loss
  # Both tasks spread the features; or one of them with the wrong sign.
  monkeypatch.setattr(
      flow_losses, "feature_variance_loss", lambda x: sign * plain(x)
  )
  fired = _fired(
      tmp_path,
      content__batch_size=64,
      content__jitter__p=0.0,
      content__gray=0.0,
      content__terms__invariance=0.0,
      content__terms__covariance=0.0,
      motion__batch_size=32,
      optimizer__encoder__learning_rate=1e-4,
      alarms__diagnose_every=4,
      num_steps=16,
      **_motion_terms(variance_16=100.0),
  )
  assert ("gradient_cosine" in fired) == (sign < 0)


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "words"),
    [("stop", "step 9: embedding_std"), ("rollback", "rolled back 1 times")],
)
def test_an_alarm_ends_the_run_where_the_config_says_so(
    tmp_path, action, words
):
  cfg = tiny.config(
      **_SOON
      | _COLLAPSE
      | dict(
          alarms__action=action, alarms__rollbacks=1, save_every=4, keep_last=3
      )
  )
  with pytest.raises(errors.Stop, match=words) as caught:
    train.train(cfg, tmp_path)
  assert caught.value.code == errors.EXIT_ALARM
  saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
  if action == "rollback":
    lines = map(json.loads, (tmp_path / "alarms.jsonl").open())
    (back,) = {x["step"] for x in lines if x["alarm"] == "rollback"}
    # Before the window that was judged; the first step from there is saved.
    assert back <= 4 and back + 1 in saved


@pytest.mark.slow
def test_tasks_that_alternate_are_compared_on_two_batches(tmp_path):
  fired = _fired(
      tmp_path,
      mode="alternate",
      motion__start_step=0,
      alarms__warm_up=0,
      alarms__diagnose_every=2,
      alarms__least_gradient_share=1.0,
      num_steps=6,
  )
  assert "gradient_share" in fired
  lines = map(json.loads, (tmp_path / "metrics.jsonl").open())
  compared = [x["step"] for x in lines if "diagnosis/gradient_cosine" in x]
  assert compared == [2, 4]


@pytest.mark.proof
@pytest.mark.slow
def test_a_diagnosis_in_parts_is_that_of_the_whole_batch():
  found = []
  for parts, how in ((1, "plain"), (2, "exact"), (2, "plain")):
    cfg = tiny.config(accumulate=parts, accumulation=how)
    mesh = build.mesh(cfg)
    model = build.model(cfg)
    state = train_state.init_state(model, build.optimizers(cfg), 0)
    diagnose = diagnostics.Diagnosis(model, build.recipe(cfg), mesh)
    found.append(diagnose(state, sharding.to_global(tiny.batch(), mesh)))
  assert found[0] == pytest.approx(found[1], rel=1e-4)
  assert found[0] != pytest.approx(found[2], rel=1e-2)


def test_a_run_of_one_task_compares_none():
  for mode in ("content", "motion"):
    names = {rule.name for rule in alarms.rules(tiny.config(mode=mode))}
    assert names and not names & {"gradient_share", "gradient_cosine"}


def test_alarms_wait_for_their_task_and_for_the_masks():
  cfg = tiny.config(
      motion__start_step=100,
      motion__occlusion_start=50,
      alarms__warm_up=10,
      alarms__diagnose_every=20,
      alarms__diagnoses=3,
  )
  rules = {rule.name: rule for rule in alarms.rules(cfg)}
  starts = {name: rule.start for name, rule in rules.items()}
  assert starts["embedding_std"] == 10 and starts["zero_flow"] == 110
  assert starts["occluded"] == 160
  assert rules["rank_me"].lasts == 60
  only = {rule.name for rule in alarms.rules(tiny.config(mode="content"))}
  assert only == {"embedding_std", "rank_me", "correlation", "gradient_norm"}


def test_correlation_is_that_of_numpy():
  z = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
  z[:, 3] = -2 * z[:, 2] + 1
  matrix = np.abs(np.corrcoef(z.T))
  expected = (matrix.sum() - 6) / 30
  found = representation.correlation(jnp.asarray(z))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  repeated = jnp.asarray(np.repeat(z[:, :1], 4, axis=1))
  np.testing.assert_allclose(representation.correlation(repeated), 1, rtol=1e-5)
  assert representation.correlation(jnp.ones((8, 3))) == 0
