"""The train state and the one jitted step: what preflight compiles and train runs.

A step trains some tasks ("content", "motion") and moves some groups of
parameters ("encoder", "expander", "estimator"). What it does not train it does
not touch: neither parameters nor optimizer state, count included.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from mcjepa_jax.distributed import sharding
from mcjepa_jax.losses import (
    content_objective,
    flow_losses,
    motion_objective,
    weighting,
)
from mcjepa_jax.models import convnext, mcjepa
from mcjepa_jax.ops import flow_ops, representation
from mcjepa_jax.step import accumulation, augmentation

# What runs in a step, and which groups of parameters it moves.
Kind = tuple[tuple[str, ...], tuple[str, ...]]

_KINDS: dict[str, Kind] = {
    "content": (("content",), ("encoder", "expander")),
    "motion": (("motion",), ("encoder", "estimator")),
    "estimator": (("motion",), ("estimator",)),
    "both": (("content", "motion"), mcjepa.GROUPS),
}
MODES = ("combined", "alternate", "frozen_encoder", "content", "motion")


class TrainState(struct.PyTreeNode):
  """All that a step changes, and the root key. Leaves may be shapes."""

  step: Any
  params: Any  # group -> parameters
  opt_state: Any  # group -> state, each with its own count
  key: Any  # uint32 data of the root key; step keys are folded from it
  skipped: Any  # whether the update before was: then the next one waits


def kind_at(mode: str, step: int, start_step: int) -> str:
  """The kind of a step: a key of `content`, `motion`, `estimator`, `both`."""
  if mode == "content":
    return "content"
  if mode == "motion":
    return "motion"
  if mode == "frozen_encoder":
    return "estimator"
  if step < start_step:
    return "content"
  if mode == "alternate":
    return "content" if (step - start_step) % 2 == 0 else "motion"
  return "both"


def is_first_with_flow(mode: str, step: int, start_step: int) -> bool:
  """Whether a step is the first of its kind, after `start_step` steps without flow."""
  if not 0 < start_step <= step <= start_step + 1:
    return False
  # Where tasks alternate it comes one step later.
  before, now = (kind_at(mode, n, start_step) for n in (step - 1, step))
  return before == "content" != now


def tasks(kind: str) -> tuple[str, ...]:
  """The tasks that a kind of step trains, and so the batches it reads."""
  return _KINDS[kind][0]


def tasks_of_mode(mode: str) -> tuple[str, ...]:
  """The tasks that a run in this mode ever trains."""
  if mode in ("combined", "alternate"):
    return ("content", "motion")
  return tasks(kind_at(mode, 0, 0))


def updates(mode: str, num_steps: int, start_step: int) -> dict[str, int]:
  """How many of a run's steps move each group of parameters."""
  batches = batches_before(mode, num_steps, start_step)
  return {
      "encoder": 0 if mode == "frozen_encoder" else num_steps,
      "expander": batches["content"],
      "estimator": batches["motion"],
  }


def batches_before(mode: str, step: int, start_step: int) -> dict[str, int]:
  """How many batches of each task the steps before `step` have consumed."""
  if mode in ("content", "motion", "frozen_encoder"):
    task = "content" if mode == "content" else "motion"
    return {"content": 0, "motion": 0} | {task: step}
  joint = max(step - start_step, 0)
  if mode == "alternate":
    return {
        "content": min(step, start_step) + (joint + 1) // 2,
        "motion": joint // 2,
    }
  return {"content": step, "motion": joint}


