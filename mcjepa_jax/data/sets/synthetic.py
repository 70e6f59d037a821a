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

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
from typing import Any

from jaxtyping import Float, Int, UInt8
import numpy as np

from mcjepa_jax import errors

# Scene units per shorter side of the image.
SIDE = 64
# A transition this wide keeps silhouettes free of aliases, so that interpolating
# one frame along the flow gives the other.
_SILHOUETTE_EDGE = 0.4

# A class is the direction of a texture's waves and their length in scene units,
# "coarse_woven" for one; a mirrored pattern keeps its class. Many waves of free
# phase, spread over the class's band, make each pattern one of a kind, so that
# raw pixels say little of the class.
_DIRECTIONS = {  # of the wave, x towards y, in radians
    "horizontal": (math.pi / 2,),  # stripes that run from left to right
    "vertical": (0.0,),
    "woven": (0.0, math.pi / 2),
    "diagonal": (math.pi / 4, 3 * math.pi / 4),
    "blotchy": (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4),
}
_WAVELENGTHS = {"fine": (5.0, 6.4), "coarse": (8.0, 12.0)}
PATTERNS = {
    f"{scale}_{direction}": (_DIRECTIONS[direction], _WAVELENGTHS[scale])
    for direction in _DIRECTIONS
    for scale in _WAVELENGTHS
}
CLASS_NAMES = tuple(PATTERNS)
NUM_CLASSES = len(CLASS_NAMES)

Plane = Float[np.ndarray, "t h w"]
Points = Float[np.ndarray, "2 t h w"]
Window = tuple[slice, slice]  # rows and columns of both frames
WHOLE = (slice(None), slice(None))


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
  # Paint: color + contrast tanh(the pattern's waves) + the shading's waves, with
  # waves sum_k amplitude_k cos(wave_k p + phase_k).
  color: Float[np.ndarray, "3"]
  contrast: Float[np.ndarray, "3"] | None = None
  # The same three fields as the shading's below, with amplitudes [k 1].
  pattern: dict[str, np.ndarray] | None = None
  waves: Float[np.ndarray, "k 2"]  # radians per unit
  phases: Float[np.ndarray, "k"]
  amplitudes: Float[np.ndarray, "k 3"]
  # Name of the layer in `segments_1`.
  segment: int = 0

  def to_image(self) -> Float[np.ndarray, "2 3 3"]:
    """Homogeneous maps from the layer to the image, for each frame."""
    return similarities(
        self.center, self.translation, self.rotation, self.log_zoom
    )


def similarities(
    center: tuple[float, float],
    translation: tuple[float, float],
    rotation: float,
    log_zoom: float,
) -> Float[np.ndarray, "2 3 3"]:
  """Homogeneous maps from a layer to the image, for each frame."""
  maps = np.zeros((2, 3, 3))
  for frame, time in enumerate((-0.5, 0.5)):
    zoom = math.exp(time * log_zoom)
    cos = zoom * math.cos(time * rotation)
    sin = zoom * math.sin(time * rotation)
    x = center[0] + time * translation[0]
    y = center[1] + time * translation[1]
    maps[frame] = ((cos, -sin, x), (sin, cos, y), (0, 0, 1))
  return maps


def affine(
    maps: Float[np.ndarray, "t 3 3"], points: Float[np.ndarray, "2 *t h w"]
) -> Points:
  """Points under one map per frame, components first."""
  m = maps.astype(np.float32)[:, :, :, None, None]
  x, y = points
  return np.stack(
      (
          m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2],
          m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2],
      )
  )


def depth_inside(
    radius: float, harmonics: Sequence[complex], points: Points
) -> Plane:
  """Distance to a silhouette, positive inside; exact where it is zero."""
  x, y = points
  rho = np.sqrt(x * x + y * y) + np.float32(1e-6)
  unit = (x + 1j * y) / rho
  boundary = np.ones_like(rho)
  power = unit
  for c in harmonics:
    power = power * unit
    boundary += (np.complex64(c) * power).real
  return np.float32(radius) * boundary - rho


