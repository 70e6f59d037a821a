"""From a config to the parts of a run: model, optimizers, recipe, streams."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mcjepa_jax.data import sources
from mcjepa_jax.data.catalog import datasets
from mcjepa_jax.data.pipeline import batches
from mcjepa_jax.distributed import sharding
from mcjepa_jax.models import mcjepa
from mcjepa_jax.step import batch_loss, optimizer, task_schedule, train_state


def model(config: Any) -> mcjepa.MCJEPA:
  """The model of `config.model`."""
  return mcjepa.build(**config.model.to_dict(), remat=config.remat)


def optimizers(config: Any) -> dict[str, optax.GradientTransformation]:
  """One optimizer per group, each over the updates that its group gets."""
  updates = task_schedule.updates(
      config.mode, config.num_steps, config.motion.start_step
  )
  shared = dict(
      final_fraction=config.optimizer.final_fraction,
      clip_norm=config.optimizer.clip_norm,
  )
  settings = {
      "encoder": config.optimizer.encoder,
      "expander": config.optimizer.encoder,
      "estimator": config.optimizer.estimator,
  }
  result = {}
  for group, values in settings.items():
    values = values.to_dict()
    # A group that this mode never moves, or moves for less than its warm-up.
    num_steps = max(updates[group], 1)
    values["warmup_steps"] = min(values["warmup_steps"], num_steps)
    result[group] = optimizer.make_optimizer(
        num_steps=num_steps, **values, **shared
    )
  return result


def mesh(config: Any) -> jax.sharding.Mesh:
  """The mesh of `config.mesh` over the devices here."""
  sizes = config.mesh
  return sharding.make_mesh(sizes.devices, sizes.data, sizes.shard)


def abstract_state(
    config: Any,
    model: mcjepa.MCJEPA,
    optimizers: Mapping[str, optax.GradientTransformation],
    mesh: jax.sharding.Mesh,
) -> train_state.TrainState:
  """The state of a run as shapes, split over the mesh as the config says."""
  return train_state.abstract_state(
      model,
      optimizers,
      mesh,
      min_bytes=int(config.mesh.shard_min_mib * 2**20),
      seed=config.seed,
  )


def motion_sizes(config: Any) -> set[tuple[int, int]]:
  """The sizes of the frames; a batch of motion is of one source, and so of one."""
  sized = sources.sized(config.motion.sources, config.motion.size)
  return {size for *_, size in sized}


def batch_shapes(
    config: Any, kind: str, frame_size: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of the arrays that a step of this kind reads."""
  motion, content, shapes = config.motion, config.content, {}
  if "motion" in task_schedule.tasks(kind):
    shape = (2 * motion.batch_size, *frame_size, 3)
    shapes["frames"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
  if "content" in task_schedule.tasks(kind):
    shape = (2 * content.batch_size, content.size, content.size, 3)
    shapes["views"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
  return shapes


def _photometry(jitter: Any) -> dict[str, float]:
  values = jitter.to_dict()
  return values | {"jitter_probability": values.pop("p")}


def recipe(config: Any) -> batch_loss.Recipe:
  """What a step computes besides the model."""
  motion, content = config.motion, config.content
  return batch_loss.Recipe(
      mode=config.mode,
      # Without content steps before it, motion starts at once, its ramp too.
      start_step=0
      if config.mode in ("motion", "frozen_encoder")
      else motion.start_step,
      accumulate=config.accumulate,
      accumulation=config.accumulation,
      motion_weight=motion.weight,
      motion_ramp_steps=motion.ramp_steps,
      motion_term_weights=motion.terms.to_dict(),
      photometric=motion.photometric.to_dict(),
      smoothness=motion.smoothness.to_dict(),
      occlusion=motion.occlusion,
      occlusion_start=motion.occlusion_start,
      out_of_frame=motion.out_of_frame,
      motion_jitter=_photometry(motion.jitter)
      | dict(erase_probability=motion.erase),
      content_term_weights=content.terms.to_dict(),
      content_augmentation=_photometry(content.jitter)
      | dict(
          gray_probability=content.gray,
          blur_probability=tuple(content.blur),
          solarize_probability=tuple(content.solarize),
      ),
  )


def _weight(mixing: str, number: float, dataset: Any) -> float:
  return number * len(dataset) if mixing == "repetitions" else number


def streams(config: Any) -> dict[str, batches.Stream]:
  """The streams that the mode reads, by task, each at its first batch.

  No worker runs yet. Of many hosts each reads its own rows.
  """
  result = {}
  host = dict(host_index=sharding.host_index(), host_count=jax.process_count())
  reads = task_schedule.tasks_of_mode(config.mode)
  root = sources.data_root(config.data_root, config.data_cache)
  if "motion" in reads:
    motion = config.motion
    geometry = dict(
        mode=motion.geometry,
        scale=tuple(motion.downscale),
        flip=True,
        swap=True,
        rotation=tuple(motion.rotation),
        relative_rotation=motion.relative_rotation,
        relative_scale=motion.relative_scale,
        relative_shift=motion.relative_shift,
    )
    mixed = []
    for name, number, size in sources.sized(motion.sources, motion.size):
      dataset = sources.motion(
          name,
          root,
          seed=config.seed,
          size=size,
          gaps=tuple(motion.gaps),
      )
      weight = _weight(motion.mixing, number, dataset)
      mixed.append(batches.MotionSource(name, dataset, size, weight, geometry))
    result["motion"] = batches.motion_stream(
        mixed,
        batch_size=motion.batch_size,
        seed=config.seed,
        num_workers=config.workers,
        **host,
    )
  if "content" in reads:
    content = config.content
    mixed = []
    for name, number in content.sources:
      dataset = sources.images(name, root, seed=config.seed, size=content.size)
      weight = _weight(content.mixing, number, dataset)
      mixed.append(batches.ContentSource(name, dataset, weight))
    result["content"] = batches.content_stream(
        mixed,
        batch_size=content.batch_size,
        size=content.size,
        scale=tuple(content.scale),
        ratio=tuple(content.ratio),
        flip=content.flip,
        seed=config.seed,
        num_workers=config.workers,
        **host,
    )
  return result


def miscounts(config: Any, streams: dict[str, batches.Stream]) -> list[str]:
  """A line for each source with more or fewer records than are published.

  What is published are neighbours: with gaps pairs of sequences are others.
  """
  found = []
  for task, stream in streams.items():
    if task == "motion" and tuple(config.motion.gaps) != (1, 1):
      continue
    for source in stream.state()["fingerprint"]["sources"]:
      use = f"{task}/{source['name']}"
      message = datasets.miscount(use, source["length"])
      found += [f"{use}: {message}"] if message else []
  return found
