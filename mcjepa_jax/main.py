"""The command: trains or evaluates what a config describes.

python -m mcjepa_jax.main --config=configs/quickstart.py --workdir=WORKDIR
"""

from mcjepa_jax import command


def main(argv: list[str] | None = None) -> int:
  """The exit code of the run that the arguments describe."""
  return command.run(argv, _run)


def _run(config, workdir) -> None:
  # Imported here: a Grain worker imports this module again, and needs no JAX.
  from mcjepa_jax import evaluate, train

  if config.task == "evaluate":
    evaluate.evaluate(config, workdir)
  else:
    train.train(config, workdir)


if __name__ == "__main__":
  raise SystemExit(main())
