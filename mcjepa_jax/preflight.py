"""Compiles the training step for a topology that need not be here.

  python -m mcjepa_jax.preflight --config=configs/quickstart.py \
    --topology=v5e:2x2

    [--mfu=PERCENT] [--price=DEVICE=USD ...] [--search] [--host-gb=N]
    [--diagnosis]

Topologies are a TPU's kind and layout (v4:2x2x2, v5e:4x4, v5p:2x2x1, v6e:2x4),
several slices of it (2xv5e:4x4) or `cpu:N`, N emulated devices. The last line
of stdout is a JSON object:

  topology, devices    as asked; how many devices that is
  step                 the kind of step: the one that needs most memory
  images, pairs        a step, of all devices together
  finest_stride        of the estimated flow
  gib_per_device       arguments, results, temporaries and program
  state_gib            of these the train state
  gib_limit            what the compiler lets a program use
  fits                 whether it does
  flops_per_step       of all devices together, from the shapes of what is computed
  hbm_bytes            read and written per device, estimated, without padding
  collective_bytes     per device and kind of collective; not what slices send
                       to each other
  compile_seconds, host_peak_gb

and with --mfu, the share of their peak that devices are supposed to reach,

  mfu                  as given
  device_hours         of all steps, on each device whose bf16 peak is known
  usd                  the same at the --price of an hour of one device

--search looks for the largest batch in the config's proportion: a compile without
rematerialisation and one with remat=block foretell it, a third confirms it if it
is larger than theirs. The JSON object then holds

  foretold             by remat: times the smallest batch that the devices divide,
                       images, pairs, gib_per_device, flops beside remat=none's
  remat                the one with the larger batch; of equal ones none
  confirmed            the report above on that batch
  corrected            as foretold, of that remat, from this report as well: the
                       largest batch may be another one

--diagnosis is of the program that a run runs every alarms.diagnose_every steps.
--host-gb ends a compiler that takes more of this machine's memory.

Exit code: 0 if it fits, 1 if it does not, 2 for a fault of the input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
from concurrent.futures import process
import contextlib
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies
import tqdm

from mcjepa_jax import errors
from mcjepa_jax.compiled import flops, hlo_bytes
from mcjepa_jax.distributed import sharding
from mcjepa_jax.runtime import (
    command_line,
    config_files,
    goodput,
    process_memory,
    signals,
)
from mcjepa_jax.step import diagnostics, task_schedule, update
from mcjepa_jax.training import batch_search, build, validation


@dataclasses.dataclass(frozen=True)
class _Chip:
  """A kind of TPU chip; two cores of a megacore chip are one device."""

  gib: float  # the limit that libtpu 0.0.42 names when a program exceeds it
  axes: int  # of the network
  megacore: bool = False


# Nominally 32, 16, 95 and 32 GiB (cloud.google.com/tpu/docs/system-architecture).
_CHIPS = {
    "v4": _Chip(gib=30.75, axes=3, megacore=True),
    "v5e": _Chip(gib=15.75, axes=2),
    "v5p": _Chip(gib=95.74, axes=3, megacore=True),
    "v6e": _Chip(gib=31.25, axes=2),
}
_OUT_OF_MEMORY = re.compile(r"(?:Used |memory required[^(]*\()([\d.]+)([KMGT])")


@dataclasses.dataclass(frozen=True)
class Topology:
  """A number of devices of one kind, in slices of a layout."""

  name: str
  slices: int
  kind: str
  layout: tuple[int, ...]  # of a slice

  @property
  def devices(self) -> int:
    """How many devices there are."""
    return self.slices * math.prod(self.layout)


def parse_topology(name: str) -> Topology:
  """The topology that a name such as `v5e:4x4` or `2xv5e:4x4` stands for.

  Raises:
    UserError: it is none, or its compiler is not installed.
  """
  slices, kind, layout = re.match(
      r"(?:([1-9]\d{0,2})x(?!cpu))?([^:]*):?(.*)", name, re.ASCII
  ).groups()
  axes = {"cpu": 1} | {kind: chip.axes for kind, chip in _CHIPS.items()}
  if kind not in axes or not re.fullmatch(
      r"[1-9]\d*" + r"x[1-9]\d*" * (axes[kind] - 1), layout
  ):
    examples = ["cpu:8", "2xv5e:4x4"] + [
        f"{kind}:" + "x".join(["2"] * chip.axes)
        for kind, chip in _CHIPS.items()
    ]
    raise errors.UserError(
        f"--topology: expected a name such as {', '.join(examples)};"
        f" got {name!r}"
    )
  if kind != "cpu" and importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
        f"--topology: {name} needs libtpu, which is not installed:"
        " pip install 'jax[tpu]' (Linux on x86-64 only)"
    )
  shape = tuple(int(n) for n in layout.split("x"))
  return Topology(name, int(slices or 1), kind, shape)


def _devices(topology: Topology) -> list[Any]:
  """The devices to compile for, in a process that has used no backend yet."""
  # The cpu backend serves constants; a tpu backend would want a TPU.
  jax.config.update("jax_platforms", "cpu")
  # A program for another machine is no use to this one's cache.
  jax.config.update("jax_enable_compilation_cache", False)
  if topology.kind == "cpu":
    jax.config.update("jax_num_cpu_devices", topology.devices)
    return jax.devices()
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
  # libtpu otherwise asks the cloud's metadata server who it is.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  # Each operation chooses its form by the default backend.
  jax.default_backend = lambda: "tpu"
  options = {}
  if _CHIPS[topology.kind].megacore:
    options["chip_config_name"] = "megacore"
  if math.prod(topology.layout) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  try:
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology.name.removeprefix(f"{topology.slices}x"),
        **options,
    )
  except jax.errors.JaxRuntimeError as error:
    raise errors.UserError(f"--topology: {error}") from error
  return list(description.devices)


def gib_asked(message: str) -> float | None:
  """The memory that an out-of-memory error of the compiler names, if it is one."""
  asked = _OUT_OF_MEMORY.search(message)
  if "RESOURCE_EXHAUSTED" not in message or not asked:
    return None
  unit = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}[asked[2]]
  return float(asked[1]) * unit


def _gib(memory: Any) -> float:
  size = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes  # donated: results in arguments' place
      + memory.temp_size_in_bytes
      + memory.generated_code_size_in_bytes
  )
  return size / 2**30


def _state_gib(abstract: Any) -> float:
  """What a device holds of the train state, or of a part of it."""
  return (
      sum(
          math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
          for leaf in jax.tree.leaves(abstract)
      )
      / 2**30
  )


def _compiled(
    config: Any, mesh: jax.sharding.Mesh, kind: str, diagnosis: bool
) -> dict[str, Any]:
  """What the compiler says of one kind of step as train runs it, or diagnoses."""
  model, optimizers = build.model(config), build.optimizers(config)
  recipe = build.recipe(config)
  abstract = build.abstract_state(config, model, optimizers, mesh)
  held = 0.0  # beside the program
  if diagnosis:
    step = diagnostics.jit_diagnosis(model, recipe, mesh)
    held = _state_gib(abstract.opt_state)
    abstract = abstract.replace(opt_state={})
  else:
    step = update.jit_train_step(
        update.make_train_step(model, optimizers, recipe, kind), abstract, mesh
    )
  # The largest of the sources': the step is compiled for each.
  frame_size = max(build.motion_sizes(config), key=math.prod)
  batch = build.batch_shapes(config, kind, frame_size)
  traced = step.trace(abstract, batch)
  report = {
      "state_gib": held + _state_gib(abstract),
      "step": f"diagnosis of {kind}" if diagnosis else kind,
      "images": config.content.batch_size if "views" in batch else 0,
      "pairs": config.motion.batch_size if "frames" in batch else 0,
      "finest_stride": config.model.estimator.finest_stride,
      "flops_per_step": flops.count(traced.jaxpr),
      "hbm_bytes": None,
      "collective_bytes": None,
  }
  start = time.perf_counter()
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    asked = gib_asked(str(error))
    if asked is None:
      raise
    report["gib_per_device"] = held + asked
  else:
    text = compiled.as_text()
    report |= {
        "gib_per_device": held + _gib(compiled.memory_analysis()),
        "hbm_bytes": hlo_bytes.hbm_bytes(text),
        "collective_bytes": hlo_bytes.collective_bytes(text),
    }
  report["compile_seconds"] = time.perf_counter() - start
  return report


def _report(config: Any, topology: Topology, diagnosis: bool) -> dict[str, Any]:
  """The report, made in a process that has used no backend yet."""
  sizes = config.mesh
  mesh = sharding.mesh_of(_devices(topology), sizes.data, sizes.shard)
  start = config.motion.start_step
  # The steps before flow starts need less than those that follow.
  kinds = {task_schedule.kind_at(config.mode, start + i, start) for i in (0, 1)}
  if diagnosis and len(kinds) > 1:  # of two batches
    kinds = {"both"}
  report = max(
      (_compiled(config, mesh, kind, diagnosis) for kind in sorted(kinds)),
      key=lambda report: report["gib_per_device"],
  )
  if topology.kind == "cpu":
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory / 2**30 / topology.devices
  else:
    limit = _CHIPS[topology.kind].gib
  return (
      {"topology": topology.name, "devices": topology.devices}
      | report
      | {
          "gib_limit": limit,
          "fits": report["gib_per_device"] <= limit,
          "host_peak_gb": process_memory.own_peak_rss_gb(),
      }
  )


@contextlib.contextmanager
def _ended_with_this() -> Iterator[None]:
  """Kills the compiler where this process does not wait for its end."""
  try:
    yield
  except BaseException:
    for compiler in multiprocessing.active_children():
      compiler.kill()
    raise


def preflight(
    config: Any,
    topology: str,
    *,
    diagnosis: bool = False,
    host_gb: float = math.inf,
    wait: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
  """The report on a config's step on a topology, compiled in a new process.

  Or on the `diagnosis` that a run makes now and then between its steps. `wait`
  is called each second. A compiler that takes more than `host_gb` of this
  machine's memory is ended.

  Raises:
    UserError: the topology is none, or the config does not fit it.
  """
  parsed = []
  faults = errors.collect(lambda: parsed.append(parse_topology(topology)))
  devices = parsed[0].devices if parsed else None
  if parsed:
    sizes = devices // parsed[0].slices, config.mesh.data, config.mesh.shard
    faults += errors.collect(lambda: sharding.mesh_shape(devices, *sizes))
  faults += validation.faults(config, devices=devices)
  if faults:
    raise errors.UserError(*faults)
  context = multiprocessing.get_context("spawn")
  with (
      concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool,
      _ended_with_this(),
  ):
    report = pool.submit(_report, config, parsed[0], diagnosis)
    while not concurrent.futures.wait([report], timeout=1).done:
      wait()
      if process_memory.peak_rss_gb() > host_gb:
        raise errors.Stop(
            1, f"The compiler took more than --host-gb={host_gb} GB: ended."
        )
    try:
      return report.result()
    except process.BrokenProcessPool as error:
      raise errors.Stop(
          1, "The compiler was killed: it may want more memory than is here."
      ) from error


def estimate(
    flops_per_step: float,
    num_steps: int,
    mfu: float,
    prices: Mapping[str, float],
) -> dict[str, Any]:
  """The hours of one device that a run takes at an MFU in percent, and the USD.

  Every step counts as the one that was compiled: before flow starts they are
  shorter. Starting, evaluating and interruptions come on top.
  """
  hours = {
      name: flops_per_step * num_steps / (peak * 1e12 * mfu / 100) / 3600
      for name, peak in goodput.DEVICES.items()
  }
  report = {"mfu": mfu, "device_hours": hours}
  if prices:
    report["usd"] = {name: hours[name] * usd for name, usd in prices.items()}
  return report


def _assumptions(
    flags: Mapping[str, Sequence[str]],
) -> tuple[float | None, dict[str, float], float]:
  """The MFU, the prices and the limit of memory of the command line."""

  def positive(text):
    try:
      value = float(text)
    except ValueError:
      return None
    return value if 0 < value < math.inf else None

  faults, prices, mfu = [], {}, None
  if "mfu" in flags:
    (text,) = command_line.single(flags, mfu="PERCENT")
    mfu = positive(text)
    if mfu is None or mfu > 100:
      faults.append(f"--mfu: expected a percentage up to 100, got {text!r}")
  for text in flags.get("price", ()):
    name, _, value = text.partition("=")
    prices[name] = positive(value)
    if name not in goodput.DEVICES or prices[name] is None:
      faults.append(
          f"--price: expected {'|'.join(goodput.DEVICES)}=USD, got {text!r}"
      )
  if prices and "mfu" not in flags:
    faults.append("--price: expected --mfu=PERCENT beside it, got none")
  host_gb = math.inf
  if "host-gb" in flags:
    (text,) = command_line.single(flags, **{"host-gb": "N"})
    host_gb = positive(text)
    if host_gb is None:
      faults.append(f"--host-gb: expected a positive number, got {text!r}")
  for name in ("search", "diagnosis"):
    if flags.get(name):
      faults.append(f"--{name}: expected no value, got {flags[name][0]!r}")
  if "search" in flags and "diagnosis" in flags:
    faults.append("--search: expected no --diagnosis beside it")
  for name in ("search", "diagnosis"):
    if name in flags and mfu is not None:
      faults.append(f"--{name}: expected no --mfu beside it")
  if faults:
    raise errors.UserError(*faults)
  return mfu, prices, host_gb


def _search(config: Any, topology: str, host_gb: float) -> dict[str, Any]:
  """What `batch_search.search` finds, with a bar of its compiles."""
  bar = tqdm.tqdm(total=len(batch_search.POLICIES) + 1, unit="compile")

  def compiled(config, told):
    bar.set_description(told)
    report = preflight(config, topology, host_gb=host_gb, wait=bar.refresh)
    bar.update()
    return report

  with bar:
    found = batch_search.search(
        config, parse_topology(topology).devices, compiled
    )
    bar.total = bar.n  # a third was not needed where the batch fits once
  return found


def main(argv: Sequence[str] | None = None) -> int:
  """The exit code of the command; its report is printed."""
  argv = sys.argv[1:] if argv is None else argv

  def body():
    arguments = command_line.split(
        argv,
        (
            *("config", "topology", "mfu", "price"),
            *("search", "diagnosis", "host-gb"),
        ),
    )
    file, topology = command_line.single(
        arguments.flags, config="FILE.py", topology="KIND:LAYOUT"
    )
    mfu, prices, host_gb = _assumptions(arguments.flags)
    config = config_files.load_config(file, arguments.overrides)
    if "search" in arguments.flags:
      found = _search(config, topology, host_gb)
      report = found["confirmed"]
      print(json.dumps(found), flush=True)
    else:
      report = preflight(
          config,
          topology,
          diagnosis="diagnosis" in arguments.flags,
          host_gb=host_gb,
      )
    if mfu and report["flops_per_step"]:
      report |= estimate(
          report["flops_per_step"], config.num_steps, mfu, prices
      )
    if "search" not in arguments.flags:
      print(json.dumps(report), flush=True)
    if not report["fits"]:
      raise errors.Stop(
          1,
          f"Does not fit: {report['gib_per_device']:.2f} GiB per device, of"
          f" {report['gib_limit']:.2f}.",
      )

  # As what is killed by it, but that the compiler is as well.
  with signals.on_sigterm(lambda *_: sys.exit(128 + signal.SIGTERM)):
    return command_line.guarded(body, debug="--debug" in argv)


if __name__ == "__main__":
  raise SystemExit(main())
