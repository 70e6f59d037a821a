"""Preflight compiles the step that train runs, and says whether it fits."""

import concurrent.futures
import importlib.util
import json
import math
import multiprocessing
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from configs import quickstart
from mcjepa_jax import preflight
from mcjepa_jax.distributed import sharding
from mcjepa_jax.errors import UserError
from mcjepa_jax.step import train_state, update
from mcjepa_jax.training import build

_KEYS = {
    "topology",
    "devices",
    "step",
    "images",
    "pairs",
    "finest_stride",
    "gib_per_device",
    "state_gib",
    "gib_limit",
    "fits",
    "flops_per_step",
    "hbm_bytes",
    "collective_bytes",
    "compile_seconds",
    "host_peak_gb",
}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def _small_config(mode: str) -> Any:
  config = quickstart.get_config()
  config.mode = mode
  config.model.encoder.update(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
  config.model.expander.widths = (16, 16)
  # Two levels of one convolution each: a TPU program compiles for minutes.
  config.model.estimator.update(channels=(8,), finest_stride=16)
  config.motion.update(batch_size=4, size=(64, 64))
  config.content.update(batch_size=8, size=32)
  return config


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("cpu:8", 8),
        ("v5e:4x4", 16),
        ("v4:2x2x4", 16),
        ("v6e:1x1", 1),
        ("2xv5e:4x4", 32),
    ],
)
@needs_libtpu
def test_topology_knows_its_devices(name: str, devices: int):
  assert preflight.parse_topology(name).devices == devices


@pytest.mark.parametrize(
    "name",
    [
        "",
        "v5e",
        "v5e:",
        "v5e:2x2x2",
        "v4:2x2",
        "v9:2x2",
        "cpu:0",
        "v5e:0x2",
        "2xcpu:4",
        "0xv5e:2x2",
        "2xv5e",
    ],
)
def test_no_topology_is_a_fault_that_names_the_known(name: str):
  with pytest.raises(UserError, match="--topology: expected .*v5e:2x2"):
    preflight.parse_topology(name)


def test_missing_libtpu_is_a_fault_that_says_so(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="libtpu"):
    preflight.parse_topology("v5e:2x2")
  assert preflight.parse_topology("cpu:2").devices == 2


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory"
            " required for HLO temporaries (123.52G) exceeds available HBM"
            " (15.75G).",
            123.52,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used"
            " 23.01G of 15.75G hbm. Exceeded hbm capacity by 7.26G.",
            23.01,
        ),
    ],
)
def test_reads_what_the_compiler_asked_for(message: str, gib: float):
  assert preflight.gib_asked(message) == pytest.approx(gib)


def test_batch_that_the_devices_do_not_divide_is_a_fault():
  with pytest.raises(UserError, match="content.batch_size: 8 .*3 devices"):
    preflight.preflight(_small_config("content"), "cpu:3")


@needs_libtpu
def test_shards_over_slices_are_a_fault_before_anything_is_compiled():
  config = _small_config("content")
  config.mesh.shard = 8
  with pytest.raises(UserError, match="mesh.shard: expected a divisor of 4"):
    preflight.preflight(config, "2xv5e:2x2")


def test_reports_on_emulated_devices():
  config = _small_config("content")
  report = preflight.preflight(config, "cpu:2")
  assert set(report) == _KEYS
  assert report["fits"]
  assert (report["devices"], report["images"], report["pairs"]) == (2, 8, 0)
  assert report["flops_per_step"] > 0
  # Each gradient of the encoder and the expander is reduced over the devices.
  mesh = sharding.make_mesh(1)
  model, optimizers = build.model(config), build.optimizers(config)
  state = train_state.abstract_state(model, optimizers, mesh, min_bytes=2**40)
  moved = jax.tree.leaves([state.params[g] for g in ("encoder", "expander")])
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in moved)
  # No upper bound: the CPU form of the depthwise convolution reduces products
  # larger than its kernel's gradient.
  assert size <= sum(report["collective_bytes"].values())


