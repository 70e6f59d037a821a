"""What a compiled program says of itself: the bytes that it moves."""

from collections.abc import Callable
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
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\](\{[^{}]*\})?")
_NEAR = re.compile(r"S\([1-9]")  # a layout in a memory other than the device's
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


def shape_bytes(shape: str, *, near: bool = True) -> int:
  """Bytes of all arrays in an HLO shape, without the padding of its layout.

  `near=False` leaves out what lies in a core's own memory.
  """
  total = 0
  for kind, sizes, layout in _ARRAY.findall(shape):
    if not near and _NEAR.search(layout):
      continue
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
      # A start's done and updates name the same computation.
      if operation.endswith(("-done", "-update")):
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


# They hand arrays on, or their body is counted by itself.
_MOVE_NOTHING = frozenset(
    "after-all bitcast call conditional constant get-tuple-element"
    " opt-barrier parameter partition-id replica-id tuple while".split()
)
_READ_A_PART = frozenset("dynamic-slice gather slice".split())


class _Fusion:
  """What a fused computation reads and writes of what it is given."""

  def __init__(
      self,
      instructions: list[Instruction],
      fused: Callable[[str], "_Fusion"],
  ):
    """Takes the computation, and the fusion by the attributes of a nested one."""
    shapes = {name: shape for name, shape, *_ in instructions}
    users: dict[str, list[tuple[str, str, str, int]]] = {}
    parameters, defined = {}, {}
    for name, _, operation, operands, attributes in instructions:
      names = _NAME.findall(operands)
      defined[name] = operation, names, attributes
      if operation == "parameter":
        parameters[int(operands)] = name
      for number, operand in enumerate(names):
        users.setdefault(operand, []).append(
            (name, operation, attributes, number)
        )

    def read(name):
      """Bytes of a parameter, or of what is bitcast from it, that are read."""
      whole, parts = shape_bytes(shapes[name]), 0
      for user, operation, attributes, number in users.get(name, ()):
        if operation == "bitcast":
          parts += read(user)
        elif operation == "fusion":
          parts += fused(attributes).reads[number]
        elif operation in _READ_A_PART and number == 0:
          parts += shape_bytes(shapes[user])
        elif operation != "dynamic-update-slice" or number:
          return whole
      return min(whole, parts)

    def written(name):
      operation, names, attributes = defined[name]
      if operation == "tuple":
        return sum(map(written, names))
      if operation == "bitcast":
        return written(names[0])
      if operation == "fusion":
        return fused(attributes).writes
      if operation == "dynamic-update-slice":  # in place
        return shape_bytes(shapes[names[1]])
      return shape_bytes(shapes[name])

    self.reads = {i: read(name) for i, name in parameters.items()}
    self.writes = written(instructions[-1][0])


def hbm_bytes(text: str) -> int:
  """Bytes that one execution reads and writes in the device's own memory.

  Each operand and each result of what runs by itself, a fusion or an operation; of
  a slice what is cut out, of an update what is put in. A loop's body counts as
  often as it runs. Padding is not counted. An estimate: a scatter counts whole.
  """
  computations = _computations(text)
  runs = _runs(computations)
  inner = {
      called
      for instructions in computations.values()
      for _, _, operation, _, attributes in instructions
      if operation not in ("call", "while", "conditional")
      and not operation.startswith("async-")
      for called in _CALLED.findall(attributes)
  }
  every = {
      one[0]: one
      for instructions in computations.values()
      for one in instructions
  }
  fusions: dict[str, _Fusion] = {}

  def fused(attributes):
    called = _CALLED.search(attributes)[1]
    if called not in fusions:
      fusions[called] = _Fusion(computations[called], fused)
    return fusions[called]

  def far(name):
    return shape_bytes(every[name][1], near=False)

  def moved(name, shape, operation, operands, attributes):
    names = [n for n in _NAME.findall(operands) if n in every]
    if (
        operation in _MOVE_NOTHING
        or operation.startswith("async-")  # their computation's own count
        or operation.endswith(("-start", "-update"))
        or "AllocateBuffer" in attributes
    ):
      return 0
    if operation.endswith("-done"):  # of what the start was given
      operation = operation.removesuffix("-done")
      names = [n for n in _NAME.findall(every[names[0]][3]) if n in every]
    if operation == "fusion":
      one = fused(attributes)
      return min(one.writes, far(name)) + sum(
          min(one.reads[i], far(n)) for i, n in enumerate(names)
      )
    if operation in _READ_A_PART:
      return far(name) + min(shape_bytes(shape), far(names[0]))
    if operation == "dynamic-update-slice":
      update = shape_bytes(every[names[1]][1])
      return far(names[1]) + min(update, far(name))
    return far(name) + sum(map(far, names))

  return sum(
      runs[computation] * sum(moved(*one) for one in instructions)
      for computation, instructions in computations.items()
      if computation not in inner
  )
