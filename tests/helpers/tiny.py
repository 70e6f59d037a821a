"""A config so small that its step compiles in seconds, and its parts."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from configs import default, quickstart
from mcjepa_jax.distributed import sharding
from mcjepa_jax.step import train_state, update
from mcjepa_jax.storage import checkpoint
from mcjepa_jax.training import build


def config(module=quickstart, **changes) -> default.ConfigDict:
  """A config of a module shrunk to 32x32 images and three narrow stages.

  Changes are `motion__weight=2.0` for `motion.weight`.
  """
  result = module.get_config()
  with result.unlocked():
    result.model.encoder.update(depths=(1, 1, 1), dims=(8, 8, 16))
    result.model.expander.widths = (16, 16, 16)
    result.model.estimator.update(
        factor=0.07,
        projection=8,
        radius=2,
        channels=(128, 64),
        finest_stride=8,
        context=False,
    )
    result.model.dtype = "float32"
  result.motion.size = (32, 32)
  result.motion.batch_size = 4
  result.motion.sources = (("synthetic", 1.0),)
  result.motion.occlusion_start = 0
  # Two estimated levels, 16 and 8; one stride a term: compiling is what costs.
  for kind, weights in result.motion.terms.items():
    stride = 1 if kind in ("reconstruction", "smoothness") else 8
    weights.update({f"stride_{s}": 0.0 for s in (1, 2, 4, 8, 16, 32)})
    weights[f"stride_{stride}"] = 0.5
  if not result.motion.photometric.census:
    result.motion.photometric.update(l1=0.15, ssim=0.85)
  result.content.batch_size = 4
  result.content.size = 32
  result.content.sources = (("synthetic", 1.0),)
  result.num_steps = 4
  result.workers = 0
  result.panel_every = 0
  result.evals = ()
  for group in (result.optimizer.encoder, result.optimizer.estimator):
    group.warmup_steps = 0
  for key, value in changes.items():
    *parents, name = key.split("__")
    part = result
    for parent in parents:
      part = part[parent]
    part[name] = value
  return result


@functools.cache
def batch(pairs: int = 4, images: int = 4) -> dict[str, np.ndarray]:
  """A fixed batch of both tasks, of the procedural set."""
  streams = build.streams(
      config(motion__batch_size=pairs, content__batch_size=images)
  )
  return streams["motion"][0][0] | streams["content"][0][0]


def state_and_step(cfg, kind, *, devices=1, data=-1, min_mib=4.0):
  """A new state over a mesh, the jitted step of a kind, and the mesh."""
  mesh = sharding.make_mesh(devices, data)
  model, optimizers = build.model(cfg), build.optimizers(cfg)
  abstract = train_state.abstract_state(
      model, optimizers, mesh, min_bytes=int(min_mib * 2**20)
  )
  state = jax.jit(
      lambda: train_state.init_state(model, optimizers, cfg.seed),
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
  )()
  function = update.make_train_step(model, optimizers, build.recipe(cfg), kind)
  return state, update.jit_train_step(function, abstract, mesh), mesh


def save_image(path: pathlib.Path, size=(40, 48), seed=0) -> pathlib.Path:
  """The path, at which a noise image of (h, w) now is."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return path


def save_checkpoint(workdir: pathlib.Path) -> pathlib.Path:
  """The workdir, with a checkpoint of the untrained model at step 3."""
  cfg = config()
  state, _, _ = state_and_step(cfg, "both")
  meta = {"model": cfg.model.to_dict(), "seed": 0, "config": "tiny"}
  with checkpoint.Checkpoints(workdir) as checkpoints:
    checkpoints.save(3, state, {}, meta)
  return workdir


def stretched(plain):
  """The views that a photometry gives, each stretched to its own range."""

  def views(*args, **kwargs):
    x = plain(*args, **kwargs)
    least = jnp.min(x, axis=(1, 2, 3), keepdims=True)
    return (x - least) / (jnp.max(x, axis=(1, 2, 3), keepdims=True) - least)

  return views