def test_reports_on_a_diagnosis():
  config = _small_config("content")
  report = preflight.preflight(config, "cpu:2", diagnosis=True)
  assert set(report) == _KEYS
  assert report["step"] == "diagnosis of content" and report["images"] == 8
  step = preflight.preflight(config, "cpu:2")
  # The optimizer's part of the state is there meanwhile.
  assert report["state_gib"] == pytest.approx(step["state_gib"])
  assert report["gib_per_device"] > report["state_gib"]


_COMMAND = ["--config=configs/quickstart.py", "--topology=v5e:2x2"]


def _exit_code(monkeypatch, *flags: str, fits: bool) -> int:
  report = {
      "fits": fits,
      "gib_per_device": 3.0,
      "gib_limit": 2.0,
      # One second of a whole v5e.
      "flops_per_step": 197e12,
  }
  monkeypatch.setattr(preflight, "preflight", lambda *_, **__: report)
  return preflight.main([*_COMMAND, *flags])


def test_exit_code_says_whether_it_fits(monkeypatch, capsys):
  assert _exit_code(monkeypatch, fits=True) == 0
  assert _exit_code(monkeypatch, fits=False) == 1
  out, err = capsys.readouterr()
  assert json.loads(out.splitlines()[-1])["gib_limit"] == 2.0
  assert err == "Does not fit: 3.00 GiB per device, of 2.00.\n"


def test_the_search_prints_what_it_found_and_how_far_it_is(monkeypatch, capsys):
  asked = []

  def report(config, topology, *, host_gb, wait):
    wait()
    images = config.content.batch_size
    asked.append((topology, config.remat, images, host_gb))
    gib = images * {"none": 0.5, "block": 0.25}[config.remat]
    return {
        "state_gib": 0.0,
        "gib_per_device": gib,
        "gib_limit": 15.75,
        "fits": gib <= 15.75 and images < 100,
        "flops_per_step": images,
    }

  monkeypatch.setattr(preflight, "preflight", report)
  flags = [*_COMMAND, "--search", "--host-gb=9"]
  overrides = "--config.content.batch_size=8", "--config.motion.batch_size=4"
  assert preflight.main([*flags, *overrides]) == 0
  told = capsys.readouterr()
  found = json.loads(told.out.splitlines()[-1])
  assert found["remat"] == "block" and found["confirmed"]["fits"]
  assert {name: row["images"] for name, row in found["foretold"].items()} == {
      "none": 28,
      "block": 56,
  }
  assert [batch for _, _, batch, _ in asked] == [4, 4, 56]
  assert {(name, gb) for name, *_, gb in asked} == {("v5e:2x2", 9.0)}
  assert "block, 56+28" in told.err and "3/3" in told.err


def test_hours_and_cost_follow_from_an_mfu_and_prices(monkeypatch, capsys):
  flags = "--mfu=50", "--price=v5e=1.2", "--price=h100=3.99"
  assert _exit_code(monkeypatch, *flags, fits=True) == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  hours = quickstart.get_config().num_steps * 2 / 3600
  assert report["mfu"] == 50
  assert report["device_hours"]["v5e"] == pytest.approx(hours)
  h100 = report["device_hours"]["h100"]
  assert h100 == pytest.approx(hours * 197 / 989.4)
  assert report["usd"] == pytest.approx(
      {"v5e": 1.2 * hours, "h100": 3.99 * h100}
  )


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["--config=configs/quickstart.py"], "--topology: expected"),
        (["--config=none.py", "--topology=cpu:2"], "no file none.py"),
        (["--topology=cpu:2", "--topolgy=x"], "did you mean --topology"),
        ([*_COMMAND, "--mfu=none"], "--mfu: .*up to 100, got 'none'"),
        ([*_COMMAND, "--mfu=101"], "--mfu: .*up to 100, got '101'"),
        ([*_COMMAND, "--mfu=35", "--price=tpu=2"], "--price: .*got 'tpu=2'"),
        ([*_COMMAND, "--mfu=35", "--price=v5e"], "--price: .*got 'v5e'"),
        ([*_COMMAND, "--price=v5e=1.2"], "--price: expected --mfu=PERCENT"),
    ],
)
def test_faults_of_the_command_line_exit_with_2(argv, fault, capsys):
  assert preflight.main(argv) == 2
  lines = capsys.readouterr().err.splitlines()
  assert any(re.search(fault, line) for line in lines)
  assert all(line.startswith("error: ") for line in lines)


