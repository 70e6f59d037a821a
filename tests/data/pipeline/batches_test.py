"""Batches depend on the seed and the index alone."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mcjepa_jax.data.pipeline import batches, geometry
from mcjepa_jax.errors import UserError
from tests.helpers.repository import ROOT


class Records:
  """Pairs and images whose pixels tell the record, with labels of noise."""

  def __init__(self, length: int, *, noise: int = 0, side: int = 20):
    self._length = length
    self._noise = np.random.default_rng(noise)
    self._side = side

  def __len__(self) -> int:
    return self._length

  def record_id(self, index: int) -> str:
    return f"{index:03d}"

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    image = np.random.default_rng(index).integers(
        0, 256, (self._side, self._side, 3), dtype=np.uint8
    )
    image[..., 0] = index
    other = image.copy()
    other[..., 0] = index + 100
    return {
        "frame_1": image,
        "frame_2": other,
        "image": image,
        "flow": self._noise.normal(size=(self._side, self._side, 2)),
        "valid": self._noise.random((self._side, self._side, 1)),
        "label": self._noise.integers(10),
    }


class Broken(Records):
  """Each element is a fault that tells what the worker's JAX has done."""

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = bridge is not None and bridge.backends_are_initialized()
    raise UserError(f"a.png: {os.getpid()}, backends started: {started}")


def motion(length: int = 10, *, seed: int = 0, batch_size: int = 4, **options):
  source = batches.MotionSource(
      "made", Records(length), (16, 16), geometry={"swap": False}
  )
  return batches.motion_stream(
      [source], batch_size=batch_size, seed=seed, **options
  )


def content(length: int = 10, *, seed: int = 0, batch_size: int = 4, **options):
  return batches.content_stream(
      [batches.ContentSource("images", Records(length))],
      size=8,
      batch_size=batch_size,
      seed=seed,
      **options,
  )


def mixed(**options):
  """Two sources of other lengths, sizes and weights, whole batches of each."""
  sources = [
      batches.MotionSource("much", Records(7), (8, 12), weight=2.0),
      batches.MotionSource("little", Records(5), (12, 8), weight=1.0),
  ]
  return batches.motion_stream(sources, **dict(batch_size=4, seed=0) | options)


def assert_same(batch, other):
  assert batch[1] == other[1]
  assert batch[0].keys() == other[0].keys()
  for key, array in batch[0].items():
    np.testing.assert_array_equal(array, other[0][key])


def test_a_pair_is_two_neighbouring_frames():
  arrays, records, _ = motion()[3]
  assert arrays["frames"].shape == (8, 16, 16, 3)
  assert arrays["frames"].dtype == np.uint8
  numbers = [int(record.removeprefix("made/")) for record in records]
  red = arrays["frames"][:, 0, 0, 0]
  np.testing.assert_array_equal(red[0::2], numbers)
  np.testing.assert_array_equal(red[1::2], np.array(numbers) + 100)
  np.testing.assert_array_equal(
      arrays["frames"][0::2, ..., 1:], arrays["frames"][1::2, ..., 1:]
  )


def test_the_views_of_an_image_are_neighbours_and_differ():
  arrays, records, _ = content()[3]
  views = arrays["views"]
  assert views.shape == (8, 8, 8, 3)
  assert views.dtype == np.uint8
  numbers = [int(record.removeprefix("images/")) for record in records]
  np.testing.assert_array_equal(views[:, 0, 0, 0], np.repeat(numbers, 2))
  assert all((views[0::2] != views[1::2]).any((1, 2, 3)))


@pytest.mark.parametrize("stream", [motion, content])
def test_each_epoch_holds_every_record_once_in_an_order_of_its_own(stream):
  records = [r for k in range(6) for r in stream(12)[k][1]]
  assert len(set(records[:12])) == len(set(records[12:])) == 12
  assert records[:12] != records[12:]


@pytest.mark.parametrize("stream", [motion, content])
def test_a_record_is_cut_anew_in_each_epoch(stream):
  cuts = [next(iter(stream(1, batch_size=1)[k][0].values())) for k in range(4)]
  assert len({cut.tobytes() for cut in cuts}) == 4


@pytest.mark.parametrize("stream", [motion, content])
def test_another_seed_gives_another_order_and_other_cuts(stream):
  ours, others = stream(12, seed=0)[0], stream(12, seed=1)[0]
  assert ours[1] != others[1]
  first = [next(iter(stream(1, seed=s)[0][0].values())) for s in (0, 1)]
  assert (first[0] != first[1]).any()


