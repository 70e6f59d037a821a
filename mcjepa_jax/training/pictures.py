"""Pictures of a run: flow panels, feature PCA, curves of the logs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import UInt8
import numpy as np

from mcjepa_jax.evals import inference
from mcjepa_jax.losses import motion_objective
from mcjepa_jax.models import mcjepa
from mcjepa_jax.runtime import visualize

ROWS = 16  # of each task's arrays that are looked at
_PAIRS = 4
_PCA_STRIDE = 8
_LEAST_HEIGHT = 128  # of one image in a picture


def of_state(
    model: mcjepa.MCJEPA,
    params: Any,
    mesh: jax.sharding.Mesh,
    arrays: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
  """Pictures by name, of the first examples of each task's batch arrays."""
  pictures = {}
  if "motion" in arrays:
    frames = arrays["motion"]["frames"][: 2 * _PAIRS]
    pictures["flow"] = _flow_rows(model, params, mesh, frames)
  if "content" in arrays:
    views = arrays["content"]["views"][:ROWS:2]
    pictures["features"] = _feature_rows(model, params, views)
  return pictures


def _flow_rows(model, params, mesh, frames):
  predict = inference.flow_predictor(model, params, mesh)
  pairs = frames.reshape(-1, 2, *frames.shape[1:])
  there = predict(frames)
  back = predict(pairs[:, ::-1].reshape(frames.shape))
  directed = jnp.stack([there, back], axis=1).reshape(-1, *there.shape[1:])
  mask = motion_objective.motion_mask(
      directed, occlusion_kind="forward_backward", out_of_frame=True
  )
  visible = np.asarray(mask)[::2]
  scale = max(1, _LEAST_HEIGHT // frames.shape[1])
  rows = [
      visualize.flow_panel(*pair, flow, visible=seen, scale=scale)
      for pair, flow, seen in zip(pairs, there, visible, strict=True)
  ]
  return visualize.grid(np.stack(rows), columns=1)


def _feature_rows(model, params, views):
  @jax.jit
  def features(params, images):
    pyramid = model.apply(
        {"params": params}, images, method=lambda m, x: m.encoder(x)
    )
    return dict(zip(model.encoder.strides, pyramid, strict=True))[_PCA_STRIDE]

  images = views.astype(np.float32) / 255
  colors = visualize.feature_pca(np.asarray(features(params, images)))
  views = visualize.enlarge(views, max(1, _LEAST_HEIGHT // views.shape[1]))
  colors = visualize.enlarge(colors, views.shape[1] // colors.shape[1])
  return visualize.grid(np.concatenate([views, colors]), columns=len(views))


def of_logs(
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
  """Curves of the terms, the monitors and the gradients over the steps."""
  names = sorted({name for line in lines for name in line} - {"step"})
  groups = {
      "curves_content": "content/",
      "curves_motion": "motion/",
      "curves_feature_std": "feature_std/",
      "curves_gradient_norm": "gradient_norm/",
  }
  pictures = {}
  for picture, prefix in groups.items():
    series = {}
    for name in names:
      if name.startswith(prefix):
        points = [(x["step"], x[name]) for x in lines if name in x]
        steps, values = zip(*points, strict=True)
        series[name.removeprefix(prefix)] = (np.array(steps), np.array(values))
    if series:
      pictures[picture] = visualize.curves(series)
  return pictures
