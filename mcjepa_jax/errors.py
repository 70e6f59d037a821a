"""The one exception for faults of the input: files, paths, keys, values."""

from collections.abc import Callable
from typing import Any


class UserError(ValueError):
  """A fault of the user's input, one message per fault found.

  Each message names the file, key or value, what was expected and what came.
  The commands print each as one line `error: ...` and exit with code 2; a run
  that has begun, with 77 for what is `Passing`.
  """

  # Whether more of the same kind are certain to fail in the same way.
  final = False

  def __init__(self, *messages: str):
    super().__init__("\n".join(messages))
    self.messages = messages


class Passing(UserError):
  """A fault of what is around a run, which may be gone at its next start."""


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