@pytest.mark.parametrize("lengths", [(40, 40, 40), (40, 24, 33)])
def test_streams_and_sources_share_no_randomness(monkeypatch, lengths):
  draws = []

  def draw(*arguments, **_):
    draws.append(int(arguments[-1].integers(2**62)))
    return 2 * [np.zeros((1, 1, 3), np.uint8)]

  monkeypatch.setattr(geometry, "pair_frames", draw)
  monkeypatch.setattr(geometry, "two_views", draw)
  sources = [
      batches.MotionSource(name, Records(length), (16, 16))
      for name, length in zip("ab", lengths, strict=False)
  ]
  pairs = batches.motion_stream(sources, batch_size=40, seed=5)
  images = content(lengths[2], batch_size=40, seed=5)
  parts = [stream[k] for stream in (pairs, images) for k in range(6)]
  orders = [[record[-3:] for record in part.records] for part in parts]
  # Three epochs of each source or more.
  assert len(set(draws)) == len(draws) == 480
  assert len(set(map(tuple, orders))) == 12


def joined(parts):
  """The parts of all hosts, in order, as one."""
  (key,) = parts[0].arrays
  return (
      {key: np.concatenate([part.arrays[key] for part in parts])},
      [record for part in parts for record in part.records],
  )


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("stream", [motion, content, mixed])
def test_the_parts_of_the_hosts_are_the_batch_of_one_host(stream, hosts):
  streams = [stream(host_index=h, host_count=hosts) for h in range(hosts)]
  for k in (0, 3, 7):
    assert_same(joined([s[k] for s in streams]), stream()[k])


