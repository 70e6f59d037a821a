"""Procedural scenes with exact flow: textured objects on a moving background.

Every scene is a function of (seed, index) alone, so sets with different seeds
share no scene. The class is the texture pattern of the largest object; its
colours, shape, place, size, angle and motion are drawn independently of it.

Scenes live in units of 1/64 of the image's shorter side with the origin at the
image's centre, so sizes other than 64 show the same scene at another scale
(textures alias much below 48). Each layer moves by its own similarity, half of
it before and half after the scene's reference time: both frames, and flows and
their negatives, have the same distribution.

Masks: `visible_1` is 1 where the point of frame 1 is seen in frame 2 (it lies
inside frame 2 and no layer covers it there), `visible_2` the reverse. `valid`
is 1 everywhere: the flow is also exact where its target is hidden.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

from jaxtyping import Float
import numpy as np

from mcjepa_jax import errors

# Scene units per shorter side of the image.
_SIDE = 64
# Transitions this wide keep patterns and silhouettes free of aliases, so that
# interpolating one frame along the flow gives the other.
_PATTERN_EDGE = 1.0
_SILHOUETTE_EDGE = 0.6

# Patterns are bent by this many periods, so that two objects of a class do not
# agree pixel by pixel: nearest neighbours of raw pixels read the class at 18 %
# (chance is 10), at 24 % without.
_BEND = 0.16

# A pattern: coordinates in periods, two offsets in [0, 1) and the edge's width
# in periods -> values in [-1, 1], each sign on about half of the plane.
_Plane = Float[np.ndarray, "t h w"]
Pattern = Callable[[_Plane, _Plane, Float[np.ndarray, "2"], float], _Plane]


def _to_integer(x: _Plane) -> _Plane:
  """Distance to the nearest integer, a triangle wave of period 1."""
  return np.abs(x - np.rint(x))


def _stripes(x, y, offset, edge):
  return np.tanh((0.25 - _to_integer(x + offset[0])) / edge)


def _checkerboard(x, y, offset, edge):
  columns = np.tanh((0.25 - _to_integer(x + offset[0])) / edge)
  return columns * np.tanh((0.25 - _to_integer(y + offset[1])) / edge)


def _dots(x, y, offset, edge):
  x, y = x + offset[0], y + offset[1]
  return np.tanh((0.39 - np.hypot(x - np.rint(x), y - np.rint(y))) / edge)


def _rings(x, y, offset, edge):
  radius = np.hypot(x + 4 * (offset[0] - 0.5), y + 4 * (offset[1] - 0.5))
  return np.tanh((0.25 - _to_integer(radius)) / edge)


def _bricks(x, y, offset, edge):
  x, y = 0.7 * x + offset[0], 1.4 * y + offset[1]
  row = np.floor(y)
  joint = _to_integer(x + 0.5 * row) / 0.7
  return np.tanh((np.minimum(joint, _to_integer(y) / 1.4) - 0.14) / edge)


def _zigzag(x, y, offset, edge):
  wave = y + offset[1] + 1.5 * _to_integer(0.5 * x + offset[0])
  return np.tanh((0.25 - _to_integer(wave)) * 0.8 / edge)


def _grid(x, y, offset, edge):
  line = np.minimum(_to_integer(x + offset[0]), _to_integer(y + offset[1]))
  return np.tanh((0.152 - line) / edge)


def _triangles(x, y, offset, edge):
  a = x + offset[0]
  b = (0.5 * x + 0.8660254 * y) + offset[1]
  value = 1.0
  for t in (a, b, b - a):
    # sin(pi t) / pi is the signed distance to the nearest line of its family.
    value = value * np.tanh(np.sin(np.pi * t) / (np.pi * edge))
  return value


def _spots(x, y, offset, edge):
  value = 0.0
  for k in range(5):
    # Five directions a fifth of a half-turn apart never repeat; the large
    # factors make the field at the object's centre a different one each time.
    angle = np.pi * (k / 5 + offset[0])
    phase = 2 * np.pi * (100 * offset[k % 2] * (k + 1))
    wave = x * math.cos(angle) + y * math.sin(angle)
    value = value + np.cos(2 * np.pi * wave + phase)
  return np.tanh(value / (12 * edge))


def _crosses(x, y, offset, edge):
  x, y = _to_integer(0.8 * x + offset[0]), _to_integer(0.8 * y + offset[1])
  arm = np.minimum(0.19 - np.minimum(x, y), 0.41 - np.maximum(x, y)) / 0.8
  return np.tanh(arm / edge)


PATTERNS: dict[str, Pattern] = {
    "stripes": _stripes,
    "checkerboard": _checkerboard,
    "dots": _dots,
    "rings": _rings,
    "bricks": _bricks,
    "zigzag": _zigzag,
    "grid": _grid,
    "triangles": _triangles,
    "spots": _spots,
    "crosses": _crosses,
}
CLASS_NAMES = tuple(PATTERNS)
NUM_CLASSES = len(CLASS_NAMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """One flat, textured piece of a scene and its motion between the frames."""

  # Position at the reference time, and the motion from frame 1 to frame 2.
  center: tuple[float, float] = (0.0, 0.0)
  translation: tuple[float, float] = (0.0, 0.0)
  rotation: float = 0.0  # radians, x towards y: clockwise on the screen
  log_zoom: float = 0.0
  # Silhouette rho(theta) = radius (1 + sum_k Re(c_k exp(i k theta))), k from 2;
  # None fills the plane.
  radius: float | None = None
  harmonics: tuple[complex, ...] = ()
  # Paint: color + contrast pattern + sum_k amplitude_k cos(wave_k p + phase_k).
  color: Float[np.ndarray, "3"]
  contrast: Float[np.ndarray, "3"] | None = None
  pattern: str | None = None
  period: float = 10.0
  angle: float = 0.0
  offset: Float[np.ndarray, "2"] | None = None
  bend: tuple[float, float] | None = None  # phases
  waves: Float[np.ndarray, "k 2"]  # radians per unit
  phases: Float[np.ndarray, "k"]
  amplitudes: Float[np.ndarray, "k 3"]
  # Name of the layer in `segments_1`.
  segment: int = 0

  def to_image(self) -> Float[np.ndarray, "2 3 3"]:
    """Homogeneous maps from the layer to the image, for each frame."""
    maps = np.zeros((2, 3, 3))
    for frame, time in enumerate((-0.5, 0.5)):
      zoom = math.exp(time * self.log_zoom)
      cos = zoom * math.cos(time * self.rotation)
      sin = zoom * math.sin(time * self.rotation)
      x = self.center[0] + time * self.translation[0]
      y = self.center[1] + time * self.translation[1]
      maps[frame] = ((cos, -sin, x), (sin, cos, y), (0, 0, 1))
    return maps


def _affine(
    maps: Float[np.ndarray, "t 3 3"], points: Float[np.ndarray, "2 *t h w"]
) -> Float[np.ndarray, "2 t h w"]:
  """Points under one map per frame, components first."""
  m = maps.astype(np.float32)[:, :, :, None, None]
  x, y = points
  return np.stack(
      (
          m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2],
          m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2],
      )
  )


def _depth_inside(layer: Layer, x: _Plane, y: _Plane) -> _Plane:
  """Distance to the silhouette, positive inside; exact where it is zero."""
  rho = np.sqrt(x * x + y * y) + np.float32(1e-6)
  unit = (x + 1j * y) / rho
  boundary = np.ones_like(rho)
  power = unit
  for c in layer.harmonics:
    power = power * unit
    boundary += (np.complex64(c) * power).real
  return np.float32(layer.radius) * boundary - rho


def _noise(
    layer: Layer,
    to_layer: Float[np.ndarray, "t 3 3"],
    x: Float[np.ndarray, "w"],
    y: Float[np.ndarray, "h"],
) -> Float[np.ndarray, "t 3 h w"]:
  """The layer's waves seen in each frame.

  cos(a x + b y + c) = cos(a x) cos(b y + c) - sin(a x) sin(b y + c): on a grid
  the sum over the waves is one matrix product.
  """
  a, b, c = np.moveaxis(layer.waves @ to_layer[:, :2], -1, 0)
  row = (b[:, None] * y[:, None] + (c + layer.phases)[:, None]).astype("f4")
  column = (a[:, :, None] * x).astype("f4")
  rows = np.concatenate((np.cos(row), -np.sin(row)), -1)
  columns = np.concatenate((np.cos(column), np.sin(column)), 1)
  weights = np.tile(layer.amplitudes.astype("f4"), (2, 1)).T
  left = weights[:, None] * rows[:, None]
  return left @ columns[:, None]


def _paint(
    layer: Layer,
    to_layer: Float[np.ndarray, "t 3 3"],
    local: Float[np.ndarray, "2 t h w"],
    grid: Float[np.ndarray, "2 h w"],
) -> Float[np.ndarray, "t 3 h w"]:
  """Colours of the whole plane of the layer in each frame."""
  image = _noise(layer, to_layer, grid[0, 0], grid[1, :, 0])
  image += layer.color.astype("f4")[:, None, None]
  if layer.pattern is not None:
    x, y = local * np.float32(1 / layer.period)
    if layer.bend is not None:
      a, b = layer.bend
      x, y = x + _BEND * np.sin(1.1 * y + a), y + _BEND * np.sin(1.3 * x + b)
    cos, sin = math.cos(layer.angle), math.sin(layer.angle)
    value = PATTERNS[layer.pattern](
        cos * x + sin * y,
        cos * y - sin * x,
        layer.offset.astype("f4"),
        _PATTERN_EDGE / layer.period,
    )
    image += layer.contrast.astype("f4")[:, None, None] * value[:, None]
  return image


def render(
    layers: Sequence[Layer], size: tuple[int, int], *, num_frames: int = 2
) -> dict[str, np.ndarray]:
  """The frames of `layers` (back to front, the first one without a silhouette).

  Returns {"images": u8 [t h w 3], "segments": i32 [t h w]} and, for two frames,
  {"flows": f32 [2 h w 2], "visible": f32 [2 h w 1]}.
  """
  height, width = size
  scale = min(size) / _SIDE
  grid = np.stack(
      np.meshgrid(
          (np.arange(width) - (width - 1) / 2) / scale,
          (np.arange(height) - (height - 1) / 2) / scale,
      )
  ).astype("f4")
  to_image = [layer.to_image()[:num_frames] for layer in layers]
  to_layer = [np.linalg.inv(maps) for maps in to_image]

  image = None
  owner = np.zeros((num_frames, height, width), np.int32)
  for k, layer in enumerate(layers):
    local = _affine(to_layer[k], grid)
    paint = _paint(layer, to_layer[k], local, grid)
    if image is None:
      image = paint
      continue
    depth = _depth_inside(layer, *local)
    alpha = 0.5 + 0.5 * np.tanh(depth / np.float32(_SILHOUETTE_EDGE))
    image += alpha[:, None] * (paint - image)
    owner[depth > 0] = k
  image = np.clip(255 * image + 0.5, 0, 255).astype(np.uint8)
  names = np.array([layer.segment for layer in layers], np.int32)
  scene = {
      "images": np.ascontiguousarray(np.moveaxis(image, 1, -1)),
      "segments": names[owner],
  }
  if num_frames == 1:
    return scene

  target = np.empty((2, 2, height, width), np.float32)
  for k in range(len(layers)):
    # The map of frame 1 into frame 2 and its inverse.
    moved = _affine(to_image[k][::-1] @ to_layer[k], grid)
    np.copyto(target, moved, where=owner == k)
  visible = np.ones_like(owner, bool)
  for k, layer in enumerate(layers[1:], 1):
    local = _affine(to_layer[k][::-1], target)
    visible &= (owner >= k) | (_depth_inside(layer, *local) <= 0)
  limit = np.array([width - 1, height - 1], np.float32) / np.float32(2 * scale)
  visible &= (np.abs(target) <= limit[:, None, None, None]).all(0)
  flow = (target - grid[:, None]) * np.float32(scale)
  scene["flows"] = np.ascontiguousarray(np.moveaxis(flow, 0, -1))
  scene["visible"] = visible.astype(np.float32)[..., None]
  return scene


def _waves(
    rng: np.random.Generator,
    count: int,
    wavelength: tuple[float, float],
    std: float,
    gray: float,
) -> dict[str, np.ndarray]:
  """Random waves, log-uniform in wavelength, `std` in all; `gray` is shared."""
  shortest, longest = np.log(wavelength)
  length = np.exp(rng.uniform(shortest, longest, count))
  turn = rng.uniform(0, 2 * np.pi, count)
  frequency = 2 * np.pi / length[:, None]
  tint = gray + (1 - gray) * rng.uniform(-1.7, 1.7, (count, 3))
  return dict(
      waves=frequency * np.stack((np.cos(turn), np.sin(turn)), -1),
      phases=rng.uniform(0, 2 * np.pi, count),
      amplitudes=std * math.sqrt(2 / count) * tint,
  )


def _heading(
    rng: np.random.Generator, slowest: float, fastest: float
) -> tuple[float, float]:
  """A translation of uniform direction and uniform length."""
  turn, speed = rng.uniform(0, 2 * np.pi), rng.uniform(slowest, fastest)
  return speed * math.cos(turn), speed * math.sin(turn)


def _harmonics(rng: np.random.Generator, strength: float) -> tuple:
  """Coefficients of a silhouette, weaker where it would wiggle faster."""
  turns = rng.uniform(0, 2 * np.pi, 4)
  sizes = strength * rng.uniform(0.3, 1, 4) / np.arange(1, 5)
  return tuple(complex(c) for c in sizes * np.exp(1j * turns))


def scene_layers(
    rng: np.random.Generator, label: int, size: tuple[int, int]
) -> list[Layer]:
  """A random scene whose main object, segment 1, shows pattern `label`.

  All draws are made in the same order for each label: the same generator gives
  the same scene with another pattern.
  """
  half = np.array(size[::-1]) / min(size) * (_SIDE / 2)
  background = Layer(
      translation=_heading(rng, 0.5, 3.0),
      rotation=rng.uniform(-0.04, 0.04),
      log_zoom=rng.uniform(-0.04, 0.04),
      color=rng.uniform(0.3, 0.7, 3),
      **_waves(rng, 24, (12.0, 44.0), 0.14, 0.6),
  )
  radius = rng.uniform(23, 28)
  main = Layer(
      segment=1,
      center=tuple(rng.uniform(-1, 1, 2) * (half - 26)),
      translation=_heading(rng, 2.5, 7.0),
      rotation=rng.uniform(-0.1, 0.1),
      log_zoom=rng.uniform(-0.05, 0.05),
      radius=radius,
      harmonics=_harmonics(rng, 0.12),
      color=rng.uniform(0.35, 0.65, 3),
      # Mostly a step in brightness: it survives the loss of colour.
      contrast=rng.choice((-1, 1))
      * rng.uniform(0.24, 0.32)
      * rng.uniform(0.5, 1.4, 3),
      pattern=CLASS_NAMES[label],
      period=rng.uniform(7.5, 10.5),
      angle=rng.uniform(0, 2 * np.pi),
      offset=rng.random(2),
      bend=tuple(rng.uniform(0, 2 * np.pi, 2)),
      # Broad shading: a pattern repeats, and alone would match at many places.
      **_waves(rng, 12, (16.0, 44.0), 0.08, 0.8),
  )
  others = []
  for segment in range(2, 2 + rng.integers(0, 3)):
    others.append(
        Layer(
            segment=segment,
            center=tuple(rng.uniform(-1, 1, 2) * (half - 4)),
            translation=_heading(rng, 2.0, 8.0),
            rotation=rng.uniform(-0.2, 0.2),
            log_zoom=rng.uniform(-0.08, 0.08),
            radius=rng.uniform(5, 8),
            harmonics=_harmonics(rng, 0.12),
            color=rng.uniform(0.2, 0.8, 3),
            **_waves(rng, 12, (10.0, 24.0), 0.12, 0.6),
        )
    )
  behind = int(rng.integers(0, len(others) + 1))
  return [background, *others[:behind], main, *others[behind:]]


def _check(size: tuple[int, int], seed: int, num_examples: int):
  faults = [
      f"synthetic {key}: expected at least {least}, got {value}"
      for key, value, least in (
          ("height", size[0], 16),
          ("width", size[1], 16),
          ("seed", seed, 0),
          ("num_examples", num_examples, 1),
      )
      if value < least
  ]
  if faults:
    raise errors.UserError(*faults)


def _sample(
    size: tuple[int, int], seed: int, index: int
) -> tuple[list[Layer], int]:
  """The layers and the label of one scene.

  Each run of NUM_CLASSES indices holds every class once, in an order of its
  own.
  """
  block, place = divmod(index, NUM_CLASSES)
  # The last entry keeps the order's generator apart from those of the scenes.
  order = np.random.default_rng((seed, block, 1)).permutation(NUM_CLASSES)
  label = int(order[place])
  rng = np.random.default_rng((seed, index))
  return scene_layers(rng, label, size), label


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
  """Pairs of frames with flow and masks both ways; see the module's text."""

  size: tuple[int, int] = (64, 64)
  seed: int
  num_examples: int

  def __post_init__(self):
    _check(self.size, self.seed, self.num_examples)

  def __len__(self) -> int:
    return self.num_examples

  def record_id(self, i: int) -> str:
    """A name that no other scene of this size has."""
    return f"synthetic/{self.seed}/{range(len(self))[i]}"

  def __getitem__(self, i: int) -> dict[str, np.ndarray | int]:
    """Frames u8 [h w 3], flows f32 [h w 2], masks f32 [h w 1] and the rest.

    `flow` and `valid` are what an evaluation reads: flow_12, on every pixel.
    """
    layers, label = _sample(self.size, self.seed, range(len(self))[i])
    scene = render(layers, self.size)
    frame_1, frame_2 = scene["images"]
    flow_12, flow_21 = scene["flows"]
    visible_1, visible_2 = scene["visible"]
    return {
        "frame_1": frame_1,
        "frame_2": frame_2,
        "flow_12": flow_12,
        "flow_21": flow_21,
        "visible_1": visible_1,
        "visible_2": visible_2,
        "flow": flow_12,
        "valid": np.ones_like(visible_1),
        "segments_1": scene["segments"][0],
        "label": label,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
  """Single images with a class: frame 1 of the pair with the same index."""

  size: tuple[int, int] = (64, 64)
  seed: int
  num_examples: int

  def __post_init__(self):
    _check(self.size, self.seed, self.num_examples)

  def __len__(self) -> int:
    return self.num_examples

  def record_id(self, i: int) -> str:
    """A name that no other scene of this size has."""
    return f"synthetic/{self.seed}/{range(len(self))[i]}"

  def __getitem__(self, i: int) -> dict[str, np.ndarray | int | tuple | float]:
    """Image u8 [h w 3], label, and the main object's place in pixels.

    `center` is (x, y), `extent` the mean diameter of the silhouette.
    """
    layers, label = _sample(self.size, self.seed, range(len(self))[i])
    main = next(layer for layer in layers if layer.segment == 1)
    scale = min(self.size) / _SIDE
    x, y = main.to_image()[0, :2, 2] * scale
    height, width = self.size
    return {
        "image": render(layers, self.size, num_frames=1)["images"][0],
        "label": label,
        "center": (float(x + (width - 1) / 2), float(y + (height - 1) / 2)),
        "extent": 2 * main.radius * scale * math.exp(-main.log_zoom / 2),
    }
