"""Where a run's time went, and how fast its steps were."""

from collections.abc import Mapping

# Dense bf16, in TFLOPS, by the beginning of what JAX calls the device. TPU:
# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p-training,v6e}. A100 (both forms):
# NVIDIA's A100 Tensor Core GPU Architecture. H100 SXM and H200:
# glennklockwood.com/garden/processors/h100. An H100 PCIe is slower.
_PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
}
# The same by names as topologies have.
DEVICES = {
    "v4": _PEAK_TFLOPS["TPU v4"],
    "v5e": _PEAK_TFLOPS["TPU v5e"],
    "v5p": _PEAK_TFLOPS["TPU v5p"],
    "v6e": _PEAK_TFLOPS["TPU v6e"],
    "a100": _PEAK_TFLOPS["NVIDIA A100"],
    "h100": _PEAK_TFLOPS["NVIDIA H100 80GB HBM3"],
    "h200": _PEAK_TFLOPS["NVIDIA H200"],
}
# The rest is `restart`: start-up, restoring, and steps that were lost by it.
_PARTS = {
    "step": ("step",),
    "compile": ("compile",),
    "input": ("input",),
    "checkpoint": ("checkpoint",),
    "evaluate": ("evaluate", "pictures"),
}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
  """Percent of the wall clock by what it was spent on, as `goodput/PART`.

  Takes a Clock's seconds; the parts sum to 100.
  """
  parts = {
      name: sum(seconds.get(span, 0.0) for span in spans)
      for name, spans in _PARTS.items()
  }
  parts["restart"] = seconds["total"] - sum(parts.values())
  return {
      f"goodput/{name}": 100 * value / seconds["total"]
      for name, value in parts.items()
  }


def peak_tflops(device_kind: str) -> float | None:
  """The dense bf16 peak of a device in TFLOPS, where it is known."""
  if device_kind == "TPU v5":  # JAX's name of a v5p
    device_kind = "TPU v5p"
  for name, peak in _PEAK_TFLOPS.items():
    if device_kind.startswith(name):
      return peak
  return None


def rates(
    *,
    seconds: float,
    images: int,
    pairs: int,
    flops: float,
    device_kind: str,
) -> dict[str, float]:
  """What a second of training did; `flops` are those of one device."""
  if seconds <= 0:
    return {}
  found = {"tflops_per_device": flops / seconds / 1e12}
  if images:
    found["images_per_second"] = images / seconds
  if pairs:
    found["pairs_per_second"] = pairs / seconds
  peak = peak_tflops(device_kind)
  if peak:
    found["percent_of_peak"] = 100 * found["tflops_per_device"] / peak
  return found