@pytest.mark.parametrize("pairs, hosts", [(4, 8), (1, 2), (6, 4), (9, 6)])
@pytest.mark.parametrize("stream", [motion, content, mixed])
def test_hosts_that_share_a_pair_read_it_both_and_keep_a_part(
    stream, pairs, hosts
):
  one = stream(batch_size=pairs)
  streams = [
      stream(batch_size=pairs, host_index=h, host_count=hosts)
      for h in range(hosts)
  ]
  assert all(s.state() == one.state() for s in streams)
  for k in (0, 3, 7):
    parts = [s[k] for s in streams]
    # Two neighbours tell the same records: each pair once, of every other.
    assert [p.records for p in parts[::2]] == [p.records for p in parts[1::2]]
    arrays, _ = joined(parts)
    assert_same((arrays, joined(parts[::2])[1]), one[k])
    rows = {len(x) for part in parts for x in part.arrays.values()}
    assert rows == {2 * pairs // hosts}


def test_both_readers_of_an_unreadable_record_replace_it_alike():
  source = batches.MotionSource("holed", Holed(10, (3, 4)), (16, 16))
  one, *two = (
      batches.motion_stream([source], batch_size=1, seed=0, **host)
      for host in (
          {},
          dict(host_index=0, host_count=2),
          dict(host_index=1, host_count=2),
      )
  )
  for k in range(10):
    parts = [stream[k] for stream in two]
    assert_same((joined(parts)[0], parts[0].records), one[k])
    assert parts[0].records == parts[1].records
    assert parts[0].faults == parts[1].faults == one[k].faults


@pytest.mark.parametrize("stream", [motion, content, mixed])
def test_in_mid_epoch_other_hosts_go_on_with_the_same_batches(stream):
  # 10 records in fours: batch 4 lies in the second epoch.
  with stream(host_index=1, host_count=2) as before:
    for _ in range(4):
      next(before)
    state = before.state()
  # One small record, the same from any number of hosts.
  assert state == stream(start=4).state()
  assert len(json.dumps(state)) < 1000
  state = json.loads(json.dumps(state))
  after = [stream(host_index=h, host_count=4) for h in range(4)]
  for other in after:
    other.restore(state)
  for k in range(4, 8):
    assert_same(joined([next(other) for other in after]), stream()[k])
  for other in after:
    other.close()


@pytest.mark.parametrize("stream", [motion, content])
def test_over_three_epochs_each_record_comes_three_times(stream):
  # Batches of 4 straddle the epochs of 10 records.
  records = [r for k in range(15) for r in stream()[k].records][:30]
  for epoch in range(3):
    assert len(set(records[10 * epoch : 10 * epoch + 10])) == 10


def test_over_three_epochs_each_record_of_a_mixture_comes_three_times():
  records = [r for k in range(24) for r in mixed()[k].records]
  for name, length in (("much", 7), ("little", 5)):
    own = [r for r in records if r.startswith(name)]
    assert len(own) >= 3 * length
    for epoch in range(3):
      assert len(set(own[length * epoch : length * (epoch + 1)])) == length


class Holed(Records):
  """Some of its elements cannot be read."""

  def __init__(self, length: int, holes: tuple[int, ...]):
    super().__init__(length)
    self._holes = holes

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if index in self._holes:
      raise UserError(f"{index:03d}.png: cut")
    return super().__getitem__(index)


def holed(*holes: int, **options):
  source = batches.ContentSource("images", Holed(10, holes))
  return batches.content_stream(
      [source], size=8, batch_size=5, seed=0, **options
  )


def test_an_unreadable_record_is_replaced_and_all_others_keep_their_positions():
  whole, part = holed()[0].records + holed()[1].records, [
      holed(3, 4)[k] for k in (0, 1)
  ]
  records = part[0].records + part[1].records
  expected = {f"images/00{i}": f"images/00{i}" for i in range(10)}
  # The next that is tried is 104,729 further: of ten records the one before.
  expected |= {"images/003": "images/002", "images/004": "images/002"}
  assert records == [expected[record] for record in whole]
  faults = part[0].faults + part[1].faults
  # 4 is tried in its own place; 3 in its own, and in that of 4.
  assert sorted(faults) == [
      ("images/003", "003.png: cut"),
      ("images/003", "003.png: cut"),
      ("images/004", "004.png: cut"),
  ]
  untouched = [
      i for i, r in enumerate(whole) if r not in ("images/003", "images/004")
  ]
  views = [
      np.concatenate([s[k].arrays["views"] for k in (0, 1)])
      for s in (holed(), holed(3, 4))
  ]
  for i in untouched:
    np.testing.assert_array_equal(*(v[2 * i : 2 * i + 2] for v in views))


def test_workers_pass_on_what_was_replaced():
  with holed(3, 4, num_workers=2) as stream:
    for k in range(4):
      part = next(stream)
      assert_same(part, holed(3, 4)[k])
      assert part.faults == holed(3, 4)[k].faults


def test_where_nothing_can_be_read_the_faults_are_the_error():
  with pytest.raises(UserError) as caught:
    next(holed(*range(10)))
  assert len(caught.value.messages) == 10


def test_sources_take_turns_by_weight_with_a_size_of_their_own():
  sources = [
      batches.MotionSource("much", Records(5), (8, 12), weight=0.3),
      batches.MotionSource("little", Records(7), (12, 8), weight=0.1),
  ]
  stream = batches.motion_stream(sources, batch_size=3, seed=0)
  names = []
  for k in range(40):
    arrays, records, _ = stream[k]
    (name,) = {record.split("/")[0] for record in records}
    size = (8, 12) if name == "much" else (12, 8)
    assert arrays["frames"].shape == (6, *size, 3)
    names.append(name)
  assert names.count("much") == 30


def test_no_label_enters_a_batch():
  for key, make in (
      (
          "frames",
          lambda data: batches.motion_stream(
              [batches.MotionSource("a", data, (16, 16))], batch_size=4, seed=0
          ),
      ),
      (
          "views",
          lambda data: batches.content_stream(
              [batches.ContentSource("a", data)], size=8, batch_size=4, seed=0
          ),
      ),
  ):
    made = [make(Records(10, noise=noise))[1] for noise in (0, 1)]
    assert set(made[0][0]) == {key}
    assert_same(*made)


def test_workers_continue_anywhere_in_the_order_of_one_process():
  stream = motion()
  with stream:
    for k in range(3):
      assert_same(next(stream), stream[k])
    state = stream.state()
  assert state["next_batch"] == 3
  with motion(num_workers=2) as continued:
    continued.restore(state)
    for k in range(3, 8):
      assert continued.state() == {**state, "next_batch": k}
      assert_same(next(continued), stream[k])
  with motion(start=6) as late:
    assert_same(next(late), stream[6])


def test_restoring_over_other_data_names_every_difference():
  state = motion(10, seed=0, batch_size=4).state()
  with pytest.raises(UserError) as caught:
    motion(11, seed=3, batch_size=8).restore(state)
  message = str(caught.value)
  assert "motion" in message
  assert "batch_size was 4, is 8" in message
  assert "seed was 0, is 3" in message
  assert "sources[0].length was 10, is 11" in message
  assert "size was" not in message.replace("batch_size", "")


class Renamed(Records):
  """The same number of records, of which one has another name."""

  def record_id(self, index: int) -> str:
    return "other" if index == 5 else super().record_id(index)


def test_sets_that_differ_in_their_middle_have_another_fingerprint():
  def stream(records):
    return batches.content_stream(
        [batches.ContentSource("images", records)],
        size=8, batch_size=4, seed=0,
    )  # fmt: skip

  state = stream(Records(10)).state()
  stream(Records(10)).restore(state)
  with pytest.raises(UserError, match=r"sources\[0\].digest was .*, is ") as e:
    stream(Renamed(10)).restore(state)
  assert "ends" not in str(e.value)  # which are the same
  # Of a large set the names of some records are read, spread over it.
  drawn = []
  large = Records(100_000)
  large.record_id = lambda index: drawn.append(index) or str(index)
  stream(large)
  assert len(drawn) == 256 and (drawn[0], drawn[-1]) == (0, 99_999)
  assert set(np.diff(drawn)) <= {392, 393}


def test_a_checkpoint_without_a_digest_is_restored():
  state = content().state()
  del state["fingerprint"]["sources"][0]["digest"]
  with content() as stream:
    stream.restore(state | {"next_batch": 2})
    assert_same(next(stream), content()[2])


def test_a_worker_passes_on_a_fault_and_starts_no_backend():
  source = batches.ContentSource("images", Broken(1))
  stream = batches.content_stream(
      [source], size=8, batch_size=2, seed=0, num_workers=1
  )
  with stream, pytest.raises(UserError, match="images/000: a.png: ") as caught:
    next(stream)
  assert caught.value.messages == (str(caught.value),)
  assert "backends started: False" in str(caught.value)
  assert f"{os.getpid()}," not in str(caught.value)


def test_a_pair_that_cannot_be_cut_is_named():
  class Uneven(Records):

    def __getitem__(self, index):
      element = super().__getitem__(index)
      return element | {"frame_2": element["frame_2"][1:]}

  source = batches.MotionSource("cats", Uneven(1), (8, 8))
  stream = batches.motion_stream([source], batch_size=1, seed=0)
  with pytest.raises(UserError, match="cats/000: .*19x20"):
    next(stream)


def test_what_no_stream_can_have_is_refused_at_once():
  sources = [
      batches.MotionSource("a", Records(0), (8, 8)),
      batches.MotionSource("a", Records(1), (8, 8), weight=0.0),
  ]
  with pytest.raises(UserError) as caught:
    batches.motion_stream(sources, batch_size=3, seed=0, host_count=4)
  assert [m.split('"a" ')[-1] for m in caught.value.messages] == [
      "is named twice",
      "is empty",
      "needs a positive weight, got 0.0",
      "batch size of the motion stream must be positive, and its double a "
      "multiple of the number of hosts, 4, got 3",
  ]
  with pytest.raises(UserError, match="at least one source"):
    batches.motion_stream([], batch_size=2, seed=0)


_KILLED = """
import multiprocessing, os, signal
from absl import flags
from mcjepa_jax.data.pipeline import batches
from mcjepa_jax.data.sets import synthetic
flags.FLAGS.mark_as_parsed()
images = synthetic.Images(size=(16, 16), seed=0, num_examples=4)
stream = batches.content_stream(
    [batches.ContentSource("images", images)],
    size=8, batch_size=2, seed=0, num_workers=1,
)
next(stream)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _runs(pid: str) -> bool:
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1]
  except (FileNotFoundError, ProcessLookupError):
    return False
  return state.split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_killed_process(tmp_path):
  # To a file: a pipe would stay open, and be waited for, until the workers end.
  with open(tmp_path / "workers", "w+") as output:
    process = subprocess.run(
        [sys.executable, "-c", _KILLED],
        cwd=ROOT,
        stdout=output,
        timeout=120,
        check=False,
    )
    output.seek(0)
    workers = output.read().split()
  assert process.returncode == -signal.SIGKILL
  assert workers
  deadline = time.monotonic() + 10
  while any(map(_runs, workers)) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not any(map(_runs, workers))
