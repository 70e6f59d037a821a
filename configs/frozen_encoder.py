"""Flow on a frozen encoder, on the quickstart's procedural data.

  python -m mcjepa_jax.main --config=configs/frozen_encoder.py --workdir=WORKDIR \
    --config.init_checkpoint=CHECKPOINT
"""

from configs import default, quickstart


def get_config() -> default.ConfigDict:
  """The quickstart with only the estimator moving."""
  config = quickstart.get_config()
  config.name = "frozen_encoder"
  config.mode = "frozen_encoder"
  config.evals = ("flow/synthetic", "knn/synthetic")
  return config