def init_state(
    model: mcjepa.MCJEPA,
    optimizers: Mapping[str, optax.GradientTransformation],
    seed: int,
) -> TrainState:
  """A new state, of the seed alone."""
  root = jax.random.key(seed)
  params = mcjepa.init_params(model, seed)
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state={g: optimizers[g].init(params[g]) for g in mcjepa.GROUPS},
      key=jax.random.key_data(jax.random.fold_in(root, 1)),
      skipped=jnp.zeros((), bool),
  )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a step computes besides the model: the config, as plain values."""

  mode: str
  start_step: int
  accumulate: int
  accumulation: str
  motion_weight: float
  motion_ramp_steps: int
  motion_terms: Mapping[str, Mapping[str, float]]
  photometric: Mapping[str, float]
  smoothness: Mapping[str, Any]
  occlusion: str
  occlusion_start: int
  out_of_frame: bool
  motion_jitter: Mapping[str, float]
  content_terms: Mapping[str, float]
  content_augmentation: Mapping[str, Any]


def motion_forward(
    model: mcjepa.MCJEPA,
    params: Any,
    frames: jax.Array,
    key: jax.Array,
    step: jax.Array,
    recipe: Recipe,
    *,
    places: jax.Array | None = None,
    mean: flow_losses.Mean = flow_losses.masked_mean,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[int, jax.Array]]:
  """Unweighted motion terms, monitors and features, of interleaved u8 frames.

  At some `places` of a batch, frames are jittered as they are in it.
  """
  plain, jittered = augmentation.motion_frames(
      frames, key, **recipe.motion_jitter, places=places
  )
  features, flows = model.apply(
      {"params": params}, jittered, method=model.motion
  )
  flow = motion_objective.flow_at(flows, 1, plain.shape[1:3])
  mask = motion_objective.motion_mask(
      flow,
      occlusion=recipe.occlusion,
      out_of_frame=recipe.out_of_frame,
      occlusion_active=step >= recipe.start_step + recipe.occlusion_start,
  )
  terms = motion_objective.motion_terms(
      features,
      flows | {1: flow},
      plain,
      mask,
      weights=recipe.motion_terms,
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
        flow, occlusion="none", out_of_frame=recipe.out_of_frame
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
    places: convnext.Places | None = None,
) -> jax.Array:
  """The pooled features of interleaved u8 views.

  At some `places` of a batch, views are augmented and lose paths as in it.
  """
  augment_key, drop_key = jax.random.split(key)
  images = augmentation.content_views(
      views,
      augment_key,
      **recipe.content_augmentation,
      places=places and places[0],
  )
  return model.apply(
      {"params": params},
      images,
      deterministic=False,
      places=places,
      rngs={"drop_path": drop_key},
      method=model.pooled,
  )


def content_forward(
    model: mcjepa.MCJEPA, params: Any, pooled: jax.Array, recipe: Recipe
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Unweighted content terms and monitors, of all views' pooled features."""
  z = model.apply({"params": params}, pooled, method=model.expand)
  terms = content_objective.content_terms(z, weights=recipe.content_terms)
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
  return _weighted(terms, monitors, step, recipe)


def _weighted(terms, monitors, step, recipe):
  """The loss, and all that is logged."""
  losses = weighting.weighted_sums(
      terms,
      motion_weight=recipe.motion_weight,
      motion_ramp=weighting.ramp(
          step, recipe.start_step, recipe.motion_ramp_steps
      ),
      motion=recipe.motion_terms,
      content=recipe.content_terms,
  )
  loss = sum(losses.values(), start=jnp.zeros(()))
  monitors |= {f"loss/{task}": value for task, value in losses.items()}
  return loss, {"loss": loss} | terms | monitors


def _value_and_grad(function, params, batch, key, count):
  """Loss, logs and gradient, averaged over `count` micro-batches."""
  differentiate = jax.value_and_grad(function, has_aux=True)
  if count == 1:
    (_, logs), grads = differentiate(params, batch, key)
    return logs, grads
  micro = {k: accumulation.micro_batches(v, count) for k, v in batch.items()}

  def body(i):
    one = {k: v[i] for k, v in micro.items()}
    (_, logs), grads = differentiate(params, one, jax.random.fold_in(key, i))
    return logs, grads

  def add(i, total):
    return jax.tree.map(jnp.add, total, body(i))

  shapes = jax.eval_shape(body, jnp.zeros((), jnp.int32))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total = jax.lax.fori_loop(
      0, count, add, zeros, unroll=accumulation.unroll(count)
  )
  return jax.tree.map(lambda x: x / count, total)


