"""Where the time went, and rates of a run."""

import pytest

from mcjepa_jax.runtime import goodput


def test_the_parts_sum_to_a_hundred_and_the_rest_is_restart():
  spans = {"step": 50.0, "compile": 10.0, "input": 5.0, "checkpoint": 5.0,
           "evaluate": 8.0, "pictures": 2.0, "initialise": 9.0, "lost": 7.0,
           "other": 4.0}  # fmt: skip
  found = goodput.shares(spans | {"total": sum(spans.values())})
  assert found == {
      "goodput/step": 50, "goodput/compile": 10, "goodput/input": 5,
      "goodput/checkpoint": 5, "goodput/evaluate": 10, "goodput/restart": 20,
  }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_where_it_is_known(kind, peak):
  assert goodput.peak_tflops(kind) == peak


def test_rates_are_per_second_and_per_device():
  found = goodput.rates(
      seconds=10.0, images=50, pairs=0, flops=1.97e15, device_kind="TPU v5e"
  )
  assert found == pytest.approx(
      {
          "tflops_per_device": 197.0,
          "images_per_second": 5.0,
          "percent_of_peak": 100.0,
      }
  )
