"""The one exception for faults of the input: files, paths, keys, values."""


class UserError(ValueError):
  """A fault of the user's input, one message per fault found.

  Each message names the file, key or value, what was expected and what came.
  The commands print each as one line `error: ...` and exit with code 2.
  """

  def __init__(self, *messages: str):
    super().__init__("\n".join(messages))
    self.messages = messages
