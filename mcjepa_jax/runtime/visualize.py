"""Pictures as uint8 arrays [h w 3]: flow, features, grids, curves.

Flow is (u right, v down) in pixels. Images come as uint8, or as float in [0, 1].
"""

from collections.abc import Sequence
import math
import pathlib

from jaxtyping import Float, Shaped, UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Middlebury's colour wheel (Baker et al., IJCV 2011): the steps between red,
# yellow, green, cyan, blue and magenta, more where the eye tells more apart.
_WHEEL_STEPS = (15, 6, 4, 11, 13, 6)
_WHEEL_CORNERS = (
    (255, 0, 0),
    (255, 255, 0),
    (0, 255, 0),
    (0, 255, 255),
    (0, 0, 255),
    (255, 0, 255),
)
# Middlebury marks unknown flow by 1e9 or more.
_UNKNOWN_FLOW = 1e9
_GAP = 2
_FONT_SIZE = 10
_LINE_COLORS = (
    (31, 98, 180),
    (214, 96, 20),
    (30, 140, 70),
    (190, 40, 60),
    (120, 80, 170),
    (110, 110, 110),
)


def color_wheel() -> Float[np.ndarray, "55 3"]:
  """Returns Middlebury's 55 colours, from red, in [0, 255]."""
  parts = []
  for i, steps in enumerate(_WHEEL_STEPS):
    start = np.array(_WHEEL_CORNERS[i], float)
    change = np.array(_WHEEL_CORNERS[(i + 1) % 6]) - start
    # Truncated as a magnitude, also where a channel falls.
    ramp = np.floor(255 * np.arange(steps) / steps)[:, None]
    parts.append(start + change / 255 * ramp)
  return np.concatenate(parts)


def flow_to_color(
    flow: Shaped[np.ndarray, "*n h w 2"], *, max_flow: float | None = None
) -> UInt8[np.ndarray, "*n h w 3"]:
  """Returns Middlebury's colours: hue is direction, saturation is length.

  White is no motion, red is right, yellow-green down, cyan-blue left, violet up.
  Length is relative to `max_flow`, by default the longest vector; longer ones
  are darkened. Unknown flow (not finite, or 1e9 and more) is black.
  """
  flow = np.asarray(flow, np.float64)
  known = (np.abs(flow) < _UNKNOWN_FLOW).all(axis=-1, keepdims=True)
  flow = np.where(known, flow, 0)
  length = np.linalg.norm(flow, axis=-1, keepdims=True)
  length = length / max(max_flow or length.max(initial=0), 1e-9)
  wheel = color_wheel()
  angle = np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi
  position = (angle + 1) / 2 * (len(wheel) - 1)
  low = np.floor(position).astype(int)
  part = (position - low)[..., None]
  color = (1 - part) * wheel[low] + part * wheel[(low + 1) % len(wheel)]
  color = np.where(length <= 1, 255 - length * (255 - color), 0.75 * color)
  return np.where(known, np.floor(color), 0).astype(np.uint8)


