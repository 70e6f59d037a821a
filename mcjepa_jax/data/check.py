"""The former name of mcjepa_jax.check_data."""

import sys

if __name__ == "__main__":
  print(
      "error: python -m mcjepa_jax.data.check is now python -m mcjepa_jax.check_data",
      file=sys.stderr,
  )
  sys.exit(2)
