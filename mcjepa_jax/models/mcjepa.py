"""MC-JEPA: one encoder, an expander for content, an estimator for motion.

Frames and views arrive interleaved (flow_ops), as floats in [0, 1]. The
parameters' top level is the three groups that train apart: `encoder`,
`expander`, `estimator`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mcjepa_jax.models import convnext, flow_decoder

GROUPS = ("encoder", "expander", "estimator")


class Expander(nn.Module):
  """MLP on pooled features: LayerNorm and ReLU between, last layer linear."""

  widths: Sequence[int] = (8192, 8192, 8192)
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n d"]:
    for i, width in enumerate(self.widths[:-1]):
      x = nn.Dense(width, dtype=self.dtype, name=f"fc_{i}")(x)
      x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=f"norm_{i}")(x)
      x = nn.relu(x)
    x = nn.Dense(
        self.widths[-1],
        use_bias=False,
        dtype=self.dtype,
        name=f"fc_{len(self.widths) - 1}",
    )(x)
    return x.astype(jnp.float32)


class MCJEPA(nn.Module):
  """The three modules and the two ways through them."""

  encoder: convnext.ConvNeXt
  expander: Expander
  estimator: flow_decoder.FlowDecoder

  def motion(
      self, frames: Float[Array, "n h w 3"]
  ) -> tuple[
      dict[int, Float[Array, "n _ _ _"]], dict[int, Float[Array, "n _ _ 2"]]
  ]:
    """Normalised features and directed flows, each by stride.

    No drop path: different masks on two frames would leave an error that no
    flow can remove.
    """
    features, flows = self.estimator(self.encoder(frames))
    return dict(zip(self.encoder.strides, features, strict=True)), flows

  def pooled(
      self,
      images: Float[Array, "n h w 3"],
      *,
      deterministic: bool = True,
      batch_rows: convnext.BatchRows | None = None,
  ) -> Float[Array, "n c"]:
    """The encoder's feature vector of each image, before the expander."""
    return self.encoder.pool(
        self.encoder(images, deterministic=deterministic, batch_rows=batch_rows)
    )

  def expand(self, pooled: Float[Array, "n c"]) -> Float[Array, "n d"]:
    """The expansion of pooled features."""
    return self.expander(pooled)

  def content(
      self, views: Float[Array, "n h w 3"], *, deterministic: bool = True
  ) -> tuple[Float[Array, "n c"], Float[Array, "n d"]]:
    """Pooled features and their expansion, for interleaved views."""
    pooled = self.pooled(views, deterministic=deterministic)
    return pooled, self.expand(pooled)

  def __call__(
      self, frames: Float[Array, "n h w 3"], views: Float[Array, "m k k 3"]
  ) -> Any:
    """Both ways, so that `init` creates every parameter."""
    return self.motion(frames), self.content(views)


def init_params(model: MCJEPA, seed: int) -> Any:
  """New parameters, float32; they depend on the seed alone."""
  # Two cells of the coarsest level: no parameter's shape depends on the input.
  side = 2 * model.encoder.strides[-1]
  blank = jnp.zeros((2, side, side, 3))
  key = jax.random.fold_in(jax.random.key(seed), 0)
  return model.init(key, blank, blank)["params"]


def build(
    *,
    encoder: Mapping[str, Any],
    expander: Mapping[str, Any],
    estimator: Mapping[str, Any],
    dtype: str = "float32",
    remat: str = "none",
) -> MCJEPA:
  """The model that a config's `model` part describes.

  `remat` changes memory and time of a step, and no result but its rounding.
  """
  dtype = jnp.dtype(dtype)
  # What a checkpoint says of its model comes as JSON, which has no tuples.
  encoder, expander, estimator = (
      {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
      for part in (encoder, expander, estimator)
  )
  encoder["layer_scale"] = encoder.get("layer_scale") or None
  backbone = convnext.ConvNeXt(**encoder, dtype=dtype, remat=remat)
  return MCJEPA(
      encoder=backbone,
      expander=Expander(**expander, dtype=dtype),
      estimator=flow_decoder.FlowDecoder(
          strides=backbone.strides, **estimator, dtype=dtype
      ),
  )
