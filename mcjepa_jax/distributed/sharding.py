"""The mesh, which parameters are sharded over it, and batches on it.

Two axes, `data` and `shard`: the batch is split over both, and each large
parameter with its moments over `shard` alone (FSDP); the compiler gathers a
parameter where it is used. Shards lie inside a slice, the devices that a fast
network joins; over slices only gradients go.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8
import numpy as np

from mcjepa_jax import errors

AXES = ("data", "shard")


def all_devices() -> list[jax.Device]:
  """The devices of all hosts.

  Raises:
    UserError: JAX finds none of the platforms it was told to use.
  """
  try:
    return jax.devices()
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    raise errors.UserError(f"JAX_PLATFORMS: {reason}") from error


def make_mesh(devices: int = -1, data: int = -1, shard: int = -1) -> Mesh:
  """A mesh over the first `devices` devices; -1 is all of them.

  `data` and `shard` are the sizes of its axes, as of `mesh_shape`.

  Raises:
    UserError: the devices are not here, or the sizes do not fit them.
  """
  here = all_devices()
  count = len(here)
  if devices == -1:
    devices = count
  if not 1 <= devices <= count:
    raise errors.UserError(
        f"mesh.devices: expected -1 or 1 to {count}, the devices here, got"
        f" {devices}"
    )
  if jax.process_count() > 1 and devices != count:
    raise errors.UserError(
        f"mesh.devices: expected -1, all {count} devices of the"
        f" {jax.process_count()} hosts, got {devices}"
    )
  return mesh_of(here[:devices], data, shard)


def mesh_of(devices: Sequence[Any], data: int = -1, shard: int = -1) -> Mesh:
  """A mesh over devices in the order of their slices and hosts.

  jax.make_mesh may order them by the network. A host's rows of a batch would
  then lie apart, and the frames of a pair with those of another.
  """
  ordered = sorted(devices, key=device_order)
  slices = collections.Counter(device_order(device)[0] for device in ordered)
  together = math.gcd(*slices.values())
  shape = mesh_shape(len(ordered), together, data, shard)
  types = (AxisType.Auto,) * len(AXES)
  return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=types)


def mesh_shape(
    count: int, together: int, data: int = -1, shard: int = -1
) -> tuple[int, int]:
  """The sizes of the axes over `count` devices, `together` of them in a slice.

  -1 is what the other leaves; both, an axis `shard` as long as a slice.

  Raises:
    UserError: they do not fill the devices, or shards lie in several slices.
  """
  faults = [
      f"mesh.{name}: expected -1 or 1 to {count}, the devices, got {size}"
      for name, size in zip(AXES, (data, shard), strict=True)
      if size != -1 and not 1 <= size <= count
  ]
  if faults:
    raise errors.UserError(*faults)
  given = f"data={data} and shard={shard}"
  if shard == -1:
    shard = together if data == -1 else count // data
  if data == -1:
    data = count // shard
  if data * shard != count:
    raise errors.UserError(
        f"mesh: expected data x shard to be {count}, the devices, got {given}"
    )
  if together % shard:
    raise errors.UserError(
        f"mesh.shard: expected a divisor of {together}, the devices of a slice,"
        f" so that no parameter is split over slices, got {given}"
    )
  return data, shard


def dividing(mesh: Mesh, batch_size: int) -> Mesh:
  """A mesh over as many of a mesh's devices as divide a batch."""
  return mesh_of(list(mesh.devices.flat)[: math.gcd(batch_size, mesh.size)])


def device_order(device: Any) -> tuple[int, int, int]:
  """What orders devices by their slices, and within by their hosts.

  A slice of GPUs is what NVLink joins, a host mostly; CPUs name none.
  """
  slice_index = getattr(device, "slice_index", None) or 0
  return slice_index, device.process_index, device.id


def host_index() -> int:
  """The index of this process among those whose rows make a batch, in order."""
  ordered = sorted(jax.devices(), key=device_order)
  processes = list(dict.fromkeys(d.process_index for d in ordered))
  return processes.index(jax.process_index())


def spec(shape: tuple[int, ...], itemsize: int, parts: int, *, min_bytes: int) -> PartitionSpec:  # fmt: skip
  """How an array is split: its largest axis that divides, if it is large.

  Arrays under `min_bytes` are whole on each device; so are those of which no
  axis divides.
  """
  if math.prod(shape) * itemsize < min_bytes:
    return PartitionSpec()
  divisible = [i for i, side in enumerate(shape) if side % parts == 0]
  if not divisible:
    return PartitionSpec()
  # The last of equals: it is the contiguous one.
  axis = max(divisible, key=lambda i: (shape[i], i))
  return PartitionSpec(*([None] * axis), AXES[1])


def state_shardings(shapes: Any, mesh: Mesh, *, min_bytes: int) -> Any:
  """The sharding of each leaf of a state given as shapes.

  Adam's moments have their parameter's shape, and so its sharding.
  """

  def one(leaf):
    itemsize = np.dtype(leaf.dtype).itemsize
    return NamedSharding(
        mesh,
        spec(leaf.shape, itemsize, mesh.shape[AXES[1]], min_bytes=min_bytes),
    )

  return jax.tree.map(one, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays by their first axis."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what is whole on each device."""
  return NamedSharding(mesh, PartitionSpec())


def to_global(
    batch: Mapping[str, UInt8[np.ndarray, "..."]], mesh: Mesh
) -> dict[str, jax.Array]:
  """This host's rows as global arrays, split over the mesh by the first axis.

  Raises:
    UserError: the devices do not divide an array's rows.
  """
  rows = {key: len(x) * jax.process_count() for key, x in batch.items()}
  faults = [
      f"{key}: {count} rows, which {mesh.size} devices do not divide"
      for key, count in rows.items()
      if count % mesh.size
  ]
  if faults:
    raise errors.UserError(*faults)
  where = batch_sharding(mesh)
  return {
      key: jax.make_array_from_process_local_data(where, x)
      for key, x in batch.items()
  }


def cpu_options(level: int, platform: str) -> dict[str, str] | None:
  """The `compiler_options` that hold LLVM to a level below its 3, on CPUs."""
  if platform != "cpu":
    return None
  return {"xla_backend_optimization_level": str(level)}


def call_once(function: Callable[[], Any], **jit_arguments: Any) -> Any:
  """The result of a jitted function that nothing calls again.

  Made for initialisers: their many small kernels take LLVM three times as long
  to optimise (11 s against 4 on two CPU cores) as they can ever save.
  """
  options = cpu_options(0, jax.default_backend())
  return jax.jit(function, compiler_options=options, **jit_arguments)()
