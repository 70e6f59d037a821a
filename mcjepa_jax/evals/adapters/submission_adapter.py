"""The eval `submit/SET`, from a config: what it reads, and its run."""

from typing import Any

import tqdm

from mcjepa_jax.data import sources
from mcjepa_jax.evals import submission
from mcjepa_jax.evals.adapters import flow_adapter
from mcjepa_jax.evals.eval_subject import Results, Subject
from mcjepa_jax.storage import local_files

FOLDER = "submissions"  # a folder of the workdir


def examples(config: Any, name: str) -> Any:
  """The pairs of a benchmark's test set, by the archive's members."""
  root = sources.data_root(config.data_root, config.data_cache)

  def part(source):
    return sources.motion(source, root, seed=0, size=tuple(config.motion.size))

  # Pairs of a pass of MPI-Sintel, of KITTI 2012 and 2015: data/catalog/flow_facts.
  if name == "sintel":
    return submission.frames(
        {r: part(f"sintel_test_{r}") for r in ("clean", "final")},
        submission.sintel_member,
        count=552,
        scenes=submission.SINTEL_SCENES,
    )
  year, count = sources.choice(
      {"kitti": ("2015", 200), "kitti_2012": ("2012", 195), "sintel": ()},
      name,
      "evals: submit",
  )
  return submission.frames(
      {year: part(f"kitti_{year}_test")}, submission.kitti_member, count=count
  )


def run(subject: Subject, name: str) -> Results:
  """The results, keyed `submit/SET/METRIC`; writes the archive."""
  folder = subject.workdir / FOLDER
  local_files.check_writable(folder, f"submit/{name}")
  config = subject.config
  result = submission.run(
      name,
      examples(config, name),
      flow_adapter.predictor(subject, subject.params),
      folder,
      batch_size=config.eval_batch_size,
      max_pixels=config.eval_max_pixels,
  )
  tqdm.tqdm.write(f"submit/{name}: {folder / f'{name}.zip'}")
  return result
