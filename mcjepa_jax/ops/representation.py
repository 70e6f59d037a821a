"""Measures of embeddings and features: spread, rank, correlation."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


def feature_std(x: Float[Array, "*n d"]) -> Float[Array, ""]:
  """Mean over channels of the std over all else; 0 is a collapse.

  Behind a channel LayerNorm a map of independent features has about 1.
  """
  axes = tuple(range(x.ndim - 1))
  return jnp.mean(jnp.std(x.astype(jnp.float32), axis=axes))


def rank_me(z: Float[np.ndarray, "n d"], *, eps: float = 1e-7) -> float:
  """Effective rank of embeddings, 1 to min(n, d); arXiv 2210.02885, eq. 1-2.

  exp(-sum_k p_k log p_k), p_k = sigma_k / sum sigma + eps, of the singular
  values of the matrix as it is, not centred. NaN where one is not finite.
  """
  if not np.isfinite(z).all():  # these have no singular values
    return math.nan
  sigma = np.linalg.svd(z.astype(np.float64), compute_uv=False)
  p = sigma / max(sigma.sum(), np.finfo(np.float64).tiny) + eps
  return float(np.exp(-np.sum(p * np.log(p))))


def correlation(z: Float[Array, "n d"]) -> Float[Array, ""]:
  """Mean |correlation| of two dimensions of embeddings; 1 is a collapse.

  A dimension that does not vary correlates with none.
  """
  centred = z - jnp.mean(z, axis=0)
  unit = centred / (jnp.linalg.norm(centred, axis=0) + 1e-12)
  matrix = jnp.abs(unit.T @ unit)
  d = z.shape[1]
  return (jnp.sum(matrix) - jnp.trace(matrix)) / max(d * (d - 1), 1)
