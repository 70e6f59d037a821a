"""RankMe, the effective rank of frozen features: `rankme/SET`."""

import cv2
from jaxtyping import Float
import numpy as np

from mcjepa_jax.evals import frozen_features
from mcjepa_jax.ops import representation

_RANKED = 25_600  # images, as in arXiv 2210.02885
_RANKED_SIDE = 16  # of the pixels' twin: a rank of up to 768


def run(name: str, part: frozen_features.FeatureSet) -> dict[str, float]:
  """RankMe of each feature, keyed `rankme/NAME/METRIC`.

  Of up to 25,600 images, spread over the part; the pixels' is of pictures of
  16 x 16. A rank compares runs of one method, with as many features.
  """
  count = len(part.labels)
  rows = np.linspace(0, count - 1, min(count, _RANKED)).round().astype(int)
  result = {}
  for suffix in frozen_features.TWINS:
    if suffix in part.features:
      z = part.features[suffix][rows]
      z = _small(z) if suffix == "pixels" else z
      result[f"rankme/{name}/{frozen_features.metric('rank', suffix)}"] = (
          representation.rank_me(z)
      )
  result[f"rankme/{name}/count"] = len(rows)
  return result


def _small(pixels: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n _"]:
  side = round((pixels.shape[1] / 3) ** 0.5)
  if side <= _RANKED_SIDE:
    return pixels
  images = pixels.reshape(-1, side, side, 3)
  size = (_RANKED_SIDE, _RANKED_SIDE)
  small = [cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in images]
  return np.stack(small).reshape(len(pixels), -1)
