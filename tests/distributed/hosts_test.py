"""What hosts agree on, without processes of their own."""

import json
import time
import types

import jax
import pytest

from mcjepa_jax import errors
from mcjepa_jax.distributed import hosts


class _Store:
  """JAX's key-value store, of two hosts, of which this is the first."""

  def __init__(self, theirs):
    self._values = {}
    self._theirs = theirs  # what the other says, by the exchange's name

  def key_value_set(self, key, value):
    self._values[key] = value

  def blocking_key_value_get(self, key, milliseconds):
    _, name, index = key.split("/")
    if index == "0":
      return self._values[key]
    if name not in self._theirs:
      time.sleep(milliseconds / 1000)
      raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
    return json.dumps(self._theirs[name])


@pytest.fixture
def two(monkeypatch):
  """Of two hosts the first; sets what the other says."""

  def set_up(**theirs):
    client = _Store(theirs)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(hosts.distributed.global_state, "client", client)
    held = types.SimpleNamespace(names=["process 0 (a)", "process 1 (b)"])
    monkeypatch.setattr(hosts.heartbeat, "_heartbeat", held)

  return set_up


def test_a_host_that_does_not_come_to_an_exchange_is_named(two):
  two(here=[1, 2])
  assert hosts.exchange("here", "x", seconds=5.0) == ["x", [1, 2]]
  began = time.monotonic()
  with pytest.raises(errors.Stop) as caught:
    hosts.exchange("start", 1, seconds=0.3)
  assert caught.value.code == 77
  assert 0.2 < time.monotonic() - began < 2
  assert str(caught.value) == (
      "start: waited 0 s for all hosts; these did not come: process 1 (b)"
  )


def test_hosts_of_another_code_or_other_data_are_shown(two):
  def start(**changes):
    facts = {"data.ids": "ab"} | {
        f"code.{k}": v for k, v in hosts.code().items()
    }
    return {"name": "process 1 (b)", "faults": [], "facts": facts | changes}

  two(start=start())
  hosts.agree({"data": {"ids": "ab"}}, [])
  changed = {"code.mcjepa_jax": "0123456789ab", "code.jax": "0.1"}
  two(start=start(**changed, **{"data.ids": "cd"}))
  with pytest.raises(errors.UserError) as caught:
    hosts.agree({"data": {"ids": "ab"}}, [])
  ours = hosts.code()
  assert list(caught.value.messages) == [
      f"{key}: process 0 (a) has {own!r}, process 1 (b) {theirs!r}"
      for key, own, theirs in (
          ("code.jax", ours["jax"], "0.1"),
          ("code.mcjepa_jax", ours["mcjepa_jax"], "0123456789ab"),
          ("data.ids", "ab", "cd"),
      )
  ]


def test_what_hosts_share_and_see_otherwise_ends_them_to_be_started_again(two):
  two(newest=100)
  hosts.check_alike("newest", 100)
  with pytest.raises(errors.Stop) as caught:
    hosts.check_alike("newest", 200)
  assert caught.value.code == 77
  assert str(caught.value) == (
      "newest: expected one for all hosts, got process 0 (a) 200, process 1 (b)"
      " 100"
  )


def test_a_fault_of_ones_disk_is_passing_where_others_wait(two):
  def refused():
    with hosts.as_one():
      raise errors.UserError("a checkpoint cannot be written")

  with pytest.raises(errors.UserError) as alone:
    refused()
  two()
  with pytest.raises(
      errors.TransientError, match="a checkpoint cannot be written"
  ):
    refused()
  assert not isinstance(alone.value, errors.TransientError)


def test_one_process_agrees_with_itself_or_tells_its_faults():
  hosts.agree({"config": {"a": 1}}, [])
  with pytest.raises(errors.UserError, match="no such"):
    hosts.agree({}, ["no such"])


def test_code_is_told_apart_by_its_files(monkeypatch, tmp_path):
  file = str(tmp_path / "distributed" / "hosts.py")
  monkeypatch.setattr(hosts, "__file__", file)
  (tmp_path / "errors.py").write_text("a = 1\n")
  before = hosts.code()
  assert before == hosts.code()
  (tmp_path / "errors.py").write_text("a = 2\n")
  after = hosts.code()
  assert before.pop("mcjepa_jax") != after.pop("mcjepa_jax")
  assert before == after and "jax" in after
