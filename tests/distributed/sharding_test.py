"""The mesh, the rule of its parameters, and batches on it."""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.distributed import sharding

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices"
)


def test_mesh_takes_all_devices_or_the_first_few():
  assert sharding.make_mesh().devices.tolist() == [jax.devices()]
  assert sharding.make_mesh(3).devices.tolist() == [jax.devices()[:3]]


@pytest.mark.parametrize("devices", [0, -2, 1000])
def test_a_mesh_of_devices_that_are_not_there_is_refused(devices):
  with pytest.raises(errors.UserError, match=rf"mesh.devices.*got {devices}"):
    sharding.make_mesh(devices)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((-1, -1), (1, 8)),
        ((2, -1), (2, 4)),
        ((-1, 2), (4, 2)),
        ((8, 1), (8, 1)),
    ],
    ids=str,
)
def test_of_the_axes_one_is_what_the_other_leaves(sizes, expected):
  mesh = sharding.make_mesh(-1, *sizes)
  assert mesh.devices.shape == expected
  assert mesh.devices.flatten().tolist() == jax.devices()


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((0, -1), "mesh.data: expected -1 or 1 to 8, the devices, got 0"),
        ((-1, 9), "mesh.shard: expected -1 or 1 to 8, the devices, got 9"),
        ((3, -1), "mesh: .* to be 8, the devices, got data=3 and shard=-1"),
        ((2, 2), "mesh: .* to be 8, the devices, got data=2 and shard=2"),
    ],
    ids=str,
)
def test_axes_that_do_not_fill_the_devices_are_refused(sizes, message):
  with pytest.raises(errors.UserError, match=message):
    sharding.make_mesh(-1, *sizes)


@dataclasses.dataclass(frozen=True)
class _Device:
  id: int
  process_index: int
  slice_index: int


def _slices(order=(0, 1)):
  """Of two slices with two hosts of two devices, as JAX may list them."""
  return [
      _Device(id=i, process_index=i // 2, slice_index=order[i // 4])
      for i in (7, 2, 3, 0, 1, 6, 5, 4)
  ]


def test_shards_lie_in_a_slice_and_slices_split_the_batch_alone():
  # A mesh of fakes has no shardings: only its layout can be looked at.
  mesh = sharding.mesh_of(_slices())
  ids = [[device.id for device in row] for row in mesh.devices]
  assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
  ids = [d.id for d in sharding.mesh_of(_slices((1, 0))).devices.flat]
  assert ids == [4, 5, 6, 7, 0, 1, 2, 3]
  assert sharding.mesh_of(_slices(), data=4).devices.shape == (4, 2)
  for sizes in (dict(data=1), dict(shard=8), dict(data=1, shard=8)):
    with pytest.raises(errors.UserError, match="mesh.shard: .* of 4, the dev"):
      sharding.mesh_of(_slices(), **sizes)


def test_hosts_count_in_the_order_of_their_rows(monkeypatch):
  # As where a cluster gives neighbouring numbers to other nodes.
  devices = [
      _Device(id=i, process_index=i, slice_index=i % 2) for i in range(4)
  ]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  found = []
  for process in range(4):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    found.append(sharding.host_index())
  assert found == [0, 2, 1, 3]
  order = [d.process_index for d in sharding.mesh_of(devices).devices.flat]
  assert [order.index(process) for process in range(4)] == found


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((64, 128), (None, "shard")),
        ((128, 64), ("shard",)),
        # The largest axis that divides, not the largest axis.
        ((1001, 64), (None, "shard")),
        ((7, 7, 1, 160), (None, None, None, "shard")),
        # Of two equal axes the contiguous one.
        ((64, 64), (None, "shard")),
        ((7, 9), ()),
        ((), ()),
    ],
    ids=str,
)
def test_the_largest_axis_that_divides_is_split(shape, expected):
  spec = sharding.spec(shape, 4, 8, min_bytes=0)
  assert spec == PartitionSpec(*expected)


def test_arrays_under_the_threshold_are_whole():
  spec = sharding.spec((8, 8), 4, 8, min_bytes=257)
  assert spec == PartitionSpec()
  assert sharding.spec((8, 8), 4, 8, min_bytes=256) != PartitionSpec()
  # The threshold is in bytes, not in elements.
  assert sharding.spec((8, 8), 2, 8, min_bytes=256) == PartitionSpec()


