"""The loss of a batch: forward passes, terms and what is logged."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mcjepa_jax.losses import (
    content_objective,
    flow_losses,
    motion_objective,
    weighting,
)
from mcjepa_jax.models import convnext, mcjepa
from mcjepa_jax.ops import flow_ops, representation
from mcjepa_jax.step import augmentation


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a step computes besides the model: the config, as plain values."""

  mode: str
  start_step: int
  accumulate: int
  accumulation: str
  motion_weight: float
  motion_ramp_steps: int
  motion_term_weights: Mapping[str, Mapping[str, float]]
  photometric: Mapping[str, float]
  smoothness: Mapping[str, Any]
  occlusion: str
  occlusion_start: int
  out_of_frame: bool
  motion_jitter: Mapping[str, float]
  content_term_weights: Mapping[str, float]
  content_augmentation: Mapping[str, Any]


def motion_forward(
    model: mcjepa.MCJEPA,
    params: Any,
    frames: jax.Array,
    key: jax.Array,
    step: jax.Array,
    recipe: Recipe,
    *,
    indices: jax.Array | None = None,
    mean: flow_losses.Mean = flow_losses.masked_mean,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[int, jax.Array]]:
  """Unweighted motion terms, monitors and features, of interleaved u8 frames.

  At some indices of a batch, frames are jittered as they are in it.
  """
  plain, jittered = augmentation.motion_frames(
      frames, key, **recipe.motion_jitter, indices=indices
  )
  features, flows = model.apply(
      {"params": params}, jittered, method=model.motion
  )
  flow = motion_objective.flow_at(flows, 1, plain.shape[1:3])
  mask = motion_objective.motion_mask(
      flow,
      occlusion_kind=recipe.occlusion,
      out_of_frame=recipe.out_of_frame,
      occlusion_active=step >= recipe.start_step + recipe.occlusion_start,
  )
  terms = motion_objective.motion_terms(
      features,
      flows | {1: flow},
      plain,
      mask,
      weights=recipe.motion_term_weights,
      photometric=recipe.photometric,
      smoothness=recipe.smoothness,
      mean=mean,
  )
  monitors = {
      f"feature_std/stride_{stride}": representation.feature_std(x)
      for stride, x in features.items()
  }
  monitors["flow/mean_magnitude"] = jnp.mean(jnp.linalg.norm(flow, axis=-1))
  # A constant flow has none of it.
  monitors["flow/std"] = jnp.mean(jnp.std(flow, axis=(1, 2)))
  monitors["flow/counted"] = jnp.mean(mask)
  if recipe.occlusion != "none":
    inside = motion_objective.motion_mask(
        flow, occlusion_kind="none", out_of_frame=recipe.out_of_frame
    )
    monitors["flow/occluded"] = 1 - jnp.mean(mask) / jnp.mean(inside)
  if "motion/reconstruction/stride_1" in terms:
    # Below 1 the flow explains the frames better than no flow does.
    still = flow_losses.photometric_loss(
        plain,
        flow_ops.swap_pairs(plain),
        mask,
        **recipe.photometric,
        mean=mean,
    )
    monitors["flow/zero_ratio"] = jax.lax.stop_gradient(
        terms["motion/reconstruction/stride_1"] / jnp.maximum(still, 1e-6)
    )
  return terms, monitors, features


def pooled_forward(
    model: mcjepa.MCJEPA,
    params: Any,
    views: jax.Array,
    key: jax.Array,
    recipe: Recipe,
    batch_rows: convnext.BatchRows | None = None,
) -> jax.Array:
  """The pooled features of interleaved u8 views.

  At some rows of a batch, views are augmented and lose paths as they do in it.
  """
  augment_key, drop_key = jax.random.split(key)
  images = augmentation.content_views(
      views,
      augment_key,
      **recipe.content_augmentation,
      indices=batch_rows and batch_rows[0],
  )
  return model.apply(
      {"params": params},
      images,
      deterministic=False,
      batch_rows=batch_rows,
      rngs={"drop_path": drop_key},
      method=model.pooled,
  )


def content_forward(
    model: mcjepa.MCJEPA, params: Any, pooled: jax.Array, recipe: Recipe
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Unweighted content terms and monitors, of all views' pooled features."""
  z = model.apply({"params": params}, pooled, method=model.expand)
  terms = content_objective.content_terms(
      z, weights=recipe.content_term_weights
  )
  monitors = {
      "feature_std/pooled": representation.feature_std(pooled),
      "feature_std/embedding": representation.feature_std(z),
  }
  return terms, monitors


def loss_fn(
    params: Any,
    model: mcjepa.MCJEPA,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    step: jax.Array,
    recipe: Recipe,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of the tasks whose arrays are in the batch, and what is logged."""
  terms, monitors = {}, {}
  content_key, motion_key = jax.random.split(key)
  if "views" in batch:
    new_terms, new_monitors = content_forward(
        model,
        params,
        pooled_forward(model, params, batch["views"], content_key, recipe),
        recipe,
    )
    terms |= new_terms
    monitors |= new_monitors
  if "frames" in batch:
    new_terms, new_monitors, _ = motion_forward(
        model, params, batch["frames"], motion_key, step, recipe
    )
    terms |= new_terms
    monitors |= new_monitors
  return weighted_loss(terms, monitors, step, recipe)


def weighted_loss(
    terms: Mapping[str, jax.Array],
    monitors: dict[str, jax.Array],
    step: jax.Array,
    recipe: Recipe,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss, and all that is logged: it, the terms and the monitors."""
  losses = weighting.weighted_sums(
      terms,
      motion_weight=recipe.motion_weight,
      motion_ramp=weighting.ramp(
          step, recipe.start_step, recipe.motion_ramp_steps
      ),
      motion=recipe.motion_term_weights,
      content=recipe.content_term_weights,
  )
  loss = sum(losses.values(), start=jnp.zeros(()))
  monitors |= {f"loss/{task}": value for task, value in losses.items()}
  return loss, {"loss": loss} | terms | monitors
