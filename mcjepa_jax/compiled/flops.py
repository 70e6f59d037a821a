"""Floating-point operations of a traced function, from its shapes.

XLA's own count has a loop's body once, however often it runs, and stands only
when a program has been compiled.
"""

from collections.abc import Callable, Iterator
import math
from typing import Any

from jax.extend import core
import jax.numpy as jnp
import numpy as np

_PER_RESULT = frozenset(
    "abs add add_any atan2 ceil clamp cos div erf erf_inv erfc exp exp2 expm1 floor"
    " integer_pow log log1p logistic max min mul neg pow rem round rsqrt sign sin"
    " sqrt square sub tan tanh".split()
)
_PER_OPERAND = frozenset(
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_max"
    " reduce_min reduce_prod reduce_sum".split()
)


def count(jaxpr: Any) -> float:
  """Operations of one run on all devices together.

  A product and its sum are two, a transcendental is one; integers count none. A
  scan's body counts as often as it runs, of a cond the larger branch, and a while
  loop's body, whose trips are not known, once. What a gradient computes again
  counts again, and what nothing uses. Where a convolution reads padding or the zeros between a
  gradient's values, nothing counts.
  """
  if isinstance(jaxpr, core.ClosedJaxpr):
    jaxpr = jaxpr.jaxpr
  return sum((_of_equation(equation) for equation in jaxpr.eqns), start=0.0)


def _of_equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name in _COUNTS:
    return _COUNTS[name](equation)
  inner = [count(jaxpr) for jaxpr in _jaxprs(params)]
  if not inner:
    return _elementwise(name, equation)
  if name == "cond":
    return max(inner)
  times = 1.0
  if name == "scan":
    times = params["length"]
  elif name == "shard_map":  # the body is one device's
    times = params["mesh"].size
  return times * sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for one in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(one, (core.Jaxpr, core.ClosedJaxpr)):
        yield one


def _elementwise(name: str, equation: Any) -> float:
  if not equation.invars:
    return 0.0
  x = equation.invars[0].aval
  if not jnp.issubdtype(getattr(x, "dtype", None), jnp.inexact):
    return 0.0
  if name in _PER_RESULT:
    return float(equation.outvars[0].aval.size)
  return float(x.size) if name in _PER_OPERAND else 0.0


def _dot(equation: Any) -> float:
  (contracted, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  terms = math.prod(shape[axis] for axis in contracted)
  return 2.0 * equation.outvars[0].aval.size * terms


def _convolution(equation: Any) -> float:
  params, (x, kernel) = equation.params, equation.invars
  numbers = params["dimension_numbers"]
  out = equation.outvars[0].aval
  taps, positions = 1.0, 1
  for i, (x_axis, kernel_axis, out_axis) in enumerate(
      zip(
          numbers.lhs_spec[2:],
          numbers.rhs_spec[2:],
          numbers.out_spec[2:],
          strict=True,
      )
  ):
    positions *= out.shape[out_axis]
    # Where each output's tap falls, on the input with zeros between its values.
    place = (
        np.arange(out.shape[out_axis])[:, None] * params["window_strides"][i]
        + np.arange(kernel.aval.shape[kernel_axis]) * params["rhs_dilation"][i]
        - params["padding"][i][0]
    )
    spread = params["lhs_dilation"][i]
    inside = (place >= 0) & (place <= (x.aval.shape[x_axis] - 1) * spread)
    taps *= int(np.count_nonzero(inside & (place % spread == 0)))
  terms = kernel.aval.shape[numbers.rhs_spec[1]]
  return 2.0 * out.size / positions * taps * terms


def _window(equation: Any) -> float:
  window = math.prod(equation.params["window_dimensions"])
  return float(equation.outvars[0].aval.size * window)


_COUNTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce": lambda equation: float(equation.invars[0].aval.size),
    "reduce_window": _window,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "scatter-add": lambda equation: float(equation.invars[2].aval.size),
}
