"""The search for the largest batch, on a compiler whose memory is a line."""

import pytest

from configs import mcjepa_convnext_tiny
from mcjepa_jax import errors
from mcjepa_jax.training import batch_search

_STATE = 0.6  # GiB, and its gradient a third of that
_GIB = {"none": 0.05, "block": 0.02}  # an image's share of the rest


def _compiler(limit=15.75, more=0.0):
  """Reports as preflight's; `more` GiB are held by what nobody foretold."""
  asked = []

  def compiled(config, told):
    images = config.content.batch_size
    asked.append((config.remat, images, config.motion.batch_size))
    gib = 0.8 + _GIB[config.remat] * images
    if len(asked) == 3:
      gib += more
    return {
        "state_gib": _STATE,
        "gib_per_device": gib,
        "gib_limit": limit,
        "fits": gib <= limit,
        "flops_per_step": images * (4.0 if config.remat == "block" else 3.0),
    }

  return compiled, asked


@pytest.mark.parametrize(
    ("devices", "batch"), [(16, (384, 8)), (4, (96, 2)), (1, (48, 1))]
)
def test_the_smallest_batch_keeps_the_proportion_and_divides(devices, batch):
  config = mcjepa_convnext_tiny.get_config()
  assert batch_search.smallest(config, devices) == batch


def test_a_batch_that_no_part_of_divides_is_refused():
  config = mcjepa_convnext_tiny.get_config()
  with pytest.raises(errors.UserError, match="32 devices"):
    batch_search.smallest(config, 32)


def test_the_larger_batch_is_confirmed_with_what_it_wants():
  config = mcjepa_convnext_tiny.get_config()
  config.content.batch_size, config.motion.batch_size = 96, 2
  compiled, asked = _compiler()
  found = batch_search.search(config, 4, compiled)
  # 0.8 and 96 * 0.05 each time: (0.95 * 15.75 - 0.8) / 4.8 = 2.95.
  assert found["foretold"]["none"]["times"] == 2
  assert found["foretold"]["none"]["gib_per_device"] == pytest.approx(10.4)
  # And 96 * 0.02: 7.38.
  assert found["foretold"]["block"]["flops"] == pytest.approx(4 / 3)
  assert found["remat"] == "block" and found["confirmed"]["fits"]
  assert found["foretold"]["block"]["images"] == asked[-1][1] == 672
  assert asked == [("none", 96, 2), ("block", 96, 2), ("block", 672, 14)]
  assert config.remat == "none" and config.content.batch_size == 96
  # On a line the third compile says nothing new.
  row = found["foretold"]["block"]
  assert found["corrected"] == pytest.approx(
      {key: row[key] for key in found["corrected"]}
  )


@pytest.mark.parametrize(("more", "times"), [(-3.0, 9), (0.5, 7), (3.0, 6)])
def test_what_the_third_compile_shows_corrects_what_was_foretold(more, times):
  config = mcjepa_convnext_tiny.get_config()
  config.content.batch_size, config.motion.batch_size = 96, 2
  compiled, _ = _compiler(more=more)
  found = batch_search.search(config, 4, compiled)
  assert found["foretold"]["block"]["times"] == 7
  corrected = found["corrected"]
  # 2.72 once and 14.24 + more seven times; what fits, fits.
  each = (14.24 + more - 2.72) / 6
  assert corrected["gib_per_device"] == pytest.approx(2.72 + (times - 1) * each)
  assert corrected["times"] == times and corrected["images"] == 96 * times
  assert found["confirmed"]["fits"] == (more < 1.5)


def test_of_equal_batches_the_one_without_rematerialisation(monkeypatch):
  monkeypatch.setitem(_GIB, "block", 0.0499)
  config = mcjepa_convnext_tiny.get_config()
  compiled, asked = _compiler()
  found = batch_search.search(config, 4, compiled)
  assert found["remat"] == "none"
  assert asked[-1] == ("none", 192, 4)


def test_a_batch_that_fits_once_is_not_compiled_again(monkeypatch):
  config = mcjepa_convnext_tiny.get_config()
  monkeypatch.setitem(_GIB, "block", 0.04)
  compiled, asked = _compiler(limit=25.0)
  found = batch_search.search(config, 16, compiled)
  assert found["remat"] == "none" and found["foretold"]["none"]["times"] == 1
  assert asked == [("none", 384, 8), ("block", 384, 8)]
  assert found["confirmed"]["gib_per_device"] == pytest.approx(20.0)


def test_what_fits_within_the_margin_fits_once(monkeypatch):
  config = mcjepa_convnext_tiny.get_config()
  monkeypatch.setitem(_GIB, "block", 0.04)
  compiled, asked = _compiler(limit=20.5)  # of which 20.0 are more than 95 %
  found = batch_search.search(config, 16, compiled)
  assert found["remat"] == "none" and found["confirmed"]["fits"]
  assert len(asked) == 2


def test_what_was_foretold_wrongly_is_seen_in_the_report():
  compiled, _ = _compiler(more=9.0)
  config = mcjepa_convnext_tiny.get_config()
  assert not batch_search.search(config, 4, compiled)["confirmed"]["fits"]


def test_nothing_that_fits_is_an_end_with_the_memory_it_takes():
  compiled, asked = _compiler(limit=2.0)
  config = mcjepa_convnext_tiny.get_config()
  with pytest.raises(errors.Stop, match="96 images and 2 pairs.* 2.72 GiB"):
    batch_search.search(config, 4, compiled)
  assert len(asked) == 2
