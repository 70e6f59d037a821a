"""How long a run is held up by its checkpoints, at the paper's size.

  python -m benchmarks.checkpoints [--config=FILE.py] [--json=PATH]

Saves the whole train state of a config in the background, as training does,
while steps that take the state's own memory (donation) go on; restores it and
compares it bit for bit with what it was when it was saved. The steps only add to
the state: what is measured is the writing. Exit code 1 if the save or a step
meanwhile took half a second or more, anything differs, or it took more memory than
twice the state.
"""

import os
import pathlib
import tempfile
import time

from absl import app, flags
import jax
import numpy as np

from benchmarks import report
from mcjepa_jax.distributed import sharding
from mcjepa_jax.runtime import config_files, process_memory
from mcjepa_jax.step import train_state
from mcjepa_jax.storage import checkpoint
from mcjepa_jax.training import build

_CONFIG = flags.DEFINE_string(
    "config", "configs/mcjepa_convnext_tiny.py", "Whose state is saved."
)
_JSON = flags.DEFINE_string("json", None, "Where to write the rows.")
_DIR = flags.DEFINE_string("dir", None, "Folder on the disk to write to.")

_BLOCKED = 0.5  # seconds
_MEMORY = 2.0  # times the state, beside it: its copy, and what is written


def main(argv: list[str]) -> None:
  """Prints the table, writes the JSON, exits 1 if the save is too slow."""
  del argv
  config = config_files.load_config(_CONFIG.value, [])
  mesh = sharding.make_mesh()
  model, optimizers = build.model(config), build.optimizers(config)
  abstract = build.abstract_state(config, model, optimizers, mesh)
  state = sharding.call_once(
      lambda: train_state.init_state(model, optimizers, config.seed),
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
  )
  add = jax.jit(
      lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0
  )
  state = jax.block_until_ready(add(state))
  expected = jax.tree.map(np.array, state)  # copies: donation overwrites
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(expected))
  before = process_memory.own_peak_rss_gb()

  with (
      tempfile.TemporaryDirectory(dir=_DIR.value) as folder,
      checkpoint.Checkpoints(folder) as checkpoints,
  ):
    checkpoints.make_room(state)
    began = time.perf_counter()
    checkpoints.save(1, state, {}, {})
    blocked = time.perf_counter() - began
    longest = count = 0
    while not pathlib.Path(folder, "checkpoints", "1").exists():
      start = time.perf_counter()
      state = jax.block_until_ready(add(state))
      longest, count = max(longest, time.perf_counter() - start), count + 1
      checkpoints.check_errors()
    checkpoints.wait_until_finished()
    written = time.perf_counter() - began
    peak = process_memory.own_peak_rss_gb() - before
    start = time.perf_counter()
    restored, _, _ = checkpoints.restore(1, abstract)
    jax.block_until_ready(restored)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    checkpoints.save(2, state, {}, {})
    later = time.perf_counter() - start
  differ = sum(
      not np.array_equal(a, b)
      for a, b in zip(
          jax.tree.leaves(expected), jax.tree.leaves(restored), strict=True
      )
  )
  rows = [
      {"name": name, "value": round(value, 3), "unit": unit}
      for name, value, unit in (
          ("state", size / 1e9, "GB"),
          ("blocked", blocked, "s"),
          ("by a later save", later, "s"),
          ("written", written, "s"),
          ("steps meanwhile", count, ""),
          ("longest of them", longest, "s"),
          ("memory besides", peak, "GB"),
          ("restored", seconds, "s"),
          ("arrays that differ", differ, ""),
      )
  ]
  for row in rows:
    report.show(row, first=row is rows[0], widths=(20, 10))
  meta = {
      "config": config.name,
      "cores": os.cpu_count(),
      "jax": jax.__version__,
  }
  report.end(
      _JSON.value,
      meta,
      rows,
      failed=max(blocked, later, longest) >= _BLOCKED
      or differ > 0
      or peak * 1e9 >= _MEMORY * size,
  )


if __name__ == "__main__":
  app.run(main)
