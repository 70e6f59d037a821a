"""Pairs with exact flow out of any images: cut-outs that move over a photograph.

A scene is a function of (seed, index) and of the images alone. It lives in the
units of `synthetic`, 1/64 of the image's shorter side with the origin at the
centre, and its masks mean what they mean there.

A layer is flat at the scene's reference time; half of its motion lies before
that and half after. The motion is a chain of ripples, then an affine map. A
ripple pushes each point along a line, by a sine of the place across that line:
p + a sin(f n p + phase) m with m at right angles to n. As n p stays what it is,
the same ripple with -a undoes it: every map is exact both ways, whatever the
amplitude, and no equation is solved.

Each layer's photograph is reduced once, antialiased, to a texture of two texels
a pixel of the frames, and both frames sample that texture.
"""

from collections.abc import Iterable
import dataclasses
import math
from typing import Any

import cv2
from jaxtyping import Float, UInt8
import numpy as np

from mcjepa_jax import errors
from mcjepa_jax.data.pipeline import geometry
from mcjepa_jax.data.sets import synthetic
from mcjepa_jax.storage import paths

_ATTEMPTS = 10  # photographs tried in the place of one that cannot be read
_TEXELS = 2  # a pixel of the frames, each way
# The aperture of a pixel, in texels: without it what is finer than the frames'
# own grid would alias, and differently in each frame.
_BLUR = 1.2
_EDGE = 0.5  # width of a silhouette in pixels
# Most motion that is not translation: radians, and logarithms of a size. The
# texture has the detail of the reference time, which a strong zoom would show.
_MOST_TURN = 0.35
_MOST_ZOOM = 0.15
_MOST_STRETCH = 0.15
# Amplitude times frequency of a ripple: its shear.
_MOST_SHEAR = 0.3
_RIPPLES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """A piece of a photograph and its motion between the frames."""

  photograph: int = 0  # index of the image
  # The piece is this share of the largest that the photograph holds, at this
  # place of those that it may have, 0 to 1 from left and top.
  share: float = 1.0
  place: tuple[float, float] = (0.5, 0.5)
  # As in synthetic.Layer.
  center: tuple[float, float] = (0.0, 0.0)
  translation: tuple[float, float] = (0.0, 0.0)
  rotation: float = 0.0
  log_zoom: float = 0.0
  radius: float | None = None
  harmonics: tuple[complex, ...] = ()
  # Straight cuts through the silhouette: (turn of the normal, distance of the
  # line from the centre) of each.
  cuts: tuple[tuple[float, float], ...] = ()
  # Grows by exp(stretch) along this direction, shrinks as much across it.
  stretch: float = 0.0
  stretch_turn: float = 0.0
  # (turn of n, frequency in radians per unit, phase, amplitude) of each.
  ripples: tuple[tuple[float, float, float, float], ...] = ()

  @property
  def extent(self) -> float:
    """Distance from the centre that the silhouette does not pass."""
    return self.radius * (1 + sum(map(abs, self.harmonics)))

  def to_image(self) -> Float[np.ndarray, "2 3 3"]:
    """Homogeneous maps from the rippled layer to the image, for each frame."""
    maps = synthetic.similarities(
        self.center, self.translation, self.rotation, self.log_zoom
    )
    cos, sin = math.cos(2 * self.stretch_turn), math.sin(2 * self.stretch_turn)
    axis = np.array(((cos, sin), (sin, -cos)))
    for frame, half in enumerate((-self.stretch / 2, self.stretch / 2)):
      maps[frame, :2, :2] @= (
          math.cosh(half) * np.eye(2) + math.sinh(half) * axis
      )
    return maps


