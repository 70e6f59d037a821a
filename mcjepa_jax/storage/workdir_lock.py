"""The lock that keeps two runs out of one workdir."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import pathlib
import sys
import time

import jax

from mcjepa_jax import errors

# What a file system without locks answers: then nothing keeps two runs apart.
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


# NFSv4 servers keep the locks of a client that is silent for 90 seconds.
_LEASE_SECONDS = 180.0


@contextlib.contextmanager
def sole_owner(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir: a second run in it would delete the first one's saves.

  Of many hosts one may have died a moment ago, and a share's server still hold its
  lock: that is waited for. NFSv3 never gives it back: the file has to go.

  Raises:
    UserError: another process holds it.
  """
  path, told = workdir / ".lock", False
  deadline = time.monotonic()
  if jax.process_count() > 1:
    deadline += _LEASE_SECONDS
  with path.open("w") as file:
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        if (left := deadline - time.monotonic()) > 0:
          if not told:
            print(f"{path} is locked: tried for {left:.0f} s", file=sys.stderr)
          told = True
          time.sleep(1)
          continue
        raise errors.UserError(
            f"workdir: another run is using {workdir}; wait for it or use"
            f" another; if none is, a host that died has left {path}: delete it"
        ) from error
      except OSError as error:
        if error.errno not in _NO_LOCKS:
          raise errors.UserError(
              f"workdir: cannot lock {workdir}: {error.strerror}"
          ) from error
      break
    yield
