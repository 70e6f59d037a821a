"""The command: trains or evaluates what a config describes.

python -m mcjepa_jax.main --config=configs/quickstart.py --workdir=WORKDIR

The same command on each host of a Cloud TPU pod, of several slices or of a
SLURM job is one run. Elsewhere each host also gets

  --coordinator=HOST:PORT --processes=N --process=I

or MCJEPA_COORDINATOR, MCJEPA_PROCESSES and MCJEPA_PROCESS; HOST is that of
process 0. MCJEPA_START_SECONDS is how long they wait for each other, 300;
MCJEPA_LOST_SECONDS how long a host may be silent before it counts as lost, 60.
"""

import contextlib
import os

from mcjepa_jax import errors
from mcjepa_jax.distributed import heartbeat
from mcjepa_jax.runtime import command_line

_FLAGS = ("coordinator", "processes", "process")


def main(argv: list[str] | None = None) -> int:
  """The exit code of the run that the arguments describe."""
  return heartbeat.end(command_line.run(argv, _run, flags=_FLAGS))


def _seconds(variable: str, default: float) -> float:
  text = os.environ.get(variable) or str(default)
  try:
    seconds = float(text)
  except ValueError:
    seconds = 0.0
  if not 0 < seconds < float("inf"):
    raise errors.UserError(f"{variable}: expected seconds, got {text!r}")
  return seconds


def _run(config, workdir, flags) -> None:
  # Imported here: a Grain worker imports this module again, and needs no JAX.
  from mcjepa_jax.distributed import cluster, hosts, rendezvous

  seconds = _seconds("MCJEPA_START_SECONDS", 300.0)
  process = cluster.find(flags, seconds=seconds)
  if process and config.task == "evaluate":
    raise errors.UserError(
        f"task: evaluate runs on one host, got {process.count}"
    )
  with contextlib.ExitStack() as stack:
    stack.enter_context(heartbeat.report_failures())
    rendezvous.start(
        process,
        seconds=seconds,
        silence=_seconds("MCJEPA_LOST_SECONDS", heartbeat.SILENCE),
    )
    from mcjepa_jax import evaluate, train
    from mcjepa_jax.storage import paths

    stack.callback(paths.remove_temporary)
    if not hosts.first():
      quiet = stack.enter_context(open(os.devnull, "w"))
      stack.enter_context(contextlib.redirect_stdout(quiet))
    if config.task == "evaluate":
      evaluate.evaluate(config, workdir)
    else:
      train.train(config, workdir)


if __name__ == "__main__":
  command_line.leave(main())