def _sum_of_waves(
    waves: Float[np.ndarray, "k 2"],
    phases: Float[np.ndarray, "k"],
    amplitudes: Float[np.ndarray, "k c"],
    to_layer: Float[np.ndarray, "t 3 3"],
    grid: Float[np.ndarray, "2 h w"],
) -> Float[np.ndarray, "t c h w"]:
  """The waves of a layer seen in each frame.

  cos(a x + b y + c) = cos(a x) cos(b y + c) - sin(a x) sin(b y + c): on a grid
  the sum over the waves is one matrix product.
  """
  x, y = grid[0, 0], grid[1, :, 0]
  a, b, c = np.moveaxis(waves @ to_layer[:, :2], -1, 0)
  row = (b[:, None] * y[:, None] + (c + phases)[:, None]).astype("f4")
  column = (a[:, :, None] * x).astype("f4")
  rows = np.concatenate((np.cos(row), -np.sin(row)), -1)
  columns = np.concatenate((np.cos(column), np.sin(column)), 1)
  weights = np.tile(amplitudes.astype("f4"), (2, 1)).T
  left = weights[:, None] * rows[:, None]
  return left @ columns[:, None]


def paint(
    layer: Layer,
    to_layer: Float[np.ndarray, "t 3 3"],
    grid: Float[np.ndarray, "2 h w"],
) -> Float[np.ndarray, "t 3 h w"]:
  """Colours, 0 to 1, of the whole plane of the layer at the grid's points."""
  image = _sum_of_waves(
      layer.waves, layer.phases, layer.amplitudes, to_layer, grid
  )
  image += layer.color.astype("f4")[:, None, None]
  if layer.pattern is not None:
    value = np.tanh(
        _sum_of_waves(**layer.pattern, to_layer=to_layer, grid=grid)
    )
    image += layer.contrast.astype("f4")[:, None, None] * value
  return image


def scene_grid(
    size: tuple[int, int],
) -> tuple[Float[np.ndarray, "2 h w"], float]:
  """The pixels' places in scene units, and pixels per unit."""
  height, width = size
  scale = min(size) / SIDE
  grid = np.stack(
      np.meshgrid(
          (np.arange(width) - (width - 1) / 2) / scale,
          (np.arange(height) - (height - 1) / 2) / scale,
      )
  ).astype("f4")
  return grid, scale


def composite(
    painted: Iterable[
        tuple[
            Window,
            Float[np.ndarray, "t 3 _ _"],
            Float[np.ndarray, "t _ _"] | None,
        ]
    ],
    *,
    edge: float,
) -> tuple[UInt8[np.ndarray, "t h w 3"], Int[np.ndarray, "t h w"]]:
  """The frames, and the number of the layer that owns each pixel.

  Each layer has a window that holds it, and there its colours, 0 to 1, and its
  depth inside the silhouette (the first one none); they come back to front.
  `edge` is the silhouettes' width in units.
  """
  image = owner = None
  for k, (window, colors, depth) in enumerate(painted):
    if image is None:
      image = colors
      owner = np.zeros((len(image), *image.shape[2:]), np.int32)
      continue
    alpha = 0.5 + 0.5 * np.tanh(depth / np.float32(edge))
    part = image[:, :, *window]
    part += alpha[:, None] * (colors - part)
    owner[:, *window][depth > 0] = k
  image = np.clip(255 * image + 0.5, 0, 255).astype(np.uint8)
  return np.ascontiguousarray(np.moveaxis(image, 1, -1)), owner


def exact_flow(
    owner: Int[np.ndarray, "2 h w"],
    moved: Sequence[tuple[Window, Float[np.ndarray, "2 2 _ _"]]],
    depth: Callable[[int, Points], Plane],
    grid: Float[np.ndarray, "2 h w"],
    scale: float,
) -> dict[str, np.ndarray]:
  """{"flows": f32 [2 h w 2], "visible": f32 [2 h w 1]}, for each frame.

  `moved` is, for each layer, a window that holds it and where it carries those
  points in the other frame; `depth(k, p)` the depth inside layer k of points in
  the other frame.
  """
  target = np.empty((2, *owner.shape), np.float32)
  for k, (window, points) in enumerate(moved):
    np.copyto(target[:, :, *window], points, where=owner[:, *window] == k)
  visible = np.ones_like(owner, bool)
  for k in range(1, len(moved)):
    visible &= (owner >= k) | (depth(k, target) <= 0)
  # Half of the image: the grid's last point.
  limit = np.array(owner.shape[:0:-1], np.float32) - 1
  limit /= np.float32(2 * scale)
  visible &= (np.abs(target) <= limit[:, None, None, None]).all(0)
  flow = (target - grid[:, None]) * np.float32(scale)
  return {
      "flows": np.ascontiguousarray(np.moveaxis(flow, 0, -1)),
      "visible": visible.astype(np.float32)[..., None],
  }