def to_uint8(image: Shaped[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
  """Returns uint8 as it is, and floats in [0, 1] scaled to 0..255."""
  image = np.asarray(image)
  if image.dtype == np.uint8:
    return image
  return np.round(255 * np.clip(image.astype(float), 0, 1)).astype(np.uint8)


def warp(
    image: Shaped[np.ndarray, "h w 3"], flow: Shaped[np.ndarray, "h w 2"]
) -> Float[np.ndarray, "h w 3"]:
  """Returns image(p + flow(p)), bilinear, black outside the image."""
  height, width = image.shape[:2]
  y, x = np.mgrid[:height, :width]
  x, y = x + flow[..., 0], y + flow[..., 1]
  inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
  x, y = np.where(inside, x, 0), np.where(inside, y, 0)
  left = np.minimum(x.astype(int), max(width - 2, 0))
  top = np.minimum(y.astype(int), max(height - 2, 0))
  right = np.minimum(left + 1, width - 1)
  bottom = np.minimum(top + 1, height - 1)
  x, y = (x - left)[..., None], (y - top)[..., None]
  upper = (1 - x) * image[top, left] + x * image[top, right]
  lower = (1 - x) * image[bottom, left] + x * image[bottom, right]
  return ((1 - y) * upper + y * lower) * inside[..., None]


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
  return ImageFont.load_default(_FONT_SIZE)


def _labelled(
    image: UInt8[np.ndarray, "h w 3"], text: str
) -> UInt8[np.ndarray, "h2 w 3"]:
  strip = Image.new("RGB", (image.shape[1], _FONT_SIZE + 4), "white")
  ImageDraw.Draw(strip).text((2, 1), text, fill="black", font=_font())
  return np.concatenate([np.asarray(strip), image])


def enlarge(
    images: Shaped[np.ndarray, "n h w c"], scale: int
) -> Shaped[np.ndarray, "n hs ws c"]:
  """Returns the images with each pixel repeated `scale` times both ways."""
  return images.repeat(scale, axis=1).repeat(scale, axis=2)


def flow_panel(
    frame_1: Shaped[np.ndarray, "h w 3"],
    frame_2: Shaped[np.ndarray, "h w 3"],
    flow: Shaped[np.ndarray, "h w 2"],
    truth: Shaped[np.ndarray, "h w 2"] | None = None,
    visible: (
        Shaped[np.ndarray, "h w"] | Shaped[np.ndarray, "h w 1"] | None
    ) = None,
    scale: int = 1,
) -> UInt8[np.ndarray, "r c 3"]:
  """Returns one labelled strip of a pair and its flow_12.

  Frame 1, frame 2, frame 2 warped to frame 1 (black where the flow leaves the
  image), flow, then the true flow and the visible mask where given. Both flows
  have one colour scale, the truth's longest vector if there is one. Each pixel
  is shown as `scale` by `scale`.
  """
  longest = flow if truth is None else truth
  length = np.linalg.norm(np.asarray(longest, np.float64), axis=-1)
  known = np.isfinite(length) & (length < _UNKNOWN_FLOW)
  max_flow = float(length.max(initial=0, where=known)) or 1.0
  frame_1, frame_2 = to_uint8(frame_1), to_uint8(frame_2)
  warped = np.round(warp(frame_2, flow)).astype(np.uint8)
  tiles = {
      "frame 1": frame_1,
      "frame 2": frame_2,
      "warped": warped,
      f"flow {max_flow:.3g} px": flow_to_color(flow, max_flow=max_flow),
  }
  if truth is not None:
    tiles["true flow"] = flow_to_color(truth, max_flow=max_flow)
  if visible is not None:
    mask = to_uint8(visible.reshape(*frame_1.shape[:2], 1).astype(float))
    tiles["visible"] = np.repeat(mask, 3, axis=-1)
  images = enlarge(np.stack(list(tiles.values())), scale)
  return labelled_grid(images, list(tiles), len(tiles))


def labelled_grid(
    images: UInt8[np.ndarray, "n h w 3"], labels: Sequence[str], columns: int
) -> UInt8[np.ndarray, "r c 3"]:
  """Returns the images as `grid` does, each with its label above it."""
  labelled = [_labelled(*item) for item in zip(images, labels, strict=True)]
  return grid(np.stack(labelled), columns)


def feature_pca(
    features: Shaped[np.ndarray, "n h w c"],
) -> UInt8[np.ndarray, "n h w 3"]:
  """Returns the first three principal components as red, green and blue.

  The components are those of all positions of all images together, so that a
  colour means the same in each. Each is scaled by its 1st to 99th percentile;
  its sign makes the largest loading positive. No variance gives gray.
  """
  samples = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
  samples = samples - samples.mean(axis=0)
  # eigh on c x c, ascending: positions are many more than channels.
  _, vectors = np.linalg.eigh(samples.T @ samples)
  vectors = vectors[:, ::-1][:, :3]
  largest = np.abs(vectors).argmax(axis=0)
  vectors = vectors * np.where(
      vectors[largest, np.arange(vectors.shape[1])] < 0, -1, 1
  )
  scores = samples @ vectors
  scores = np.pad(scores, ((0, 0), (0, 3 - scores.shape[1])))
  low, high = np.percentile(scores, (1, 99), axis=0)
  flat = high - low <= 1e-9
  scores = (scores - low) / np.where(flat, 1, high - low)
  return to_uint8(np.where(flat, 0.5, scores)).reshape(*features.shape[:-1], 3)


def grid(
    images: Shaped[np.ndarray, "n h w 3"], columns: int
) -> UInt8[np.ndarray, "r c 3"]:
  """Returns the images row by row in `columns` columns on white."""
  images = to_uint8(images)
  count, height, width = images.shape[:3]
  rows = math.ceil(count / columns)
  tall, wide = height + _GAP, width + _GAP
  sheet = np.full((rows * tall - _GAP, columns * wide - _GAP, 3), 255, np.uint8)
  for i, image in enumerate(images):
    top, left = i // columns * tall, i % columns * wide
    sheet[top : top + height, left : left + width] = image
  return sheet


def save_png(
    path: str | pathlib.Path, image: Shaped[np.ndarray, "h w 3"]
) -> None:
  """Writes the image as PNG, its folder too."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(to_uint8(image)).save(path, format="PNG")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Returns about `count` multiples of 1, 2 or 5 times 10^k in [low, high]."""
  raw = (high - low) / max(count, 1)
  power = 10.0 ** math.floor(math.log10(raw))
  step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def _span(values: list[np.ndarray]) -> tuple[float, float]:
  values = np.concatenate([np.ravel(v) for v in values] or [np.zeros(0)])
  values = values[np.isfinite(values)]
  if not values.size:
    return 0.0, 1.0
  low, high = float(values.min()), float(values.max())
  if high - low <= 1e-12 * max(abs(low), abs(high), 1):
    low, high = low - 0.5, high + 0.5
  return low, high


def _short(value: float) -> str:
  for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.4g}{suffix}"
  return f"{value:.4g}"


def curves(
    series: dict[str, tuple[np.ndarray, np.ndarray]],
    size: tuple[int, int] = (320, 480),
    *,
    title: str = "",
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns a plot of name -> (steps, values), `size` is (height, width).

  Linear axes; a value that is not finite breaks its line; the legend is in
  the order of `series`.
  """
  height, width = size
  data = {
      name: (np.asarray(x, np.float64), np.asarray(y, np.float64))
      for name, (x, y) in series.items()
  }
  x_low, x_high = _span([x for x, _ in data.values()])
  y_low, y_high = _span([y for _, y in data.values()])
  y_low, y_high = (
      y_low - 0.04 * (y_high - y_low),
      y_high + 0.04 * (y_high - y_low),
  )
  font = _font()
  x_ticks = ticks(x_low, x_high, max(2, width // 90))
  y_ticks = ticks(y_low, y_high, max(2, height // 50))
  left = 8 + max(round(font.getlength(_short(v))) for v in y_ticks)
  right, bottom = width - 14, height - _FONT_SIZE - 10
  line = _FONT_SIZE + 4
  top = 6 + line * (bool(title) + bool(data))

  def place(x, y):
    return (
        left + (x - x_low) / (x_high - x_low) * (right - left),
        bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
    )

  # Lines are drawn four times too large and reduced, which smooths them; text
  # is drawn afterwards at its own size, which keeps it sharp.
  zoom = 4
  canvas = Image.new("RGB", (width * zoom, height * zoom), "white")
  draw = ImageDraw.Draw(canvas)

  def stroke(points, color, thickness):
    points = [(zoom * x, zoom * y) for x, y in points]
    if len(points) == 1:
      ((x, y),) = points
      draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=color)
    else:
      draw.line(points, fill=color, width=thickness, joint="curve")

  for value in y_ticks:
    stroke([place(x_low, value), place(x_high, value)], (226, 226, 226), 4)
  stroke([(left, top), (left, bottom), (right, bottom)], (70, 70, 70), 4)
  for i, (x, y) in enumerate(data.values()):
    finite = np.isfinite(x) & np.isfinite(y)
    edges = np.flatnonzero(np.diff(np.r_[False, finite, False].astype(int)))
    for start, end in edges.reshape(-1, 2):
      points = [place(*p) for p in zip(x[start:end], y[start:end], strict=True)]
      stroke(points, _LINE_COLORS[i % len(_LINE_COLORS)], 6)
  canvas = canvas.resize((width, height), Image.Resampling.BOX)

  draw = ImageDraw.Draw(canvas)
  for value in y_ticks:
    spot = (left - 4, place(x_low, value)[1])
    draw.text(spot, _short(value), "black", font, anchor="rm")
  for value in x_ticks:
    spot = (place(value, y_low)[0], bottom + 4)
    draw.text(spot, _short(value), "black", font, anchor="mt")
  if title:
    draw.text(((left + right) / 2, 4), title, "black", font, anchor="mt")
  x = left + 6
  for i, name in enumerate(data):
    color = _LINE_COLORS[i % len(_LINE_COLORS)]
    y = top - line / 2
    draw.line((x, y, x + 12, y), fill=color, width=2)
    draw.text((x + 15, y), name, "black", font, anchor="lm")
    x += 27 + round(font.getlength(name))
  return np.asarray(canvas)
