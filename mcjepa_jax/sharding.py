"""The mesh, which parameters are sharded over it, and batches on it.

One axis, `data`: the batch is split over it, and so is each large parameter
with its moments (FSDP); the compiler gathers a parameter where it is used.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8
import numpy as np

from mcjepa_jax import errors

AXIS = "data"


def make_mesh(devices: int = -1) -> Mesh:
  """A mesh over the first `devices` devices; -1 is all of them."""
  count = jax.device_count()
  if devices == -1:
    devices = count
  if not 1 <= devices <= count:
    raise errors.UserError(
        f"mesh.devices: expected -1 or 1 to {count}, the devices here, got"
        f" {devices}"
    )
  if jax.process_count() > 1:
    if devices != count:
      raise errors.UserError(
          f"mesh.devices: expected -1, all {count} devices of the"
          f" {jax.process_count()} hosts, got {devices}"
      )
    return mesh_of(jax.devices())
  # make_mesh defaults to Explicit axes, which ask for shardings in the types.
  return jax.make_mesh(
      (devices,),
      (AXIS,),
      axis_types=(AxisType.Auto,),
      devices=jax.devices()[:devices],
  )


def mesh_of(devices: Sequence[Any]) -> Mesh:
  """A mesh over devices in the order of their hosts.

  make_mesh may order them by the network. A host's rows of a batch would then
  lie apart, and the frames of a pair with those of another.
  """
  ordered = np.array(sorted(devices, key=host_order))
  return Mesh(ordered, (AXIS,), axis_types=(AxisType.Auto,))


def dividing(mesh: Mesh, batch_size: int) -> Mesh:
  """A mesh over as many of a mesh's devices as divide a batch."""
  return mesh_of(list(mesh.devices.flat)[: math.gcd(batch_size, mesh.size)])


def host_order(device: Any) -> tuple[int, int]:
  """What orders devices by their hosts."""
  return device.process_index, device.id


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
  return PartitionSpec(*(AXIS if i == axis else None for i in range(axis + 1)))


def state_shardings(shapes: Any, mesh: Mesh, *, min_bytes: int) -> Any:
  """The sharding of each leaf of a state given as shapes.

  Adam's moments have their parameter's shape, and so its sharding.
  """

  def one(leaf):
    itemsize = np.dtype(leaf.dtype).itemsize
    return NamedSharding(
        mesh, spec(leaf.shape, itemsize, mesh.size, min_bytes=min_bytes)
    )

  return jax.tree.map(one, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays by their first axis."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


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