def test_a_compiler_that_takes_too_much_memory_is_ended(capsys):
  flags = "--config=configs/quickstart.py", "--topology=cpu:1"
  assert preflight.main([*flags, "--host-gb=0.1"]) == 1
  assert "more than --host-gb=0.1 GB: ended" in capsys.readouterr().err
  assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_ends_the_compiler_too():
  process = subprocess.Popen(
      [sys.executable, "-m", "mcjepa_jax.preflight", *_COMMAND[:1],
       "--topology=cpu:1"],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
  )  # fmt: skip
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  deadline = time.monotonic() + 120
  compilers = []
  while not compilers:
    assert process.poll() is None and time.monotonic() < deadline
    compilers = [
        pid
        for pid in children.read_text().split()
        if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    time.sleep(0.01)
  process.terminate()
  assert process.wait(60) == 128 + signal.SIGTERM
  assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in compilers)


@needs_libtpu
@pytest.mark.proof
@pytest.mark.slow
def test_two_tpu_programs_compile_at_once():
  config = _small_config("content")
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    small, large = pool.map(
        lambda topology: preflight.preflight(config, topology),
        ["v5e:2x2", "v5p:2x2x2"],
    )
  assert set(small) == set(large) == _KEYS
  assert small["fits"] and large["fits"]
  assert (small["devices"], large["devices"]) == (4, 8)
  assert (small["gib_limit"], large["gib_limit"]) == (15.75, 95.74)
  assert small["collective_bytes"]["all-reduce"] > 0


@needs_libtpu
@pytest.mark.slow
def test_too_large_a_batch_does_not_fit():
  config = _small_config("content")
  config.content.batch_size = 2**17
  config.content.size = 128
  report = preflight.preflight(config, "v5e:2x2")
  assert not report["fits"]
  assert report["gib_per_device"] > report["gib_limit"]


def _groups_that_gather(config: Any, name: str) -> list[np.ndarray]:
  """The devices of each group of each all-gather; in a process of its own."""
  topology = preflight.parse_topology(name)
  mesh = sharding.mesh_of(preflight._devices(topology))
  model, optimizers = build.model(config), build.optimizers(config)
  abstract = build.abstract_state(config, model, optimizers, mesh)
  step = update.make_train_step(
      model, optimizers, build.recipe(config), "content"
  )
  shapes = build.batch_shapes(config, "content", (64, 64))
  lowered = update.jit_train_step(step, abstract, mesh).lower(abstract, shapes)
  text, found = lowered.compile().as_text(), []
  for groups in re.findall(
      r" all-gather(?:-start)?\(.*replica_groups=(\S+?)(?:, |$)", text, re.M
  ):
    if iota := re.fullmatch(
        r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups
    ):
      to, of, order = (
          tuple(map(int, part.split(","))) if part else None
          for part in iota.groups()
      )
      ids = np.arange(math.prod(of)).reshape(of)
      found += [*np.transpose(ids, order).reshape(to)]
    else:
      found += [
          np.array(json.loads(f"[{group}]"))
          for group in re.findall(r"\{([\d,]+)\}", groups)
      ]
  return found


@needs_libtpu
@pytest.mark.proof
@pytest.mark.slow
def test_two_slices_gather_parameters_in_each():
  config = _small_config("content")
  config.mesh.shard_min_mib = 0.0005
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    groups = pool.submit(_groups_that_gather, config, "2xv5e:2x2").result()
  assert groups
  for group in groups:
    assert len(group) <= 4 and len(set(group // 4)) == 1, groups


@needs_libtpu
@pytest.mark.slow
def test_joint_step_compiles_for_a_tpu():
  report = preflight.preflight(_small_config("combined"), "v5e:2x2")
  assert report["fits"]
  assert (report["images"], report["pairs"]) == (8, 4)
