"""The paper's recipe at its full size: ConvNeXt-T, 384 images and 8 pairs.

  python -m mcjepa_jax.main --config=configs/mcjepa_convnext_tiny.py \
    --workdir=WORKDIR --config.data_root=DATA
"""

from configs import default


def get_config() -> default.ConfigDict:
  """The defaults are the recipe; this names the data."""
  config = default.get_config()
  config.name = "mcjepa_convnext_tiny"
  config.motion.sources = (
      ("sintel_clean", 1.0),
      ("sintel_final", 1.0),
      ("flying_chairs", 1.0),
  )
  config.evals = (
      "flow/sintel_clean",
      "flow/sintel_final",
      "flow/flying_chairs",
  )
  return config


def for_devices(count: int) -> default.ConfigDict:
  """The same with a pair for every two devices, which is ours, not the paper's."""
  config = get_config()
  config.name = f"mcjepa_convnext_tiny_{count}"
  config.motion.batch_size = count // 2
  return config
