"""Motion alone: M-JEPA, on the quickstart's procedural data.

python -m mcjepa_jax.main --config=configs/motion.py --workdir=WORKDIR
"""

from configs import default, quickstart


def get_config() -> default.ConfigDict:
  """The quickstart without content."""
  config = quickstart.get_config()
  config.name = "motion"
  config.mode = "motion"
  config.evals = ("flow/synthetic", "knn/synthetic")
  return config