def render(
    layers: Sequence[Layer], size: tuple[int, int], *, num_frames: int = 2
) -> dict[str, np.ndarray]:
  """The frames of `layers` (back to front, the first one without a silhouette).

  Returns {"images": u8 [t h w 3], "segments": i32 [t h w]} and, for two frames,
  {"flows": f32 [2 h w 2], "visible": f32 [2 h w 1]}.
  """
  grid, scale = scene_grid(size)
  to_image = [layer.to_image()[:num_frames] for layer in layers]
  to_layer = [np.linalg.inv(maps) for maps in to_image]

  def depth(k, points, maps):
    return depth_inside(
        layers[k].radius, layers[k].harmonics, affine(maps, points)
    )

  painted = (
      (
          WHOLE,
          paint(layer, to_layer[k], grid),
          depth(k, grid, to_layer[k]) if k else None,
      )
      for k, layer in enumerate(layers)
  )
  images, owner = composite(painted, edge=_SILHOUETTE_EDGE)
  names = np.array([layer.segment for layer in layers], np.int32)
  scene = {"images": images, "segments": names[owner]}
  if num_frames == 1:
    return scene

  # The map of frame 1 into frame 2 and its inverse.
  moved = [
      (WHOLE, affine(to_image[k][::-1] @ to_layer[k], grid))
      for k in range(len(layers))
  ]
  return scene | exact_flow(
      owner, moved, lambda k, p: depth(k, p, to_layer[k][::-1]), grid, scale
  )


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


def draw_pattern(
    rng: np.random.Generator, name: str, count: int = 24
) -> dict[str, np.ndarray]:
  """The waves of a class's pattern, of unit variance before tanh."""
  directions, (shortest, longest) = PATTERNS[name]
  spread = 0.5 if len(directions) == 1 else 0.25  # radians
  turn = np.resize(directions, count) + spread * rng.uniform(-1, 1, count)
  frequency = 2 * np.pi / rng.uniform(shortest, longest, count)
  return dict(
      waves=frequency[:, None] * np.stack((np.cos(turn), np.sin(turn)), -1),
      phases=rng.uniform(0, 2 * np.pi, count),
      amplitudes=np.full((count, 1), math.sqrt(2 / count)),
  )


def heading(
    rng: np.random.Generator, slowest: float, fastest: float
) -> tuple[float, float]:
  """A translation of uniform direction and uniform length."""
  turn, speed = rng.uniform(0, 2 * np.pi), rng.uniform(slowest, fastest)
  return speed * math.cos(turn), speed * math.sin(turn)


def random_harmonics(rng: np.random.Generator, strength: float) -> tuple:
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
  half = np.array(size[::-1]) / min(size) * (SIDE / 2)
  background = Layer(
      translation=heading(rng, 0.5, 3.0),
      rotation=rng.uniform(-0.04, 0.04),
      log_zoom=rng.uniform(-0.04, 0.04),
      color=rng.uniform(0.3, 0.7, 3),
      **_waves(rng, 24, (10.0, 36.0), 0.2, 0.8),
  )
  radius = rng.uniform(23, 28)
  main = Layer(
      segment=1,
      center=tuple(rng.uniform(-1, 1, 2) * (half - 26)),
      translation=heading(rng, 2.5, 7.0),
      rotation=rng.uniform(-0.1, 0.1),
      log_zoom=rng.uniform(-0.05, 0.05),
      radius=radius,
      harmonics=random_harmonics(rng, 0.12),
      color=rng.uniform(0.3, 0.7, 3),
      # Mostly in brightness: it survives the loss of colour.
      contrast=rng.uniform(0.2, 0.34) * rng.uniform(0.5, 1.4, 3),
      pattern=draw_pattern(rng, CLASS_NAMES[label]),
      # Broad shading: a pattern alone would match at many places.
      **_waves(rng, 12, (24.0, 64.0), 0.18, 0.8),
  )
  others = []
  for segment in range(2, 2 + rng.integers(0, 3)):
    others.append(
        Layer(
            segment=segment,
            center=tuple(rng.uniform(-1, 1, 2) * (half - 4)),
            translation=heading(rng, 2.0, 8.0),
            rotation=rng.uniform(-0.2, 0.2),
            log_zoom=rng.uniform(-0.08, 0.08),
            radius=rng.uniform(5, 8),
            harmonics=random_harmonics(rng, 0.12),
            color=rng.uniform(0.2, 0.8, 3),
            **_waves(rng, 12, (10.0, 24.0), 0.12, 0.6),
        )
    )
  behind = int(rng.integers(0, len(others) + 1))
  return [background, *others[:behind], main, *others[behind:]]