def test_moments_are_split_as_their_parameter():
  mesh = sharding.make_mesh(8)
  kernel = jax.ShapeDtypeStruct((16, 32), jnp.float32)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  state = {"params": kernel, "opt": {"mu": kernel, "nu": kernel, "n": count}}
  found = sharding.state_shardings(state, mesh, min_bytes=1024)
  assert found["params"] == found["opt"]["mu"] == found["opt"]["nu"]
  assert found["params"].shard_shape((16, 32)) == (16, 4)
  assert found["opt"]["n"].is_fully_replicated
  found = sharding.state_shardings(
      state, sharding.make_mesh(8, data=2), min_bytes=1024
  )
  assert found["params"].shard_shape((16, 32)) == (16, 8)
  assert found["params"].spec == PartitionSpec(None, "shard")


def test_a_state_made_into_its_shardings_holds_a_part_on_each_device():
  mesh = sharding.make_mesh(8)

  def init():
    return {"kernel": jnp.arange(64.0).reshape(4, 16), "bias": jnp.ones(16)}

  where = sharding.state_shardings(jax.eval_shape(init), mesh, min_bytes=4 * 64)
  state = jax.jit(init, out_shardings=where)()
  assert {s.data.shape for s in state["kernel"].addressable_shards} == {(4, 2)}
  assert state["bias"].is_fully_replicated
  np.testing.assert_array_equal(state["kernel"], init()["kernel"])


@pytest.mark.parametrize("data", [1, 2, 8])
def test_batch_is_split_by_its_first_axis_in_order(data):
  mesh = sharding.make_mesh(8, data)
  frames = np.arange(16 * 2 * 3, dtype=np.uint8).reshape(16, 2, 3)
  batch = sharding.to_global({"frames": frames, "view": frames[:8, 0]}, mesh)
  assert batch["frames"].sharding == sharding.batch_sharding(mesh)
  assert batch["frames"].dtype == np.uint8
  for i, shard in enumerate(batch["frames"].addressable_shards):
    np.testing.assert_array_equal(shard.data, frames[2 * i : 2 * i + 2])
  np.testing.assert_array_equal(batch["view"], frames[:8, 0])


def test_a_batch_that_does_not_divide_names_each_key():
  mesh = sharding.make_mesh(8)
  rows = {"frames": 12, "views": 8, "more": 7}
  batch = {key: np.zeros((n, 2), np.uint8) for key, n in rows.items()}
  with pytest.raises(errors.UserError) as caught:
    sharding.to_global(batch, mesh)
  assert [m.split(",")[0] for m in caught.value.messages] == [
      "frames: 12 rows",
      "more: 7 rows",
  ]
  assert all("8 devices" in m for m in caught.value.messages)


def test_rows_of_all_hosts_count_together(monkeypatch):
  mesh = sharding.make_mesh(8)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  with pytest.raises(errors.UserError, match="frames: 36 rows"):
    sharding.to_global({"frames": np.zeros((12, 2), np.uint8)}, mesh)


def test_a_sum_over_a_split_batch_is_over_the_whole_batch():
  mesh = sharding.make_mesh(8)
  x = np.arange(16, dtype=np.uint8).reshape(16, 1)
  batch = sharding.to_global({"x": x}, mesh)
  total = jax.jit(
      lambda b: jnp.sum(b["x"].astype(jnp.float32)),
      in_shardings=({"x": sharding.batch_sharding(mesh)},),
      out_shardings=sharding.replicated(mesh),
  )(batch)
  assert total == 120 and total.is_fully_replicated


def test_a_mesh_of_many_hosts_keeps_each_hosts_devices_together():
  # As of a 4x4 torus with 2x2 hosts, where the numbers go along the rows.
  devices = [
      types.SimpleNamespace(id=i, process_index=i // 8 * 2 + i % 4 // 2)
      for i in range(16)
  ]
  order = sorted(devices, key=sharding.device_order)
  assert [d.process_index for d in order] == [i // 4 for i in range(16)]