def _rippled(
    ripples: Iterable[tuple[float, float, float, float]],
    points: synthetic.Points,
    times: Float[np.ndarray, "t 1 1"],
) -> synthetic.Points:
  """A layer's points pushed by its ripples, `times` of their amplitude."""
  x, y = points
  for turn, frequency, phase, amplitude in ripples:
    cos, sin = math.cos(turn), math.sin(turn)
    wave = np.float32(frequency * cos) * x + np.float32(frequency * sin) * y
    push = np.sin(wave + np.float32(phase)) * (times * np.float32(amplitude))
    x, y = x - np.float32(sin) * push, y + np.float32(cos) * push
  return np.stack((x, y))


class _Motion:
  """The maps between the frames and one layer."""

  def __init__(self, layer: Layer):
    self._layer = layer
    self._to_image = layer.to_image()
    self._to_layer = np.linalg.inv(self._to_image)
    self._times = np.array((-0.5, 0.5), np.float32)[:, None, None]

  def window(self, points, margin: float, step: int = 1) -> synthetic.Window:
    """The rows and columns with points, as to_layer's, in or near the layer."""
    layer = self._layer
    if layer.radius is None:
      return synthetic.WHOLE
    growth = math.exp((abs(layer.log_zoom) + abs(layer.stretch)) / 2)
    ripples = sum(abs(ripple[3]) for ripple in layer.ripples) / 2
    reach = growth * (layer.extent + ripples) + margin
    centers = self._to_image[::step, :2, 2].T.astype("f4")[..., None, None]
    near = (np.abs(points - centers) <= reach).all(0).any(0)
    rows, columns = near.any(1).nonzero()[0], near.any(0).nonzero()[0]
    if not rows.size:
      return slice(0, 1), slice(0, 1)  # one pixel shows as little of it as none
    return tuple(slice(int(x[0]), int(x[-1]) + 1) for x in (rows, columns))

  def to_layer(self, points, step: int = 1) -> synthetic.Points:
    """Points of frames 1 and 2, or with step -1 of 2 and 1, in the layer."""
    points = synthetic.affine(self._to_layer[::step], points)
    return _rippled(self._layer.ripples[::-1], points, -self._times[::step])

  def to_frames(self, points, step: int = 1) -> synthetic.Points:
    """Points of the layer in frames 1 and 2, or with step -1 in 2 and 1."""
    points = _rippled(self._layer.ripples, points, self._times[::step])
    return synthetic.affine(self._to_image[::step], points)


def _depth_inside(layer: Layer, local: synthetic.Points) -> synthetic.Plane:
  """Distance to the cut silhouette, as synthetic.depth_inside."""
  depth = synthetic.depth_inside(layer.radius, layer.harmonics, local)
  x, y = local
  for turn, distance in layer.cuts:
    along = np.float32(math.cos(turn)) * x + np.float32(math.sin(turn)) * y
    depth = np.minimum(depth, np.float32(distance) - along)
  return depth


def _texture(
    layer: Layer,
    photograph: UInt8[np.ndarray, "hp wp 3"],
    low: Float[np.ndarray, "2"],
    high: Float[np.ndarray, "2"],
    scale: float,
) -> Float[np.ndarray, "r c 3"]:
  """The layer from `low` to `high` (x, y, in units), 0 to 1.

  A photograph that is too small is shown whole and enlarged.
  """
  extent = high - low
  held = np.array(photograph.shape[1::-1])
  largest = (held / extent).min()  # photograph's pixels a unit
  share = min(1.0, max(layer.share, scale / largest))
  piece = np.clip(np.rint(extent * largest * share).astype(int), 1, held)
  left, top = np.rint((held - piece) * layer.place).astype(int).tolist()
  width, height = piece.tolist()
  columns, rows = np.ceil(extent * scale * _TEXELS).astype(int).tolist()
  texels = geometry.resample(
      photograph, (top, left, height, width), (rows, columns)
  )
  return cv2.GaussianBlur(texels.astype(np.float32) / 255, (0, 0), _BLUR)