def check(
    kind: str, size: tuple[int, int], seed: int, num_examples: int, *others: str
):
  """Raises UserError for what no set of scenes can have, and other faults."""
  faults = [
      f"{kind} {key}: expected at least {least}, got {value}"
      for key, value, least in (
          ("height", size[0], 16),
          ("width", size[1], 16),
          ("seed", seed, 0),
          ("num_examples", num_examples, 1),
      )
      if value < least
  ]
  if faults or others:
    raise errors.UserError(*faults, *others)


def _sample(
    size: tuple[int, int], seed: int, index: int
) -> tuple[list[Layer], int]:
  """The layers and the label of one scene.

  Each run of NUM_CLASSES indices holds every class once, in an order of its
  own.
  """
  block, number = divmod(index, NUM_CLASSES)
  # The last entry keeps the order's generator apart from those of the scenes.
  order = np.random.default_rng((seed, block, 1)).permutation(NUM_CLASSES)
  label = int(order[number])
  rng = np.random.default_rng((seed, index))
  return scene_layers(rng, label, size), label


def example(scene: dict[str, Any]) -> dict[str, Any]:
  """What a pair set returns of a rendered scene."""
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
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
  """Pairs of frames with flow and masks both ways; see the module's text."""

  size: tuple[int, int] = (64, 64)
  seed: int
  num_examples: int

  def __post_init__(self):
    check("synthetic", self.size, self.seed, self.num_examples)

  def __len__(self) -> int:
    return self.num_examples

  def record_id(self, i: int) -> str:
    """A name that no other scene of this size has."""
    return f"{self.seed}/{range(len(self))[i]}"

  def __getitem__(self, i: int) -> dict[str, np.ndarray | int]:
    """Frames u8 [h w 3], flows f32 [h w 2], masks f32 [h w 1] and the rest.

    `flow` and `valid` are what an evaluation reads: flow_12, on every pixel.
    """
    layers, label = _sample(self.size, self.seed, range(len(self))[i])
    return example(render(layers, self.size)) | {"label": label}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
  """Single images with a class: frame 1 of the pair with the same index."""

  size: tuple[int, int] = (64, 64)
  seed: int
  num_examples: int

  @property
  def classes(self) -> list[str]:
    """The classes' names, as sets of files have them."""
    return [str(label) for label in range(NUM_CLASSES)]

  def __post_init__(self):
    check("synthetic", self.size, self.seed, self.num_examples)

  def __len__(self) -> int:
    return self.num_examples

  def record_id(self, i: int) -> str:
    """A name that no other scene of this size has."""
    return f"{self.seed}/{range(len(self))[i]}"

  def __getitem__(self, i: int) -> dict[str, np.ndarray | int | tuple | float]:
    """Image u8 [h w 3], label, and the main object's place in pixels.

    `center` is (x, y), `extent` the mean diameter of the silhouette.
    """
    layers, label = _sample(self.size, self.seed, range(len(self))[i])
    main = next(layer for layer in layers if layer.segment == 1)
    scale = min(self.size) / SIDE
    x, y = main.to_image()[0, :2, 2] * scale
    height, width = self.size
    return {
        "image": render(layers, self.size, num_frames=1)["images"][0],
        "label": label,
        "center": (float(x + (width - 1) / 2), float(y + (height - 1) / 2)),
        "extent": 2 * main.radius * scale * math.exp(-main.log_zoom / 2),
    }
