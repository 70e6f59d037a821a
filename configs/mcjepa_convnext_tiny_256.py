"""The full size on 256 devices: 128 pairs a step, which is ours, not the paper's.

Motion is split by frame, and the paper's 8 pairs are 16 frames. Its 384 images
are kept. On 16x16 chips of v5e or v6e, 4x8x8 of v5p:

  python -m mcjepa_jax.main --config=configs/mcjepa_convnext_tiny_256.py \
    --workdir=WORKDIR --config.data_root=DATA
"""

from configs import default, mcjepa_convnext_tiny


def get_config() -> default.ConfigDict:
  """The paper's recipe with a pair for every two of 256 devices."""
  return mcjepa_convnext_tiny.for_devices(256)
