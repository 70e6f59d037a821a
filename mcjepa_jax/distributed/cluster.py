"""Where this process stands among those of a run: flags, variables, clusters."""

from collections.abc import Mapping, Sequence
import os
import re
from typing import NamedTuple

from jax._src import clusters

from mcjepa_jax import errors

FLAGS = ("coordinator", "processes", "process")


def hosts_missing(message: str) -> errors.Stop:
  """Returns what ends a host that others do not come to: a run to start again."""
  return errors.Stop(errors.EXIT_LOST, message)


class Process(NamedTuple):
  """Where this process stands among those of a run."""

  address: str  # HOST:PORT of process 0
  count: int
  index: int
  # Of each process where the cluster tells them.
  names: tuple[str, ...] = ()
  # JAX's name of the cluster; none for an address that was given.
  cluster: str | None = None

  def name(self, index: int) -> str:
    """How messages call a process."""
    known = f" ({self.names[index]})" if self.names else ""
    return f"process {index}{known}"


def find(
    flags: Mapping[str, Sequence[str]], *, seconds: float = 300.0
) -> Process | None:
  """This process, by flags, MCJEPA_* variables or the cluster; None if alone.

  Clusters are those that JAX knows: Cloud TPU, one slice or several, created
  directly or by GKE, and SLURM.

  Raises:
    UserError: a part is missing, or is none.
    Stop: the first host's name is not known within `seconds` (77).
  """
  given = {}
  for name in FLAGS:
    value = " ".join(flags.get(name, ()))
    given[name] = value or os.environ.get(f"MCJEPA_{name.upper()}", "")
  if any(given.values()):
    return _given_process(given)
  for cluster in (
      clusters.SlurmCluster,
      clusters.GkeTpuCluster,
      clusters.GceTpuCluster,
  ):
    if cluster.is_env_present() and cluster.get_process_count() > 1:
      try:
        address = cluster.get_coordinator_address(
            timeout_secs=seconds, override_coordinator_port=None
        )
      except RuntimeError as error:
        raise hosts_missing(f"process 0 did not come: {error}") from error
      count = cluster.get_process_count()
      if cluster is clusters.SlurmCluster:
        names = _nodes(count)
      else:
        names = tuple(cluster._get_worker_list_in_slice())
        if len(names) != count:  # those of another slice are not told here
          workers = len(names)
          names = tuple(
              f"slice {i // workers}, worker {i % workers}"
              for i in range(count)
          )
      return Process(
          address, count, cluster.get_process_id(), names, cluster.name
      )
  return None


def _nodes(count: int) -> tuple[str, ...]:
  """The node of each of srun's tasks; none where they do not go node by node.

  Of variables such as `gpu[001-003],login` and `4(x2),1`.
  """
  if not os.environ.get("SLURM_DISTRIBUTION", "block").startswith("block"):
    return ()
  listed = os.environ["SLURM_STEP_NODELIST"]
  one = r"[^,[\]]+(?:\[[\d,-]+\])?"
  if not re.fullmatch(rf"{one}(?:,{one})*", listed):
    return ()
  nodes, tasks = [], []
  for prefix, ranges in re.findall(r"([^,[\]]+)(?:\[([\d,-]*)\])?", listed):
    for part in ranges.split(","):
      first, _, last = part.partition("-")
      numbers = range(int(first), int(last) + 1) if last else (first,)
      nodes += [f"{prefix}{n:0>{len(first)}}" for n in numbers]
  for number, times in re.findall(
      r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
  ):
    tasks += [int(number)] * int(times or 1)
  names = tuple(
      node for node, n in zip(nodes, tasks, strict=False) for _ in range(n)
  )
  return names if len(names) == count else ()


def _given_process(given: Mapping[str, str]) -> Process | None:
  faults = []
  for name, pattern, hint in (
      ("coordinator", r".+:\d{1,5}", "HOST:PORT of process 0"),
      ("processes", r"[1-9]\d{0,5}", "how many there are"),
      ("process", r"\d{1,6}", "which of them this is, from 0"),
  ):
    if not re.fullmatch(pattern, given[name], re.ASCII):
      came = repr(given[name]) if given[name] else "nothing"
      faults.append(
          f"--{name} or MCJEPA_{name.upper()}: expected {hint}, got {came}"
      )
  if not faults and int(given["process"]) >= int(given["processes"]):
    faults.append(
        f"--process: expected 0 to {int(given['processes']) - 1}, got"
        f" {given['process']}"
    )
  if faults:
    raise errors.UserError(*faults)
  count = int(given["processes"])
  if count == 1:
    return None
  return Process(given["coordinator"], count, int(given["process"]))