class _Photographs:
  """Images; in the place of one that cannot be read the next that can be.

  `faults` tell, as (record, fault), what was replaced.
  """

  def __init__(self, images: Any):
    self._images = images
    self.faults: list[tuple[str, str]] = []

  def __getitem__(self, index: int) -> dict[str, Any]:
    for attempt in range(_ATTEMPTS):
      other = (index + attempt) % len(self._images)
      try:
        return self._images[other]
      except paths.Unreachable:
        raise
      except errors.UserError as error:
        fault = "; ".join(error.messages)
        self.faults.append((self._images.record_id(other), fault))
    raise errors.UserError(*dict(self.faults).values())


def _paint(
    layer: Layer,
    photograph: UInt8[np.ndarray, "hp wp 3"],
    local: synthetic.Points,
    scale: float,
) -> Float[np.ndarray, "t 3 h w"]:
  """Colours, 0 to 1, of the layer's points."""
  if layer.radius is None:
    low, high = local.min((1, 2, 3)), local.max((1, 2, 3))
  else:
    low, high = np.full((2, 2), layer.extent, "f4") * ((-1,), (1,))
  # Whole texels, and enough of them for the blur and the silhouette's edge.
  margin = 4 / (_TEXELS * scale)
  low, high = low - margin, high + margin
  texture = _texture(layer, photograph, low, high, scale)
  size = np.array(texture.shape[1::-1], np.float32)[:, None, None, None]
  low, high = (v.astype("f4")[:, None, None, None] for v in (low, high))
  x, y = (local - low) * (size / (high - low)) - np.float32(0.5)
  # OpenCV's cubic kernel does not reproduce a ramp. The linear one is exact; in
  # OpenCV 4.10 it is off by up to 1/64 of a texel, 0.008 pixels.
  colors = [
      cv2.remap(
          texture, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
      )
      for maps in zip(x, y, strict=True)
  ]
  return np.moveaxis(np.stack(colors), -1, 1)


def render(
    layers: list[Layer], images: Any, size: tuple[int, int]
) -> dict[str, np.ndarray]:
  """The frames of `layers` (back to front, the first one without a silhouette).

  As synthetic.render's; element j of `images` holds photograph j as `image`.
  """
  grid, scale = synthetic.scene_grid(size)
  # A silhouette's edge is this far from nothing, in pixels.
  margin = 4 * _EDGE / scale
  motions = [_Motion(layer) for layer in layers]
  windows = [m.window(grid[:, None], margin) for m in motions]
  local = [
      m.to_layer(grid[:, *window])
      for m, window in zip(motions, windows, strict=True)
  ]
  painted = (
      (
          windows[k],
          _paint(layer, images[layer.photograph]["image"], local[k], scale),
          _depth_inside(layer, local[k]) if k else None,
      )
      for k, layer in enumerate(layers)
  )
  images, owner = synthetic.composite(painted, edge=_EDGE / scale)
  moved = [
      (window, m.to_frames(p, -1))
      for m, window, p in zip(motions, windows, local, strict=True)
  ]

  def depth(k, points):
    plane = np.full_like(points[0], -1)
    window = motions[k].window(points, 0.0, -1)
    near = motions[k].to_layer(points[:, :, *window], -1)
    plane[:, *window] = _depth_inside(layers[k], near)
    return plane

  scene = {"images": images, "segments": owner}
  return scene | synthetic.exact_flow(owner, moved, depth, grid, scale)


def _random_motion(
    rng: np.random.Generator, most: float, reach: float
) -> dict[str, Any]:
  """Motion that carries no point within `reach` farther than `most` units."""
  translation = rng.uniform(0.5, 0.9)
  shares = rng.dirichlet(np.ones(3 + _RIPPLES))
  turn, zoom, stretch, *pushes = most * (1 - translation) * shares
  signs = rng.choice((-1, 1), 3)
  ripples = []
  for push in pushes:
    frequency = 2 * math.pi / (reach * rng.uniform(1, 3))
    amplitude = min(push, _MOST_SHEAR / frequency)
    angle, phase = rng.uniform(0, 2 * math.pi, 2)
    ripples.append((angle, frequency, phase, amplitude))
  return dict(
      translation=synthetic.heading(
          rng, most * translation, most * translation
      ),
      rotation=signs[0] * min(turn / reach, _MOST_TURN),
      log_zoom=signs[1] * min(zoom / reach, _MOST_ZOOM),
      stretch=signs[2] * min(stretch / reach, _MOST_STRETCH),
      stretch_turn=rng.uniform(0, math.pi),
      ripples=tuple(ripples),
  )


