"""VICReg's three terms (arXiv 2105.04906), in float32 whatever comes in.

Statistics run over every sample of the array. Under jit a batch-sharded array
is one global array, so they are statistics of the global batch: no axis names.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mcjepa_jax import errors


def invariance_loss(
    z_1: Float[Array, "n d"], z_2: Float[Array, "n d"]
) -> Float[Array, ""]:
  """Mean squared difference of two views, over samples and dimensions."""
  return jnp.mean(jnp.square(_float32(z_1) - _float32(z_2)))


def variance_loss(
    z: Float[Array, "n d"], *, gamma: float = 1.0, eps: float = 1e-4
) -> Float[Array, ""]:
  """Hinge that keeps the std of each dimension above `gamma`; eq. 1-2.

  (1/d) sum_j max(0, gamma - sqrt(Var(z_j) + eps)), with the n - 1 variance.
  """
  _check_samples(z)
  return std_hinge(jnp.var(_float32(z), axis=0, ddof=1), gamma=gamma, eps=eps)


def std_hinge(
    variance: Float[Array, " d"], *, gamma: float = 1.0, eps: float = 1e-4
) -> Float[Array, ""]:
  """`variance_loss` of the dimensions' variances."""
  std = jnp.sqrt(variance + eps)
  return jnp.mean(jax.nn.relu(gamma - std))


def covariance_loss(
    z: Float[Array, "n d"], *, form: Literal["gram", "direct"] | None = None
) -> Float[Array, ""]:
  """Sum of the squared covariances of distinct dimensions, over d; eq. 3-4.

  (1/d) sum_{i != j} C_ij^2 with C = Zc^T Zc / (n - 1) and Zc = Z - mean. For
  n < d it comes from the n x n matrix G = Zc Zc^T instead:
    sum_{i != j} (n - 1)^2 C_ij^2 = |G|_F^2 - sum_j (sum_n Zc_nj^2)^2,
  which holds for centred Z. By default the form with less arithmetic.
  """
  _check_samples(z)
  n, d = z.shape
  z = _float32(z)
  # Scaled before the product: the fourth powers below then stay of order one
  # for any n, where sums over a million positions would strain float32.
  z = (z - jnp.mean(z, axis=0)) / jnp.sqrt(n - 1.0)
  if form is None:
    form = "gram" if n < d else "direct"
  if form == "gram":
    gram = jnp.einsum("nd,md->nm", z, z, precision=jax.lax.Precision.HIGHEST)
    diagonal = jnp.sum(jnp.square(z), axis=0)
    total = jnp.sum(jnp.square(gram)) - jnp.sum(jnp.square(diagonal))
  else:
    cov = jnp.einsum("ni,nj->ij", z, z, precision=jax.lax.Precision.HIGHEST)
    return off_diagonal(cov)
  return total / d


def off_diagonal(cov: Float[Array, "d d"]) -> Float[Array, ""]:
  """`covariance_loss` of the covariance matrix."""
  d = cov.shape[0]
  return jnp.sum(jnp.square(cov), where=~jnp.eye(d, dtype=bool)) / d


def _float32(z: Float[Array, "n d"]) -> Float[Array, "n d"]:
  return z.astype(jnp.float32)


def _check_samples(z: Float[Array, "n d"]) -> None:
  if z.shape[0] < 2:
    raise errors.UserError(
        "VICReg's variance and covariance need a global batch of at least 2"
        f" samples, got {z.shape[0]}"
    )
