"""An evaluation: what it refuses of a checkpoint, what it writes and when."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from mcjepa_jax import errors, evaluate, loading
from mcjepa_jax.distributed import sharding
from mcjepa_jax.evals import finetune, inference, registry
from mcjepa_jax.evals.adapters import image_adapter
from mcjepa_jax.storage import checkpoint
from tests.helpers import tiny


def _with_nan(workdir, at):
  """A workdir whose checkpoint has one parameter that is NaN."""
  cfg = tiny.config()
  state, _, _ = tiny.state_and_step(cfg, "both")
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: x.at[(0,) * x.ndim].set(jnp.nan)
      if jax.tree_util.keystr(path, simple=True, separator="/") == at
      else x,
      state.params,
  )
  meta = {"model": cfg.model.to_dict(), "seed": 0, "config": "tiny"}
  with checkpoint.Checkpoints(workdir) as checkpoints:
    checkpoints.save(3, state.replace(params=params), {}, meta)
  return workdir


@pytest.mark.parametrize(
    "at",
    ["encoder/stem_0/kernel", "estimator/estimator/head/conv/bias"],
)
def test_a_checkpoint_that_is_not_finite_is_refused_by_its_parameter(
    tmp_path, at
):
  cfg = tiny.config(
      task="evaluate",
      checkpoint=str(_with_nan(tmp_path / "w", at)),
      evals=("rankme/synthetic",),
      mesh__devices=1,
  )
  with pytest.raises(errors.UserError, match=f"NaN or infinity in {at}$"):
    evaluate.evaluate(cfg, tmp_path / "eval")


def test_features_that_are_not_finite_have_no_metric(untrained):
  mesh = sharding.make_mesh(1)
  model, params, _ = loading.load(untrained, mesh=mesh)
  params["encoder"]["norm"]["scale"] *= jnp.inf
  params["encoder"]["stages_0"]["blocks_0"]["mlp"]["fc2"]["bias"] *= jnp.nan
  images = np.zeros((2, 32, 32, 3), np.uint8)
  embed = inference.embedder(model, params, mesh)
  extract = inference.dense_extractor(model, params, mesh, size=32, stride=8)
  for features in (embed, extract):
    with pytest.raises(errors.UserError, match="got NaN or infinity"):
      features(images)


def test_the_checkpoints_own_strides_are_held_against_the_config(
    tmp_path, untrained, monkeypatch
):
  """The encoder there has the strides 2, 4, 8 and 16, the config's to 32."""
  monkeypatch.setattr(loading, "load", None)  # nothing is loaded
  # As if the sets were there.
  monkeypatch.setattr(registry, "faults", lambda *_: registry.Faults([], {}))
  cfg = tiny.config(
      quickstart, task="evaluate", checkpoint=str(untrained),
      model__encoder__depths=(1, 1, 1, 1),
      model__encoder__dims=(8, 8, 16, 16), davis__stride=32,
      segmentation__crop=40, upernet__crop=32, segmentation__stride=20,
      upernet__stride=20,
      evals=("davis/2016", "segmentation/camvid", "upernet/camvid"),
  )  # fmt: skip
  with pytest.raises(errors.UserError) as caught:
    evaluate.evaluate(cfg, tmp_path)
  told = [m for m in caught.value.messages if "stride" in m or "crop" in m]
  assert sorted(told) == [
      "davis.stride: expected one of (2, 4, 8, 16), the encoder's, got 32",
      "segmentation.crop: expected a multiple of 16, the encoder's coarsest"
      " stride, got 40",
  ]


@pytest.mark.slow
def test_fine_tuning_that_goes_astray_is_told(untrained):
  mesh = sharding.make_mesh(1)
  model, params, _ = loading.load(untrained, mesh=mesh)
  cfg = tiny.config()
  train, test = image_adapter._labelled(cfg, "synthetic")
  params["encoder"]["norm"]["scale"] *= jnp.nan
  with pytest.raises(errors.UserError, match="finetune.learning_rate"):
    finetune.run(
        "synthetic", model, {"": params}, [train[i] for i in range(8)],
        [test[i] for i in range(4)], num_classes=10, size=32, epochs=1,
        batch_size=4, learning_rate=1e-3, weight_decay=0.0, seed=0, mesh=mesh,
        progress=False,
    )  # fmt: skip


def test_what_has_ended_is_written_whatever_comes_after_it(
    tmp_path, untrained, monkeypatch
):
  def fine(subject, name):
    return {f"fine/{name}/metric": 1.0}

  def crashes(subject, name):
    raise np.linalg.LinAlgError("SVD did not converge")

  monkeypatch.setattr(
      registry,
      "_EVALS",
      {
          "fine": registry.Eval(lambda config, name: [0], fine),
          "crashes": registry.Eval(lambda config, name: [0], crashes),
      },
  )
  cfg = tiny.config(
      task="evaluate",
      checkpoint=str(untrained),
      evals=("fine/a", "crashes/b", "fine/c"),
      mesh__devices=1,
  )
  with pytest.raises(np.linalg.LinAlgError):
    evaluate.evaluate(cfg, tmp_path)
  written = json.loads((tmp_path / "evaluation.json").read_text())
  assert written["fine/a/metric"] == 1.0 and written["meta/step"] == 3
  assert "fine/c/metric" not in written
  assert written["meta/not_evaluated"] == "crashes/b; fine/c"
