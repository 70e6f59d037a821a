"""The former name of mcjepa_jax.convert_images."""

import sys

if __name__ == "__main__":
  print(
      "error: python -m mcjepa_jax.data.convert is now python -m mcjepa_jax.convert_images",
      file=sys.stderr,
  )
  sys.exit(2)
