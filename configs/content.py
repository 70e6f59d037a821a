"""Content alone: VICReg, on the quickstart's procedural data.

python -m mcjepa_jax.main --config=configs/content.py --workdir=WORKDIR
"""

from configs import default, quickstart


def get_config() -> default.ConfigDict:
  """The quickstart without motion."""
  config = quickstart.get_config()
  config.name = "content"
  config.mode = "content"
  config.evals = ("knn/synthetic",)
  return config
