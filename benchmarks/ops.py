"""Operations in the backend's form against their naive form, in one run.

  python -m benchmarks.ops --json=PATH [--only=warp] [--repeats=N]

Times are the least of N runs, in milliseconds. The two forms take turns, so
that a busy machine slows both. A target is the largest ratio ours / reference
on CPU; the exit code is 1 if a row misses its own.
"""

from collections.abc import Callable
import functools
import os
import time
from typing import Any, NamedTuple

from absl import app, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import report  # noqa: E402
from mcjepa_jax.ops import (  # noqa: E402
    cost_volume,
    depthwise,
    flow_ops,
)

_JSON = flags.DEFINE_string("json", None, "Where to write the rows.")
_ONLY = flags.DEFINE_string("only", "", "Run the rows whose name has this.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed runs of each form.")


def _warp(x, flow, form=None):
  """The warp, or a channel at a time by `map_coordinates`."""
  if form is None:
    return flow_ops.warp(x, flow)
  sample = flow_ops.pixel_grid(*x.shape[1:3]) + flow
  by_channel = jax.vmap(
      functools.partial(
          jax.scipy.ndimage.map_coordinates, order=1, mode="nearest"
      ),
      in_axes=(-1, None),
      out_axes=-1,
  )
  return jax.vmap(by_channel)(x, [sample[..., 1], sample[..., 0]])


class _Case(NamedTuple):
  name: str
  op: Callable[..., jax.Array]
  naive: str  # form of the reference
  shapes: tuple[tuple[int, ...], ...]
  targets: tuple[float | None, float | None]  # forward; forward and backward


# 32 maps are the frames, and the directions, of 16 pairs: those of 64x64 at
# strides 4 and 8, then one of 128x192 at stride 4.
_CASES = (
    _Case(
        "warp",
        _warp,
        "map_coordinates",
        ((32, 16, 16, 32), (32, 16, 16, 2)),
        (None, 0.9),
    ),
    _Case(
        "warp",
        _warp,
        "map_coordinates",
        ((32, 8, 8, 64), (32, 8, 8, 2)),
        (None, 0.9),
    ),
    _Case(
        "warp",
        _warp,
        "map_coordinates",
        ((32, 32, 48, 32), (32, 32, 48, 2)),
        (None, None),
    ),
    _Case(
        "cost_volume",
        cost_volume.cost_volume,
        "shifts",
        ((32, 16, 16, 32),) * 2,
        (0.7, 0.7),
    ),
    _Case(
        "cost_volume",
        cost_volume.cost_volume,
        "shifts",
        ((32, 8, 8, 64),) * 2,
        (0.7, 0.7),
    ),
    _Case(
        "cost_volume",
        cost_volume.cost_volume,
        "shifts",
        ((32, 32, 48, 32),) * 2,
        (None, None),
    ),
    _Case(
        "depthwise_conv",
        depthwise.depthwise_conv,
        "grouped",
        ((32, 16, 16, 64), (7, 7, 1, 64)),
        (0.5, 0.7),
    ),
)


def _forward(op, form, x, y):
  return op(x, y, form=form)


def _forward_backward(op, form, x, y):
  out, vjp = jax.vjp(functools.partial(op, form=form), x, y)
  return vjp(out)


def _least_milliseconds(
    programs: list[Callable[..., Any]], arrays: list[jax.Array], repeats: int
) -> list[float]:
  """The least time of each program; they take turns."""
  least = [float("inf")] * len(programs)
  for repeat in range(repeats + 1):
    for i, program in enumerate(programs):
      start = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      if repeat:  # the first run compiles
        elapsed = 1e3 * (time.perf_counter() - start)
        least[i] = min(least[i], elapsed)
  return least


def _rows(case: _Case, repeats: int):
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in case.shapes]
  for run, target in zip(
      (_forward, _forward_backward), case.targets, strict=True
  ):
    programs = [
        jax.jit(functools.partial(run, case.op, form))
        for form in (None, case.naive)
    ]
    ours, reference = _least_milliseconds(programs, arrays, repeats)
    if jax.default_backend() != "cpu":
      target = None
    ratio = ours / reference
    yield {
        "name": case.name + run.__name__,
        "shape": list(case.shapes[0]),
        "ours": ours,
        "reference": reference,
        "reference_name": case.naive,
        "unit": "ms",
        "ratio": ratio,
        "target": target,
        "passed": target is None or ratio <= target,
    }


def main(argv: list[str]) -> None:
  """Prints the table, writes the JSON, exits 1 if a target is missed."""
  del argv
  print(f"{'name':32} {'shape':>18} {'ours':>9} {'naive':>9} ratio  target")
  rows = []
  for case in _CASES:
    if _ONLY.value not in case.name:
      continue
    for row in _rows(case, _REPEATS.value):
      shape = "x".join(map(str, row["shape"]))
      target = "" if row["target"] is None else f"{row['target']:.2f}"
      missed = "" if row["passed"] else "  MISSED"
      print(
          f"{row['name']:32} {shape:>18} {row['ours']:7.2f}ms"
          f" {row['reference']:7.2f}ms {row['ratio']:5.2f}  {target}{missed}",
          flush=True,
      )
      rows.append(row)
  meta = {
      "device": jax.devices()[0].device_kind,
      "backend": jax.default_backend(),
      "cores": os.cpu_count(),
      "jax": jax.__version__,
      "repeats": _REPEATS.value,
  }
  report.end(
      _JSON.value, meta, rows, failed=not all(row["passed"] for row in rows)
  )


if __name__ == "__main__":
  app.run(main)
