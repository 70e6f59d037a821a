"""From parameters to numbers: the evals of a config, as flat JSON."""

from collections.abc import Callable, Mapping
import functools
import importlib.metadata
import pathlib
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from mcjepa_jax import (
    assembly,
    checkpoint,
    errors,
    flow_ops,
    journal,
    sharding,
    validation,
)
from mcjepa_jax.data import flow_faults, sources
from mcjepa_jax.evals import flow, probe
from mcjepa_jax.models import mcjepa

_SYNTHETIC_PAIRS = 256
_TRAIN_PAIRS = 512
_KNN_BANK = 2000
_KNN_QUERIES = 1000
_KNN_BATCH = 128
_DECODED_WHOLE = 100
_JUDGED = 4  # pairs of a set whose true flow is held against the frames
_RESULTS = "evaluation.json"
_CIFAR_STRIDE = 5  # every fifth image is a query: its labels are sorted

Params = Any


@functools.cache
def _flow_forward(model: mcjepa.MCJEPA, mesh: jax.sharding.Mesh):
  """The jitted flow of frames of any size; one for all parameters."""
  coarsest = model.encoder.strides[-1]
  batch = sharding.batch_sharding(mesh)

  @functools.partial(jax.jit, in_shardings=(None, batch), static_argnums=2)
  def forward(params, frames, size):
    frames = frames.astype(jnp.float32) / 255
    grid = tuple(-(-side // coarsest) * coarsest for side in size)
    if grid != size:
      frames = flow_ops.resize(frames, grid)
    _, flows = model.apply({"params": params}, frames, method=model.motion)
    return flow_ops.resize_flow(flows[min(flows)], size)

  return forward


def flow_predictor(
    model: mcjepa.MCJEPA, params: Params, mesh: jax.sharding.Mesh
) -> flow.Predictor:
  """A function from interleaved u8 frames of any size to flow_12.

  Frames are resized to the next multiple of the coarsest stride, the flow back
  to the frames' size with its vectors scaled. Compiles once per shape.
  """
  forward, count = _flow_forward(model, mesh), mesh.devices.size

  def predict(frames):
    pairs = frames.shape[0] // 2
    # Padded with repeats up to what the devices divide; the rest is dropped.
    padded = -(-pairs // count) * count
    rows = np.arange(2 * padded) % frames.shape[0]
    flows = forward(params, frames[rows], frames.shape[1:3])
    return np.asarray(flows)[0 : 2 * pairs : 2]

  return predict


@functools.cache
def _pooled_forward(model: mcjepa.MCJEPA, mesh: jax.sharding.Mesh):
  """The jitted pooled features; one for all parameters."""
  batch = sharding.batch_sharding(mesh)

  @functools.partial(jax.jit, in_shardings=(None, batch))
  def forward(params, images):
    images = images.astype(jnp.float32) / 255
    return model.apply({"params": params}, images, method=model.pooled)

  return forward


def embedder(
    model: mcjepa.MCJEPA, params: Params, mesh: jax.sharding.Mesh
) -> probe.Embedder:
  """A function from u8 images to pooled encoder features."""
  forward, count = _pooled_forward(model, mesh), mesh.devices.size
  size = -(-_KNN_BATCH // count) * count

  def embed(images):
    parts = []
    starts = range(0, len(images), size)
    for start in tqdm.tqdm(starts, desc="features", leave=False):
      part = images[start : start + size]
      rows = np.arange(size) % len(part)
      parts.append(np.asarray(forward(params, part[rows]))[: len(part)])
    return np.concatenate(parts)

  return embed


def _flow_eval(config, name, model, params, initial, mesh):
  synthetic = name == "synthetic"
  size = tuple(config.motion.size)
  predictors = {"": flow_predictor(model, params, mesh)}
  train_flows = []
  if synthetic:
    predictors["random_init"] = flow_predictor(model, initial, mesh)
    train = sources.train_pairs(config.seed, size, _TRAIN_PAIRS)
    train_flows = [train[i]["flow_12"] for i in range(len(train))]
  return flow.run(
      name,
      _flow_pairs(config, name),
      predictors,
      batch_size=config.eval_batch_size,
      max_pixels=config.eval_max_pixels,
      classical=not synthetic,
      train_flows=train_flows,
  )


def _flow_pairs(config, name):
  return sources.flow_pairs(
      name,
      sources.data_root(config.data_root, config.data_cache),
      seed=sources.held_out_seed(config.eval_seed),
      size=tuple(config.motion.size),
      count=_SYNTHETIC_PAIRS,
  )


def _knn_eval(config, name, model, params, initial, mesh):
  load = functools.partial(probe.load, name=f"knn/{name}", progress=True)
  queries = _labelled(config, name)
  if name == "synthetic":
    size = config.content.size
    bank = sources.train_images(config.seed, size, _KNN_BANK)
    parts = (
        load(bank, np.arange(len(bank)), size=size),
        load(queries, np.arange(len(queries)), size=size),
    )
  else:
    index = np.arange(len(queries))
    query = index % _CIFAR_STRIDE == 0
    size = config.knn_size
    parts = (
        load(queries, index[~query], size=size),
        load(queries, index[query], size=size),
    )
  embedders = {
      "": embedder(model, params, mesh),
      "random_init": embedder(model, initial, mesh),
  }
  return probe.run(name, *parts, embedders)


def _labelled(config, name):
  return sources.labelled(
      name,
      sources.data_root(config.data_root, config.data_cache),
      seed=sources.held_out_seed(config.eval_seed),
      size=config.content.size,
      count=_KNN_QUERIES,
  )


_EVALS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "flow": (_flow_pairs, _flow_eval),
    "knn": (_labelled, _knn_eval),
}


def check(config: Any) -> list[str]:
  """What is wrong with the evals of a config and the data they need."""
  faults = []
  for entry in config.evals:
    kind, _, name = str(entry).partition("/")
    if kind not in _EVALS or not name:
      known = " or ".join(f"{kind}/SET" for kind in _EVALS)
      faults.append(f"evals: expected {known}, got {entry!r}")
      continue
    faults += errors.collect(
        functools.partial(_check_examples, config, kind, name)
    )
  return faults


def _check_examples(config, kind, name):
  """Raises UserError for examples that cannot be decoded.

  Small sets are decoded whole, of large ones an example: a fault is told now
  and not after the training. So is flow that the first examples contradict.
  """
  examples = _EVALS[kind][0](config, name)
  few = len(examples) <= _DECODED_WHOLE
  count = len(examples) if few else min(len(examples), _JUDGED)
  judge = flow_faults.Judge()

  def look(i):
    example = examples[i]
    if kind == "flow" and i < _JUDGED:
      judge.add(example)

  faults = errors.collect(*(functools.partial(look, i) for i in range(count)))
  faults += [f"flow/{name}: {f}" for f in judge.misreadings(certain=True)]
  if faults:
    raise errors.UserError(*faults)


def run_evals(
    config: Any,
    model: mcjepa.MCJEPA,
    params: Params,
    initial: Params,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
  """The results of `config.evals`, keyed `EVAL/SET/METRIC`.

  `initial` are the parameters before training, of the same seed.
  """
  results = {}
  for entry in config.evals:
    kind, _, name = entry.partition("/")
    results |= _EVALS[kind][1](config, name, model, params, initial, mesh)
  return results


def versions() -> str:
  """The versions of what computes, as one string."""
  names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  return " ".join(
      f"{name}={importlib.metadata.version(name)}" for name in names
  )


def commit() -> str:
  """The commit of this code, `unknown` outside a git work tree."""
  folder = pathlib.Path(__file__).resolve().parent
  try:
    run = subprocess.run(
        ["git", "-C", folder, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return run.stdout.strip()


def table(results: Mapping[str, Any]) -> str:
  """The results as aligned lines, pair by pair rows left out."""
  rows = [
      (key, f"{value:.3f}" if isinstance(value, float) else str(value))
      for key, value in results.items()
      if not (key.startswith("flow/") and key.count("/") > 2)
  ]
  width = max(len(key) for key, _ in rows)
  return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def evaluate(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
  """Restores `config.checkpoint`, runs the evals, writes and returns them.

  The model and the seed of the random-init rows are the checkpoint's own.

  Raises:
    UserError: with all that is wrong with config, data, checkpoint and target.
  """
  started = time.perf_counter()
  path = pathlib.Path(config.checkpoint or workdir).expanduser()
  target = pathlib.Path(config.results or workdir / _RESULTS).expanduser()
  faults = validation.faults(config) + check(config)
  if not config.evals:
    faults.append("evals: expected at least one, got none")
  if target.is_dir():
    faults.append(f"results: expected a file to write, got the folder {target}")
  faults += errors.collect(
      lambda: journal.check_writable(target.parent, "results"),
      lambda: checkpoint.locate(path),
  )
  if faults:
    raise errors.UserError(*faults)
  mesh = sharding.make_mesh(config.mesh.devices)
  model, params, meta = restore_model(path, mesh=mesh)
  with config.unlocked():
    config.seed = meta["seed"]
  initial = sharding.call_once(lambda: mcjepa.init_params(model, config.seed))
  results = run_evals(config, model, params, initial, mesh)
  results |= {
      "meta/config": meta.get("config", ""),
      "meta/checkpoint": str(path),
      "meta/step": meta["step"],
      "meta/commit": commit(),
      "meta/devices": describe_devices(),
      "meta/versions": versions(),
      "meta/seconds": time.perf_counter() - started,
  }
  journal.write_json(target, results)
  print(table(results))
  return results


def restore_model(
    path: str | pathlib.Path, *, mesh: jax.sharding.Mesh
) -> tuple[mcjepa.MCJEPA, Params, dict[str, Any]]:
  """The model that a checkpoint describes, its parameters and its meta.

  Raises:
    UserError: no checkpoint there, or one that cannot be read.
  """
  meta = checkpoint.read_meta(path)
  try:
    model = assembly.model(ml_collections.ConfigDict({"model": meta["model"]}))
    seed = int(meta["seed"])
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
        f"checkpoint {path}: expected the model and the seed in its meta, got"
        f" {sorted(meta)} ({type(error).__name__}: {error})"
    ) from error
  replicated = sharding.replicated(mesh)
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
      jax.eval_shape(lambda: mcjepa.init_params(model, seed)),
  )
  return model, checkpoint.restore_params(path, abstract), meta


def describe_devices() -> str:
  """Number and kind of the devices."""
  devices = jax.devices()
  return f"{len(devices)} x {devices[0].device_kind}"