def _random_cuts(
    rng: np.random.Generator, radius: float
) -> tuple[tuple[float, float], ...]:
  """None for half of the silhouettes; else up to three, not near the centre."""
  count = rng.choice((0, 0, 0, 1, 2, 3))
  turns = rng.uniform(0, 2 * math.pi, count)
  distances = radius * rng.uniform(0.4, 0.9, count)
  return tuple(zip(turns.tolist(), distances.tolist(), strict=True))


def scene_layers(
    rng: np.random.Generator,
    num_images: int,
    size: tuple[int, int],
    max_motion: float,
) -> list[Layer]:
  """A random scene; `max_motion` is relative to the image's shorter side."""
  half = np.array(size[::-1]) / min(size) * (synthetic.SIDE / 2)
  # As many for each square as wide.
  count = round(rng.uniform(2, 5.5) * half.prod() / half.min() ** 2)
  photographs = rng.choice(
      num_images, count + 1, replace=num_images <= count
  ).tolist()
  most = max_motion * synthetic.SIDE
  layers = [
      Layer(
          photograph=photographs.pop(),
          share=math.exp(rng.uniform(math.log(0.6), 0)),
          place=tuple(rng.uniform(0, 1, 2)),
          **_random_motion(
              rng, most * rng.uniform(0.1, 0.6), 1.15 * math.hypot(*half)
          ),
      )
  ]
  for photograph in photographs:
    radius = math.exp(rng.uniform(math.log(6), math.log(20)))
    layers.append(
        Layer(
            photograph=photograph,
            share=math.exp(rng.uniform(math.log(0.35), 0)),
            place=tuple(rng.uniform(0, 1, 2)),
            center=tuple(rng.uniform(-1, 1, 2) * (half - 4)),
            radius=radius,
            harmonics=synthetic.random_harmonics(rng, 0.2),
            cuts=_random_cuts(rng, radius),
            **_random_motion(rng, most * rng.uniform(0.3, 1), 1.5 * radius),
        )
    )
  return layers


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pairs of frames with flow and masks both ways; see the module's text."""

  images: Any  # a set of images: its elements hold `image`, u8 [h w 3]
  _: dataclasses.KW_ONLY
  size: tuple[int, int] = (64, 64)
  seed: int
  num_examples: int
  max_motion: float = 0.2  # no flow is longer, in shorter sides of the frame

  def __post_init__(self):
    faults = []
    if not len(self.images):
      faults.append("cutouts images: expected at least one, got none")
    if not 0 < self.max_motion <= 0.5:
      faults.append(
          "cutouts max_motion: expected above 0 and at most 0.5 of the shorter"
          f" side, got {self.max_motion}"
      )
    synthetic.check("cutouts", self.size, self.seed, self.num_examples, *faults)

  def __len__(self) -> int:
    return self.num_examples

  def record_id(self, i: int) -> str:
    """A name that no other scene of these images and this size has."""
    return f"{len(self.images)}/{self.seed}/{range(len(self))[i]}"

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    """The keys of synthetic.Pairs, without a label.

    Where photographs had to be replaced, `faults` too: (record, fault) of each.
    """
    photographs = _Photographs(self.images)
    rng = np.random.default_rng((self.seed, range(len(self))[i]))
    layers = scene_layers(rng, len(self.images), self.size, self.max_motion)
    example = synthetic.example(render(layers, photographs, self.size))
    return example | (
        {"faults": photographs.faults} if photographs.faults else {}
    )
