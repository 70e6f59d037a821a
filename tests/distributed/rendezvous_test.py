"""The roll call of hosts."""

import os
import signal
import socket
import threading
import time

import pytest

from mcjepa_jax import errors
from mcjepa_jax.distributed import cluster, rendezvous
from tests.helpers import job


def _call_all(these, seconds=5.0):
  """What each place's roll call ends with."""
  results = {}

  def one(i, place):
    try:
      names, connections = rendezvous.roll_call(place, seconds)
      for connection in connections.values():
        connection.close()
      assert names == [socket.gethostname()] * place.count
      assert connections.keys() == (
          {0} if place.index else set(range(1, place.count))
      )
      results[i] = "all here"
    except (errors.Stop, errors.UserError) as error:
      results[i] = str(error)

  threads = [
      threading.Thread(target=one, args=item) for item in enumerate(these)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return [results[i] for i in range(len(these))]


def test_the_roll_ends_when_all_are_here():
  address = f"127.0.0.1:{job.free_port()}"
  these = [cluster.Process(address, 3, i) for i in (2, 0, 1)]
  assert _call_all(these) == ["all here"] * 3


def test_the_absent_are_named_to_all_that_came():
  address = f"127.0.0.1:{job.free_port()}"
  names = ("tpu-a", "tpu-b", "tpu-c")
  these = [cluster.Process(address, 3, i, names) for i in (0, 2)]
  for fault in _call_all(these, 0.5):
    assert fault.endswith("these did not come: process 1 (tpu-b)")


def test_two_with_one_number_and_another_count_are_told():
  address = f"127.0.0.1:{job.free_port()}"
  these = [cluster.Process(address, 3, i) for i in (0, 1, 1)]
  assert all("both say they are process 1" in f for f in _call_all(these))
  address = f"127.0.0.1:{job.free_port()}"
  these = [cluster.Process(address, 3, 0), cluster.Process(address, 2, 1)]
  assert all("process 0 expects 3" in f for f in _call_all(these))


def test_one_that_left_and_was_started_again_is_no_second_one():
  port = job.free_port()
  left = []

  def leave():
    deadline = time.monotonic() + 20
    while not left and time.monotonic() < deadline:
      try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
          connection.sendall(b"mcjepa 3 1 here\n")
          time.sleep(0.3)
        left.append(True)
      except OSError:
        time.sleep(0.02)

  these = [cluster.Process(f"127.0.0.1:{port}", 3, i) for i in range(3)]
  found = []
  caller = threading.Thread(
      target=lambda: found.extend(_call_all(these[:1], 20.0))
  )
  caller.start()
  leave()
  others = _call_all(these[1:], 20.0)
  caller.join()
  assert found + others == ["all here"] * 3


def test_sigterm_is_heard_while_hosts_are_awaited():
  place = cluster.Process(f"127.0.0.1:{job.free_port()}", 2, 0)
  pid = os.getpid()
  timer = threading.Timer(0.5, lambda: os.kill(pid, signal.SIGTERM))
  # As of the first process of a container.
  before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
  try:
    timer.start()
    with pytest.raises(errors.Stop) as stop:
      rendezvous.start(place, seconds=20.0)
    timer.join()
  finally:
    signal.signal(signal.SIGTERM, before)
  assert stop.value.code == errors.EXIT_PREEMPTED


def test_without_process_0_the_others_say_so():
  place = cluster.Process(f"127.0.0.1:{job.free_port()}", 2, 1)
  (fault,) = _call_all([place], 0.5)
  assert fault.startswith("process 0 at 127.0.0.1:")
  assert "did not call the roll: Connection refused" in fault


def test_a_stranger_on_the_port_is_not_counted():
  port = job.free_port()
  threads = []

  def stranger():
    for line in (b"GET / HTTP/1.1\r\n", b"\xff\xfe\n", b"mcjepa 2 x y\n"):
      for _ in range(100):
        try:
          with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(line)
          break
        except OSError:
          time.sleep(0.02)

  threads.append(threading.Thread(target=stranger))
  threads[0].start()
  address = f"127.0.0.1:{port}"
  (fault,) = _call_all([cluster.Process(address, 2, 0)], 2.0)
  threads[0].join()
  assert "these did not come: process 1" in fault


def test_another_service_on_the_coordinators_port_is_no_roll_call():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]

    def serve():
      for _ in range(2):
        connection, _ = server.accept()
        with connection:
          connection.sendall(b"\x00\x00\x18\x04\xff\xff\n")  # HTTP/2

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    place = cluster.Process(f"127.0.0.1:{port}", 2, 1)
    (fault,) = _call_all([place], 0.3)
  assert "did not call the roll: another service answers there" in fault
