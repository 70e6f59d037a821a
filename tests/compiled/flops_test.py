"""Operations counted from shapes: by hand, and beside XLA's where it has no loop."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from mcjepa_jax.compiled import flops
from mcjepa_jax.distributed import sharding


def _count(function, *shapes, dtype=jnp.float32):
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  return flops.count(jax.jit(function).trace(*arrays).jaxpr)


def _xla(function, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).lower(*arrays).cost_analysis()["flops"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_sum_are_two(dtype):
  count = _count(lambda a, b: a @ b, (3, 5, 7), (3, 7, 11), dtype=dtype)
  assert count == 2 * 3 * 5 * 7 * 11


def test_integers_count_nothing():
  assert _count(lambda a: a * a + a, (9,), dtype=jnp.int32) == 0


def test_elementwise_counts_results_and_a_sum_its_operands():
  assert _count(lambda a: jnp.exp(a[:, :2] - 1), (3, 5)) == 2 * 6
  assert _count(jnp.sum, (3, 5)) == 15


def _conv(x, kernel, **options):
  options = {"window_strides": (1, 1), "padding": "SAME"} | options
  return lax.conv_general_dilated(
      x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
  )


@pytest.mark.parametrize(
    ("x", "kernel", "options"),
    [
        ((2, 9, 8, 3), (3, 3, 3, 5), {}),
        ((2, 9, 8, 3), (4, 4, 3, 5), {"window_strides": (2, 2)}),
        ((2, 9, 8, 3), (3, 3, 3, 5), {"rhs_dilation": (2, 4)}),
        ((2, 9, 8, 6), (7, 7, 1, 6), {"feature_group_count": 6}),
        (
            (2, 9, 8, 3),
            (2, 2, 3, 5),
            {"lhs_dilation": (2, 3), "padding": ((1, 1), (0, 2))},
        ),
    ],
)
def test_convolutions_and_their_gradients_count_as_xla_counts_them(
    x, kernel, options
):
  conv = functools.partial(_conv, **options)
  assert _count(conv, x, kernel) == _xla(conv, x, kernel)

  def gradients(x, kernel):
    y, vjp = jax.vjp(conv, x, kernel)
    return vjp(y)

  assert _count(gradients, x, kernel) == _xla(gradients, x, kernel)


def test_a_scan_counts_as_often_as_it_runs_and_its_gradient_too():
  def looped(x, *weights):
    def layer(x, w):
      return jnp.sin(x @ w), None

    return jnp.sum(lax.scan(layer, x, jnp.stack(weights))[0])

  def unrolled(x, *weights):
    for w in weights:
      x = jnp.sin(x @ w)
    return jnp.sum(x)

  shapes = (3, 5), *[(5, 5)] * 6
  assert _count(looped, *shapes) == _count(unrolled, *shapes)
  both = (jax.grad(f, argnums=range(7)) for f in (looped, unrolled))
  looped, unrolled = (_count(gradient, *shapes) for gradient in both)
  assert looped == unrolled >= 3 * 6 * 2 * 3 * 5 * 5


def test_of_branches_the_larger_counts():
  def either(a):
    return lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a)

  assert _count(either, (5, 5)) == 2 * 5**3


def test_what_is_computed_again_counts_again():
  def loss(function, w, x):
    return jnp.sum(function(w, x) ** 2)

  def layer(w, x):
    return jnp.tanh(jnp.tanh(x @ w) @ w)

  def count(function):
    gradient = jax.grad(functools.partial(loss, function))
    return _count(gradient, (64, 64), (8, 64))

  product = 2 * 8 * 64 * 64
  again = count(jax.checkpoint(layer)) - count(layer)
  assert again == pytest.approx(2 * product, rel=0.05)


def test_windows_and_scattered_sums():
  def windows(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3), (1, 1, 1), "VALID")

  assert _count(windows, (2, 6, 6)) == 2 * 4 * 4 * 9
  assert _count(lambda x, y: x.at[jnp.arange(3)].add(y), (9, 4), (3, 4)) == 12


def test_a_body_of_one_device_counts_for_all():
  mesh = sharding.make_mesh(4)
  split = jax.P(mesh.axis_names)
  product = jax.shard_map(
      lambda a: a @ a.T, mesh=mesh, in_specs=split, out_specs=split
  )
  assert _count(product, (8, 5)) == 4 * 2 * 2 * 5 * 2
