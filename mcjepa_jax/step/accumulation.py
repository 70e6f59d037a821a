"""A batch in micro-batches whose statistics are those of the whole batch.

With S the statistics, sums and rows of what each micro-batch gives, a loss is
f(S) + mean_i g_i. The first pass computes S; the second gives, per micro-batch,
the gradient of g_i and of <df/dS, S_i>: together that of the loss itself. What
is alive at a time is one micro-batch's activations, S and its gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mcjepa_jax import errors
from mcjepa_jax.losses import flow_losses


def unroll(count: int) -> int:
  """How many micro-batches a loop's body holds.

  All on CPU: there the compiler of jax 0.10.2 fuses the gradient of the warps
  wrongly in a loop (3 % of the estimator's; 0.12 is right).
  """
  return count if jax.default_backend() == "cpu" else 1


def micro_batches(x: Array, count: int) -> Array:
  """[k, n/k, ...]: micro-batch i takes every k-th pair, from every device."""
  pairs = x.reshape(x.shape[0] // (2 * count), count, 2, *x.shape[1:])
  pairs = jnp.moveaxis(pairs, 1, 0)
  return pairs.reshape(count, x.shape[0] // count, *x.shape[1:])


def whole(x: Array) -> Array:
  """The batch whose `micro_batches` these are."""
  count, rows, *rest = x.shape
  pairs = x.reshape(count, rows // 2, 2, *rest)
  return jnp.moveaxis(pairs, 0, 1).reshape(count * rows, *rest)


def moments(
    x: Float[Array, "n h w d"],
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
  """Mean over all positions, and the covariance over n about it."""
  x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  mean = jnp.mean(x, axis=0)
  # Scaled before the product, as in vicreg.covariance_loss.
  x = (x - mean) / jnp.sqrt(1.0 * len(x))
  return mean, jnp.einsum(
      "ni,nj->ij", x, x, precision=jax.lax.Precision.HIGHEST
  )


def covariance(
    means: Float[Array, "k d"], within: Float[Array, "d d"], samples: int
) -> Float[Array, "d d"]:
  """The n - 1 covariance of `samples`: k equal parts' means, covariances' sum.

  Of within the parts and between them: no difference of large squares.
  """
  offsets = means - jnp.mean(means, axis=0)
  between = jnp.einsum(
      "ki,kj->ij", offsets, offsets, precision=jax.lax.Precision.HIGHEST
  )
  return (within + between) / len(means) * (samples / (samples - 1))


class _Counter:
  """A `flow_losses.Mean` that notes how many pixels each call counts."""

  def __init__(self):
    self.counts = []

  def __call__(self, values, mask):
    sums, counts = flow_losses.masked_sums(values, mask)
    self.counts.append(counts)
    return jnp.mean(sums / jnp.maximum(counts, 1))


class _Share:
  """A `flow_losses.Mean` over the pixels that all micro-batches count.

  The mean of the micro-batches' values is `masked_mean` of the whole batch.
  """

  def __init__(self, totals: list[Float[Array, "2"]], count: int):
    self._totals, self._count = iter(totals), count

  def __call__(self, values, mask):
    sums, _ = flow_losses.masked_sums(values, mask)
    return self._count * jnp.mean(sums / jnp.maximum(next(self._totals), 1))


def _refuse_batch_norm(call, args, kwargs, context):
  module = context.module
  if isinstance(module, nn.BatchNorm) or "BatchNorm" in type(module).__name__:
    raise errors.UserError(
        "accumulation: 'exact' expected a model without batch normalisation,"
        f" got {'/'.join(module.path)}; its statistics would be of each"
        " micro-batch: use accumulate=1, or 'plain'"
    )
  return call(*args, **kwargs)


def value_and_grad(
    forward: Callable[..., Any],
    finish: Callable[..., Any],
    params: Any,
    batch: Mapping[str, Array],
    count: int,
) -> tuple[dict[str, Array], Any]:
  """The logs and the gradient of a batch in `count` micro-batches.

  Args:
    forward: (params, micro-batch, its indices in the batch, mean over masks) ->
      ((loss, logs), rows, sums): what of loss and logs is a mean over the
      micro-batches, and the statistics that are to be stacked and added up.
    finish: (params, rows, sums) -> (loss, logs), the rest of both.
    params: what the gradient is for.
    batch: arrays of interleaved pairs.
    count: of micro-batches.

  Raises:
    UserError: the model normalises over its batch.
  """
  micro = {k: micro_batches(v, count) for k, v in batch.items()}
  indices = {
      k: micro_batches(jnp.arange(len(v)), count) for k, v in batch.items()
  }
  unrolled = unroll(count)

  def gather(one):
    counter = _Counter()
    _, rows, sums = forward(params, *one, counter)
    return (sums, counter.counts), rows

  def share(params, one, rows_bar):
    mean = _Share(counts, count)
    (loss, logs), rows, own = forward(params, *one, mean)
    loss = loss / count + _inner(rows, rows_bar) + _inner(own, sums_bar)
    return loss, jax.tree.map(lambda x: x / count, logs)

  def add_share(total, x):
    # One micro-batch after the other, where the loop is unrolled.
    total, (one, rows_bar) = jax.lax.optimization_barrier((total, x))
    (_, logs), grads = jax.value_and_grad(share, has_aux=True)(
        params, one, rows_bar
    )
    return _add(total, (logs, grads)), None

  def add_gathered(total, one):
    total, one = jax.lax.optimization_barrier((total, one))
    new, rows = gather(one)
    return _add(total, new), rows

  with nn.intercept_methods(_refuse_batch_norm):
    first = jax.tree.map(lambda x: x[0], (micro, indices))
    shapes, _ = jax.eval_shape(gather, first)
    (sums, counts), rows = jax.lax.scan(
        add_gathered, _zeros(shapes), (micro, indices), unroll=unrolled
    )
    (_, finished), (grads, rows_bar, sums_bar) = jax.value_and_grad(
        finish, argnums=(0, 1, 2), has_aux=True
    )(params, rows, sums)
    rest = jax.tree.map(lambda x: x[0], rows_bar)
    _, logs = jax.eval_shape(share, params, first, rest)
    (logs, grads), _ = jax.lax.scan(
        add_share,
        (_zeros(logs), grads),
        ((micro, indices), rows_bar),
        unroll=unrolled,
    )
  return {
      k: logs.get(k, 0.0) + finished.get(k, 0.0) for k in logs | finished
  }, grads


def _inner(a: Any, b: Any) -> Array:
  products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
  return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