def exact_value_and_grad(
    params: Any,
    fixed: Any,
    model: mcjepa.MCJEPA,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    step: jax.Array,
    recipe: Recipe,
) -> tuple[dict[str, jax.Array], Any]:
  """What `loss_fn` of the whole batch logs, and its gradient, by micro-batches.

  VICReg is of the pooled features of all, L_vc of the moments of all; the rest
  of motion is a mean over the micro-batches, each over the pixels of all.
  """
  sizes = {k: len(v) for k, v in batch.items()}
  content_key, motion_key = jax.random.split(key)
  weights = {k: recipe.motion_terms[k] for k in ("variance", "covariance")}
  strides = {
      motion_objective.stride_of(name)
      for levels in weights.values()
      for name, weight in levels.items()
      if weight
  }
  local = dataclasses.replace(
      recipe, motion_terms=recipe.motion_terms | {k: {} for k in weights}
  )

  def forward(params, micro, places, mean):
    rows, means, within, terms, monitors = {}, {}, {}, {}, {}
    if "views" in micro:
      rows["pooled"] = pooled_forward(
          model,
          params | fixed,
          micro["views"],
          content_key,
          recipe,
          (places["views"], sizes["views"]),
      )
    if "frames" in micro:
      terms, monitors, features = motion_forward(
          model,
          params | fixed,
          micro["frames"],
          motion_key,
          step,
          local,
          places=places["frames"],
          mean=mean,
      )
      for s in strides:
        means[s], within[s] = accumulation.moments(features[s])
    return _weighted(terms, monitors, step, local), (rows, means), within

  def finish(params, stacked, within):
    (rows, means), terms, monitors = stacked, {}, {}
    if "pooled" in rows:
      terms, monitors = content_forward(
          model, params | fixed, accumulation.whole(rows["pooled"]), recipe
      )
    for s in within:
      frames, height, width, _ = batch["frames"].shape
      samples = frames * (height // s) * (width // s)
      covariance = accumulation.covariance(means[s], within[s], samples)
      terms |= motion_objective.covariance_terms(covariance, s, weights=weights)
    return _weighted(terms, monitors, step, recipe)

  return accumulation.value_and_grad(
      forward, finish, params, batch, recipe.accumulate
  )


def make_gradient(
    model: mcjepa.MCJEPA, recipe: Recipe, kind: str
) -> Callable[..., tuple[dict[str, jax.Array], Any]]:
  """The gradient of one kind of step: (state, batch) -> (logs, gradient).

  The batch holds `frames` u8[2b, h, w, 3], `views` u8[2n, k, k, 3], or both,
  as the kind trains, and nothing else.
  """
  trained = _KINDS[kind][1]
  arrays = {"content": "views", "motion": "frames"}
  expected = {arrays[task] for task in tasks(kind)}

  def gradient(state: TrainState, batch: Mapping[str, jax.Array]):
    if set(batch) != expected:
      raise ValueError(
          f"a {kind} step reads {sorted(expected)}, got {sorted(batch)}"
      )
    root = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(root, state.step)
    fixed = {g: p for g, p in state.params.items() if g not in trained}

    def function(params, batch, key):
      return loss_fn(params | fixed, model, batch, key, state.step, recipe)

    moving = {g: state.params[g] for g in trained}
    if recipe.accumulation == "exact" and recipe.accumulate > 1:
      return exact_value_and_grad(
          moving, fixed, model, batch, key, state.step, recipe
      )
    return _value_and_grad(function, moving, batch, key, recipe.accumulate)

  return gradient


def make_train_step(
    model: mcjepa.MCJEPA,
    optimizers: Mapping[str, optax.GradientTransformation],
    recipe: Recipe,
    kind: str,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The pure step of one kind: (state, batch) -> (state, what is logged).

  An update whose loss or gradient is not finite is skipped, counts included,
  and so logged. The step after it changes nothing at all: the host, which
  notices a step late, finds the parameters as they were, and clears `skipped`.
  """
  trained = _KINDS[kind][1]
  gradient = make_gradient(model, recipe, kind)

  def train_step(state: TrainState, batch: Mapping[str, jax.Array]):
    logs, grads = gradient(state, batch)
    finite = jnp.isfinite(logs["loss"])
    for group in trained:
      logs[f"gradient_norm/{group}"] = optax.tree.norm(grads[group])
      finite &= jnp.isfinite(logs[f"gradient_norm/{group}"])
    logs["skipped"] = 1.0 - finite

    def kept():
      return dict(state.params), dict(state.opt_state)

    def updated():
      params, opt_state = kept()
      for group in trained:
        updates, opt_state[group] = optimizers[group].update(
            grads[group], state.opt_state[group], state.params[group]
        )
        params[group] = optax.apply_updates(state.params[group], updates)
      return params, opt_state

    go = finite & ~state.skipped
    if jax.default_backend() == "cpu":
      # The selects of all leaves would take 2 s more to compile (quickstart).
      params, opt_state = jax.lax.cond(go, updated, kept)
    else:  # a branch would make the host of a GPU wait
      params, opt_state = jax.tree.map(
          lambda new, old: jnp.where(go, new, old), updated(), kept()
      )
    state = state.replace(
        step=state.step + ~state.skipped,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped | ~finite,
    )
    return state, logs

  return train_step


def abstract_state(
    model: mcjepa.MCJEPA,
    optimizers: Mapping[str, optax.GradientTransformation],
    mesh: jax.sharding.Mesh,
    *,
    min_bytes: int,
    seed: int = 0,
) -> TrainState:
  """The state as shapes with shardings: to lower, restore or initialise into."""
  shapes = jax.eval_shape(
      functools.partial(init_state, model, optimizers, seed)
  )
  shardings = sharding.state_shardings(shapes, mesh, min_bytes=min_bytes)
  return jax.tree.map(
      lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
      shapes,
      shardings,
  )


def jit_train_step(
    train_step: Callable[..., Any],
    abstract: TrainState,
    mesh: jax.sharding.Mesh,
) -> Callable[..., Any]:
  """The step compiled over a mesh: state donated, its shardings kept."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(
      train_step,
      in_shardings=(shardings, sharding.batch_sharding(mesh)),
      out_shardings=(shardings, replicated),
      donate_argnums=0,
      # The quickstart's step compiles in 33 s, not 41, and runs as fast.
      compiler_options=sharding.cpu_options(2, mesh.devices.flat[0].platform),
  )
