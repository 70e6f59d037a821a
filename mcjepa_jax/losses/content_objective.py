"""The terms of the content task, unweighted and named `content/KIND`.

A term whose weight is statically 0 is not computed: times 0, a NaN would remain
a NaN.
"""

from collections.abc import Mapping

from jaxtyping import Array, Float

from mcjepa_jax.losses import vicreg

CONTENT_KINDS = ("invariance", "variance", "covariance")


def content_terms(
    z: Float[Array, "n d"], *, weights: Mapping[str, float]
) -> dict[str, Float[Array, ""]]:
  """Each unweighted VICReg term with a weight, of interleaved embeddings.

  The two views' variance hinges are averaged, their covariance terms summed,
  as in the VICReg code.
  """
  # A reshape keeps a pair's rows where they are; z[::2] would gather them.
  pairs = z.reshape(-1, 2, z.shape[-1])
  z_1, z_2 = pairs[:, 0], pairs[:, 1]
  terms = {}
  if weights["invariance"]:
    terms["invariance"] = vicreg.invariance_loss(z_1, z_2)
  if weights["variance"]:
    terms["variance"] = (
        vicreg.variance_loss(z_1) + vicreg.variance_loss(z_2)
    ) / 2
  if weights["covariance"]:
    terms["covariance"] = vicreg.covariance_loss(z_1) + vicreg.covariance_loss(
        z_2
    )
  return {f"content/{kind}": term for kind, term in terms.items()}
