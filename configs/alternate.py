"""Content and motion in turn, step by step, on the quickstart's procedural data.

python -m mcjepa_jax.main --config=configs/alternate.py --workdir=WORKDIR
"""

from configs import default, quickstart


def get_config() -> default.ConfigDict:
  """The quickstart with one task a step: even ones content, odd ones motion."""
  config = quickstart.get_config()
  config.name = "alternate"
  config.mode = "alternate"
  config.evals = ("flow/synthetic", "knn/synthetic")
  return config
