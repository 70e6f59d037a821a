import os

import numpy as np
import pytest

from mcjepa_jax.data.pipeline import shared_memory


@pytest.fixture
def lending(monkeypatch):
  """This process as its own worker and parent."""
  monkeypatch.setattr(shared_memory, "_lender", None)
  monkeypatch.setattr(shared_memory, "parent_process", lambda: _This)
  shared_memory.start_lending()
  borrower = shared_memory.Borrower()
  yield borrower
  borrower.close()


class _This:
  pid = os.getpid()


def _filled(shape, value):
  array = shared_memory.empty(shape)
  array[...] = value
  return shared_memory.lend(array)


def test_an_array_is_taken_as_it_was_lent(lending):
  lent = _filled((2, 3, 5), 7)
  array = lending.take(lent)
  assert array.shape == (2, 3, 5) and array.dtype == np.uint8
  assert (array == 7).all()
  again = lending.take(_filled((2, 3, 5), 9))  # in the same memory
  assert (array == 7).all() and (again == 9).all()


def test_memory_is_used_again_once_it_was_taken_and_not_before(lending):
  first, second = _filled((4, 4), 1), _filled((4, 4), 2)
  assert first.file != second.file
  assert (lending.take(first) == 1).all()
  # A smaller array has room in it; a larger one has not.
  third, fourth = _filled((2, 4), 3), _filled((5, 4), 4)
  assert third.file == first.file
  assert fourth.file not in (first.file, second.file)
  for lent, value in ((fourth, 4), (second, 2), (third, 3)):
    assert (lending.take(lent) == value).all()


def test_an_array_of_other_memory_is_sent_itself(lending):
  array = np.ones((2, 2), np.uint8)
  assert shared_memory.lend(array) is array
  assert lending.take(array) is not array


def test_a_worker_that_is_gone_is_an_error(lending):
  lent = shared_memory.Lent(process=2**22 + 1, file=3, capacity=4, shape=(4,))
  with pytest.raises(shared_memory.Gone):
    lending.take(lent)


@pytest.mark.parametrize("lack", ["memfd", "proc"])
def test_where_nothing_can_be_lent_arrays_are_ordinary(monkeypatch, lack):
  monkeypatch.setattr(shared_memory, "_lender", None)
  monkeypatch.setattr(shared_memory, "parent_process", lambda: _This)
  if lack == "memfd":
    monkeypatch.delattr(os, "memfd_create")
  else:

    def refuse(path):
      raise PermissionError(path)

    monkeypatch.setattr(os, "listdir", refuse)
  shared_memory.start_lending()
  array = shared_memory.empty((3, 2))
  assert array.shape == (3, 2) and shared_memory.lend(array) is array
