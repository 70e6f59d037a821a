"""A bucket of an emulator of Google Cloud Storage on this machine."""

from collections.abc import Iterator
import contextlib

from gcp_storage_emulator import server as emulator
import pytest


@contextlib.contextmanager
def emulated(bucket: str, *variables: str) -> Iterator[pytest.MonkeyPatch]:
  """Serves a bucket inside, named to this and to later processes.

  Also the variables get the server's address. What is patched by what is yielded
  lasts as long as the server.
  """
  server = emulator.create_server("localhost", 0, True, default_bucket=bucket)
  server.start()
  port = server._api._httpd.server_address[1]
  try:
    with pytest.MonkeyPatch.context() as patch:
      for key in ("STORAGE_EMULATOR_HOST", *variables):
        patch.setenv(key, f"http://localhost:{port}")
      yield patch
  finally:
    server.stop()
