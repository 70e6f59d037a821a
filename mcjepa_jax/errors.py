"""Faults of the input, other ends of a command, and their exit codes."""

from collections.abc import Callable
from typing import Any

EXIT_CRASHED = 1  # as Python has it
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
EXIT_ALARM = 76
EXIT_LOST = 77  # a host, a worker or a bucket: to be started again
EXIT_INTERRUPTED = 130  # as shells have it


class UserError(ValueError):
  """A fault of the user's input, one message per fault found.

  Each message names the file, key or value, what was expected and what came.
  The commands print each as one line `error: ...` and exit with code 2; a run
  that has begun, with 77 for what is a `TransientError`.
  """

  # Whether more of the same kind are certain to fail in the same way.
  final = False

  def __init__(self, *messages: str):
    super().__init__("\n".join(messages))
    self.messages = messages


class TransientError(UserError):
  """A fault of what is around a run, which may be gone at its next start."""


class Stop(BaseException):
  """Ends a command with an exit code of its own and one line that says why.

  No Exception: raised by a signal, it is no fault of the file that is read.
  """

  def __init__(self, code: int, message: str):
    super().__init__(message)
    self.code = code


def collect(*checks: Callable[[], Any]) -> list[str]:
  """The messages of all the UserErrors of the checks, called in their order.

  After one that is final no more are called.
  """
  messages = []
  for check in checks:
    try:
      check()
    except UserError as error:
      messages.extend(error.messages)
      if error.final:
        break
  return messages
