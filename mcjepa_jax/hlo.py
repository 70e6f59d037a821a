"""What a compiled program says of itself: bytes that its collectives move."""

import re

_BITS = {
    "pred": 8,
    **{
        f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
    },
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
# `%name = shape operation(operands), attributes`
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$"
)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")

Instruction = tuple[str, str, str, str, str]  # _INSTRUCTION's groups


def shape_bytes(shape: str) -> int:
  """Bytes of all arrays in an HLO shape, without the padding of its layout."""
  total = 0
  for kind, sizes in _ARRAY.findall(shape):
    bits = _BITS.get(kind, 8 if kind.startswith("f8") else 0)
    for size in filter(None, sizes.split(",")):
      bits *= int(size)
    total += (bits + 7) // 8
  return total


def _trips(attributes: str, condition: list[Instruction]) -> int:
  """Trips of a while loop: as annotated, or its condition's one constant."""
  known = _TRIP_COUNT.search(attributes)
  if known:
    return int(known[1])
  constants = [i[3] for i in condition if i[2] == "constant"]
  return int(constants[0]) if len(constants) == 1 else 1


def _computations(text: str) -> dict[str, list[Instruction]]:
  """Instructions by computation, callees before their callers, entry last."""
  found, current = {}, []
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      current = found[header[1]] = []
      continue
    instruction = _INSTRUCTION.match(line)
    if instruction:
      current.append(instruction.groups())
  return found


def _runs(computations: dict[str, list[Instruction]]) -> dict[str, int]:
  """How often one execution of the program runs each computation."""
  names = list(computations)
  runs = dict.fromkeys(names, 0) | {names[-1]: 1}
  for name in reversed(names):
    for _, _, operation, _, attributes in computations[name]:
      if operation.endswith("-done"):  # its start names the same computation
        continue
      trips = 1
      if operation == "while":
        condition = _CONDITION.search(attributes)[1]
        trips = _trips(attributes, computations.get(condition, []))
      called = _CALLED.findall(attributes)
      for branches in _BRANCHES.findall(attributes):
        called += _NAME.findall(branches)
      for other in called:
        if other in runs:
          runs[other] += runs[name] * trips
  return runs


def collective_bytes(text: str) -> dict[str, int]:
  """Bytes that each kind of collective moves per device in one execution.

  The larger of what goes in and what comes out: a gather's result, a
  reduce-scatter's operand. A loop's body counts as often as it runs.
  """
  computations = _computations(text)
  runs = _runs(computations)
  sizes, keys = {}, {}
  for instructions in computations.values():
    for name, shape, _, _, attributes in instructions:
      sizes[name] = shape_bytes(shape)
      # A TPU program repeats a collective in each fusion that overlaps it.
      channel = _CHANNEL.search(attributes)
      keys[name] = channel[0] if channel else name
  moved: dict[tuple[str, str], int] = {}
  for computation, instructions in computations.items():
    for name, _, operation, operands, _ in instructions:
      kind = operation.removesuffix("-start").removesuffix("-done")
      done = operation.endswith("-done")
      if kind not in _COLLECTIVES:
        continue
      inputs = _NAME.findall(operands)
      size = 0 if done else sum(sizes.get(i, 0) for i in inputs)
      if operation == kind or done:  # a start's shape holds operands as well
        size = max(size, sizes[name])
      key = kind, keys[inputs[0]] if done else keys[name]
      moved[key] = max(moved.get(key, 0), size * runs[computation])
  totals: dict[str, int] = {}
  for (kind, _), size in moved.items():
    totals[kind] = totals.get(kind, 0) + size
  return totals
