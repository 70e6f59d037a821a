"""What flags, variables and clusters say of a process."""

import os
import time

import pytest

from mcjepa_jax import errors
from mcjepa_jax.distributed import cluster


def test_flags_go_before_variables_and_both_before_none(monkeypatch):
  monkeypatch.setenv("MCJEPA_COORDINATOR", "10.0.0.1:1234")
  monkeypatch.setenv("MCJEPA_PROCESSES", "4")
  monkeypatch.setenv("MCJEPA_PROCESS", "3")
  process = cluster.find({"process": ["2"]})
  assert process == cluster.Process("10.0.0.1:1234", 4, 2)
  monkeypatch.setenv("MCJEPA_PROCESSES", "1")
  assert cluster.find({"process": ["0"]}) is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (dict(coordinator=["a:1"]), ["--processes or", "--process or"]),
        (
            dict(coordinator=["a"], processes=["2"], process=["0"]),
            ["--coordinator or MCJEPA_COORDINATOR: expected HOST:PORT"],
        ),
        (
            dict(coordinator=["a:1"], processes=["2"], process=["2"]),
            ["--process: expected 0 to 1, got 2"],
        ),
        (
            dict(coordinator=["a:1"], processes=["x"], process=["-1"]),
            ["--processes or", "--process or"],
        ),
    ],
)
def test_a_process_that_is_none_is_told(flags, expected):
  with pytest.raises(errors.UserError) as caught:
    cluster.find(flags)
  messages = caught.value.messages
  assert len(messages) == len(expected)
  assert all(m.startswith(e) for m, e in zip(messages, expected, strict=True))


def test_slurm_gives_the_process(monkeypatch):
  for name, value in (
      ("JOB_ID", "17"), ("STEP_NODELIST", "node[004-007,9]"), ("NTASKS", "4"),
      ("PROCID", "3"), ("LOCALID", "0"),
  ):  # fmt: skip
    monkeypatch.setenv(f"SLURM_{name}", value)
  process = cluster.find({})
  assert process.address.startswith("node004:")
  assert (process.count, process.index, process.cluster) == (4, 3, "slurm")
  assert process.names == ()
  monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2),2,1")
  monkeypatch.setenv("SLURM_NTASKS", "5")
  process = cluster.find({})
  assert process.names == (
      "node004",
      "node005",
      "node006",
      "node006",
      "node007",
  )
  assert process.name(3) == "process 3 (node006)"
  monkeypatch.setenv("SLURM_STEP_NODELIST", "login,gpu[9-10,12]")
  monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2,1(x3)")
  assert cluster.find({}).names == ("login", "login", "gpu9", "gpu10", "gpu12")
  monkeypatch.setenv("SLURM_DISTRIBUTION", "cyclic")
  assert cluster.find({}).names == ()
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert cluster.find({}) is None


def test_a_slice_of_gke_gives_the_process_and_the_names(monkeypatch):
  kind = cluster.clusters.GkeTpuCluster
  module = cluster.clusters.cloud_tpu_cluster
  monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(kind, "wait_for_coordinator", lambda *_: None)
  monkeypatch.setattr(module, "get_tpu_env_value", os.environ.get)
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "pod-0.svc,pod-1.svc")
  monkeypatch.setenv("TPU_WORKER_ID", "1")
  process = cluster.find({})
  assert process.address.startswith("pod-0.svc:")
  assert (process.count, process.index) == (2, 1)
  assert process.name(1) == "process 1 (pod-1.svc)"
  # Two slices: places go on, names are of this slice only.
  monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
  monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
  monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "pod-0.first")
  process = cluster.find({})
  assert process.address.startswith("pod-0.first:")
  assert (process.count, process.index) == (4, 3)
  assert process.name(2) == "process 2 (slice 1, worker 0)"


def test_a_first_host_whose_name_is_never_known_is_told(monkeypatch):
  monkeypatch.setattr(
      cluster.clusters.cloud_tpu_cluster, "running_in_cloud_tpu_vm", True
  )
  for name, value in (
      ("TPU_WORKER_HOSTNAMES", "a.invalid,b.invalid"), ("TPU_WORKER_ID", "1"),
      ("MEGASCALE_COORDINATOR_ADDRESS", "a.invalid"),
      ("MEGASCALE_NUM_SLICES", "1"), ("MEGASCALE_SLICE_ID", "0"),
  ):  # fmt: skip
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(time, "sleep", lambda seconds: None)
  with pytest.raises(
      errors.Stop, match="process 0 did not come: .*a.inval"
  ) as e:
    cluster.find({}, seconds=0.1)
  assert e.value.code == 77


def test_a_slice_of_compute_engine_gives_the_process_and_the_names(monkeypatch):
  module = cluster.clusters.cloud_tpu_cluster
  metadata = {
      "agent-worker-number": "1",
      # As queued resources have it; older ones name:id:address.
      "worker-network-endpoints": "a:0:10.0.0.2,b:1:10.0.0.3",
      "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nZONE: 'us-east5-b'",
  }
  monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(
      module,
      "get_metadata",
      lambda key: (metadata[key], 200) if key in metadata else ("", 404),
  )
  kind = cluster.clusters.GceTpuCluster
  monkeypatch.setattr(kind, "wait_for_coordinator", lambda *_: None)
  for name in os.environ:
    if name.startswith(("TPU_", "MEGASCALE_")):
      monkeypatch.delenv(name)
  process = cluster.find({})
  assert process.address.startswith("10.0.0.2:")
  assert (process.count, process.index, process.cluster) == (2, 1, "gcetpu")
  assert process.name(0) == "process 0 (10.0.0.2)"
  # The second of two slices.
  metadata["worker-network-endpoints"] = "c,d"
  metadata["tpu-env"] += (
      "\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"
      "\nMEGASCALE_COORDINATOR_ADDRESS: 'a:8080'"
  )
  process = cluster.find({})
  assert process.address.startswith("a:") and not process.address.endswith(
      "8080"
  )
  assert (process.count, process.index) == (4, 3)
  assert process.name(1) == "process 1 (slice 0, worker 1)"
  # One host is no run of several.
  metadata["worker-network-endpoints"] = "c"
  metadata["tpu-env"] = ""
  assert cluster.find({}) is None
  # A machine without a TPU.
  del metadata["agent-worker-number"]
  assert cluster.find({}) is None
