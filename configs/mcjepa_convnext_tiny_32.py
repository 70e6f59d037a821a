"""The full size on 32 devices: 16 pairs a step, which is ours, not the paper's.

Motion is split by frame, and the paper's 8 pairs are 16 frames. Its 384 images
are kept. Two slices of 4x4 chips of v6e or v5e, 4x4x2 of v5p:

  python -m mcjepa_jax.main --config=configs/mcjepa_convnext_tiny_32.py \
    --workdir=WORKDIR --config.data_root=DATA
"""

from configs import default, mcjepa_convnext_tiny


def get_config() -> default.ConfigDict:
  """The paper's recipe with a pair for every two of 32 devices."""
  return mcjepa_convnext_tiny.for_devices(32)
