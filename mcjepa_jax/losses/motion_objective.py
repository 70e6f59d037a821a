"""The terms of the motion task, unweighted and named `motion/KIND/stride_S`.

A term whose weight is statically 0 is not computed: times 0, a NaN would remain
a NaN.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mcjepa_jax.losses import flow_losses, vicreg
from mcjepa_jax.ops import flow_ops, occlusion

MOTION_KINDS = (
    "reconstruction",
    "smoothness",
    "regression",
    "cycle",
    "variance",
    "covariance",
)


def stride_of(name: str) -> int:
  """The stride in a weight's name: 4 for `stride_4`."""
  return int(name.removeprefix("stride_"))


def flow_at(
    flows: Mapping[int, Float[Array, "n _ _ 2"]],
    stride: int,
    size: tuple[int, int],
) -> Float[Array, "n _ _ 2"]:
  """The flow at a stride: estimated there, or the finest one resized.

  `size` is the image's; the result is in pixels of its own grid.
  """
  if stride in flows:
    return flows[stride]
  grid = (size[0] // stride, size[1] // stride)
  return flow_ops.resize_flow(flows[min(flows)], grid)


def motion_mask(
    flow: Float[Array, "n h w 2"],
    *,
    occlusion_kind: str,
    out_of_frame: bool,
    occlusion_active: Array | bool = True,
) -> Float[Array, "n h w 1"]:
  """M, 1 where a pixel counts: visible in the other frame, and inside it.

  For interleaved flows in full-resolution pixels; stop-gradient. Where
  `occlusion_active` is false every pixel is visible.
  """
  flow = jax.lax.stop_gradient(flow)
  mask = jnp.ones_like(flow[..., :1])
  if out_of_frame:
    mask = flow_ops.inside(flow)
  if occlusion_kind != "none":
    back = flow_ops.swap_pairs(flow)
    if occlusion_kind == "forward_backward":
      visible = occlusion.visible_forward_backward(flow, back)
    else:
      visible = occlusion.visible_range_map(back)
    mask = mask * jnp.where(occlusion_active, visible, 1.0)
  return jax.lax.stop_gradient(mask)


def motion_terms(
    features: Mapping[int, Float[Array, "n _ _ _"]],
    flows: Mapping[int, Float[Array, "n _ _ 2"]],
    frames: Float[Array, "n h w 3"],
    mask: Float[Array, "n h w 1"],
    *,
    weights: Mapping[str, Mapping[str, float]],
    photometric: Mapping[str, float],
    smoothness: Mapping[str, float],
    mean: flow_losses.Mean = flow_losses.masked_mean,
) -> dict[str, Float[Array, ""]]:
  """Each unweighted motion term with a weight, by name.

  Args:
    features: normalised pyramid of the interleaved frames, by stride.
    flows: directed flows, by stride.
    frames: without jitter, in [0, 1].
    mask: of `motion_mask`; coarser levels take its area mean.
    weights: kind -> `stride_S` -> weight.
    photometric: weights of L1, L2, SSIM and census inside L_rec.
    smoothness: how L_smooth is formed.
    mean: over the pixels of a mask.
  """
  size = frames.shape[1:3]
  terms = {}
  at = {}  # per stride: flow and mask, made once

  def level(stride):
    if stride not in at:
      flow = flow_at(flows, stride, size)
      at[stride] = flow, (
          mask if stride == 1 else flow_ops.area_mean(mask, stride)
      )
    return at[stride]

  others = {}  # per stride: the other frame's features, warped by the flow

  def other(stride, flow):
    if stride not in others:
      x = flow_ops.swap_pairs(features[stride])
      others[stride] = flow_ops.warp(x, flow)
    return others[stride]

  for kind in MOTION_KINDS:
    for name, weight in weights[kind].items():
      if not weight:
        continue
      stride = stride_of(name)
      flow, counts = level(stride)
      if kind in ("reconstruction", "smoothness"):
        image = frames
        if stride > 1:
          image = flow_ops.area_mean(frames, stride)
      if kind == "reconstruction":
        warped = flow_ops.warp(flow_ops.swap_pairs(image), flow)
        term = flow_losses.photometric_loss(
            image, warped, counts, **photometric, mean=mean
        )
      elif kind == "smoothness":
        term = flow_losses.smoothness_loss(flow, image, **smoothness)
      elif kind == "regression":
        term = flow_losses.feature_regression_loss(
            features[stride], other(stride, flow), counts, mean=mean
        )
      elif kind == "cycle":
        # Warped by the other direction's flow: the other half of the same.
        there = flow_ops.swap_pairs(other(stride, flow))
        term = flow_losses.cycle_loss(
            features[stride], there, flow, counts, mean=mean
        )
      elif kind == "variance":
        term = flow_losses.feature_variance_loss(features[stride])
      else:
        term = flow_losses.feature_covariance_loss(features[stride])
      terms[f"motion/{kind}/{name}"] = term
  return terms


def covariance_terms(
    covariance: Float[Array, "d d"],
    stride: int,
    *,
    weights: Mapping[str, Mapping[str, float]],
) -> dict[str, Float[Array, ""]]:
  """The terms of L_vc that have a weight at a stride, of its covariance."""
  name, terms = f"stride_{stride}", {}
  if weights["variance"].get(name):
    terms["variance"] = vicreg.std_hinge(jnp.diag(covariance))
  if weights["covariance"].get(name):
    terms["covariance"] = vicreg.off_diagonal(covariance)
  return {f"motion/{kind}/{name}": term for kind, term in terms.items()}
