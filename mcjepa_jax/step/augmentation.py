"""Photometric augmentation on the device, of NHWC batches in [0, 1].

The arithmetic is torchvision's on float tensors, clipping included. Every
example draws from its own key, fold_in(key, its index in the global batch), so
results do not depend on the number of devices. A probability or a strength that
is 0 in Python is not computed at all. `indices` are the indices of a part of a
batch, which draws what it would in the whole.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

_BLENDS = ("brightness", "contrast", "saturation")
# Blur sigmas are meant for views of this height and scale with theirs.
_REFERENCE_SIZE = 224


def _luma(
    planes: tuple[Float[Array, "n h w"], ...],
) -> Float[Array, "n h w"]:
  red, green, blue = planes
  return 0.2989 * red + 0.587 * green + 0.114 * blue


def _planes(
    images: Float[Array, "n h w 3"],
) -> tuple[Float[Array, "n h w"], ...]:
  # On CPU the same arithmetic on NHWC compiles badly before a blur:
  # content_views takes 216 ms, and 18 on planes (128 views of 64x64, two busy
  # cores). Alone the jitter is as fast in either form.
  return images[..., 0], images[..., 1], images[..., 2]


def grayscale(images: Float[Array, "n h w 3"]) -> Float[Array, "n h w 1"]:
  """Returns the luma 0.2989 r + 0.587 g + 0.114 b."""
  return _luma(_planes(images))[..., None]


def solarize(
    images: Float[Array, "n h w 3"], *, threshold: float = 0.5
) -> Float[Array, "n h w 3"]:
  """Returns the images with every value from `threshold` on inverted."""
  return jnp.where(images >= threshold, 1 - images, images)


def gaussian_blur(
    images: Float[Array, "n h w 3"], sigma: Float[Array, " n"], *, radius: int
) -> Float[Array, "n h w 3"]:
  """Returns each image blurred by its own sigma: 2 radius + 1 taps, reflected.

  The taps sum to one, so a small radius truncates without darkening.
  """
  taps = jnp.arange(-radius, radius + 1)
  kernel = jax.nn.softmax(-0.5 * (taps / sigma[:, None]) ** 2, axis=-1)
  for axis in (1, 2):
    pad = [(0, 0)] * 4
    pad[axis] = (radius, radius)
    padded = jnp.pad(images, pad, mode="reflect")
    images = sum(
        kernel[:, k, None, None, None]
        * jax.lax.slice_in_dim(padded, k, k + images.shape[axis], axis=axis)
        for k in range(2 * radius + 1)
    )
  return images


def _shift_hue(
    planes: tuple[Float[Array, "n h w"], ...], shift: Float[Array, " n"]
) -> tuple[Float[Array, "n h w"], ...]:
  """Returns the planes with the hue moved by `shift` turns.

  Back from HSV by channel = v - v s clip(min(k, 4 - k), 0, 1) with
  k = (offset + 6 hue) mod 6; v s is the chroma max - min, so the saturation and
  its division never appear.
  """
  red, green, blue = planes
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  scale = 1 / jnp.where(chroma == 0, 1.0, chroma)
  # Not `value == red`: a compiler that computes red twice, rounded in two ways,
  # can make the largest channel equal to none. At a tie the branches agree.
  hue = jnp.where(
      (red >= green) & (red >= blue),
      (green - blue) * scale,
      jnp.where(
          green >= blue, 2 + (blue - red) * scale, 4 + (red - green) * scale
      ),
  )
  hue = hue + 6 * shift[:, None, None]

  def channel(offset):
    # jnp.fmod and jnp.mod call the library for each element on CPU: with fmod
    # the shift takes 24 ms instead of 3 (128 images of 64x64).
    k = hue + offset
    k = k - 6 * jnp.floor(k / 6)
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  return channel(5), channel(3), channel(1)


def adjust_color(
    images: Float[Array, "n h w 3"],
    amounts: dict[str, Float[Array, " n"]],
    ranks: dict[str, Float[Array, " n"]],
    *,
    group: int = 1,
) -> Float[Array, "n h w 3"]:
  """Returns the images adjusted by each of `amounts`, lowest rank first.

  Names are brightness, contrast, saturation (factors, 1 changes nothing) and
  hue (turns, 0 changes nothing); a name that is absent is not computed. The
  first three are one formula, clip(f x + (1 - f) target) with target 0, the
  mean luma or the luma. `group` neighbours share the contrast's mean, so that
  one colour stays one colour in all of them.

  Every example has its own order, yet no operation is tried at every position:
  the blends run in rank order twice, before the hue and after it, and a blend
  that belongs to the other run has factor 1, which is exact. That is 6 blends
  and 1 hue, where a choice among four at four positions is 16 operations: 13 ms
  against 41 for 128 images of 64x64 on two busy CPU cores. One order for the
  whole batch takes 7 ms, but then the examples of a step are no longer
  independent draws.
  """
  blends = [name for name in _BLENDS if name in amounts]
  planes = _planes(images)
  if blends:
    rank = jnp.stack([ranks[name] for name in blends], axis=1)
    factor = jnp.stack([amounts[name] for name in blends], axis=1)
    order = jnp.argsort(rank, axis=1)
    rank = jnp.take_along_axis(rank, order, axis=1)
    factor = jnp.take_along_axis(factor, order, axis=1)

  def run(planes, active):
    for turn in range(len(blends)):
      here = jnp.where(active[:, turn], factor[:, turn], 1.0)[:, None, None]
      name = order[:, turn, None, None]
      luma = _luma(planes)
      target = jnp.zeros_like(luma)
      if "contrast" in blends:
        mean = luma.mean(axis=(1, 2)).reshape(-1, group).mean(axis=1)
        mean = jnp.repeat(mean, group)[:, None, None]
        target = jnp.where(name == blends.index("contrast"), mean, target)
      if "saturation" in blends:
        target = jnp.where(name == blends.index("saturation"), luma, target)
      target = (1 - here) * target
      planes = tuple(jnp.clip(here * x + target, 0, 1) for x in planes)
    return planes

  if "hue" not in amounts:
    if blends:
      planes = run(planes, jnp.ones(rank.shape, bool))
  elif not blends:
    planes = _shift_hue(planes, amounts["hue"])
  else:
    before = rank < ranks["hue"][:, None]
    planes = _shift_hue(run(planes, before), amounts["hue"])
    planes = run(planes, ~before)
  return jnp.stack(planes, axis=-1)


def _keys(key: Key[Array, ""], indices: Int[Array, " n"]) -> Key[Array, " n"]:
  return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def _all(images: Float[Array, "n h w 3"]) -> Int[Array, " n"]:
  return jnp.arange(images.shape[0])


def _uniform(keys: Key[Array, " n"], count: int) -> list[Float[Array, " n"]]:
  draw = jax.vmap(lambda key: jax.random.uniform(key, (count,)))
  return list(draw(keys).T)


def _chosen(
    draw: Float[Array, " n"], probability: float | Float[Array, " n"]
) -> Bool[Array, "n 1 1 1"]:
  return (draw < probability)[:, None, None, None]


def color_jitter(
    images: Float[Array, "n h w 3"],
    key: Key[Array, ""],
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.2,
    hue: float = 0.1,
    probability: float = 0.8,
    group: int = 1,
    indices: Int[Array, " n"] | None = None,
) -> Float[Array, "n h w 3"]:
  """Returns the images jittered in colour, in random order, with `probability`.

  Factors are U(max(0, 1 - strength), 1 + strength), the hue moves by
  U(-hue, hue) turns. `group` neighbours share one draw.
  """
  strengths = dict(
      brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
  )
  indices = _all(images) if indices is None else indices
  draws = _uniform(_keys(key, indices[::group] // group), 9)
  draws = [jnp.repeat(draw, group) for draw in draws]
  amounts, ranks = {}, {}
  for i, (name, strength) in enumerate(strengths.items()):
    if strength == 0:
      continue
    low, high = (-strength, strength)
    if name != "hue":
      low, high = max(0.0, 1 - strength), 1 + strength
    amounts[name] = low + (high - low) * draws[i]
    ranks[name] = draws[4 + i]
  if probability == 0 or not amounts:
    return images
  jittered = adjust_color(images, amounts, ranks, group=group)
  return jnp.where(_chosen(draws[8], probability), jittered, images)


def content_views(
    views: UInt8[Array, "n h w 3"],
    key: Key[Array, ""],
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.2,
    hue: float = 0.1,
    jitter_probability: float = 0.8,
    gray_probability: float = 0.2,
    blur_probability: tuple[float, float] = (1.0, 0.1),
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarize_probability: tuple[float, float] = (0.0, 0.2),
    solarize_threshold: float = 0.5,
    indices: Int[Array, " n"] | None = None,
) -> Float[Array, "n h w 3"]:
  """Returns interleaved views augmented by VICReg's recipe, in [0, 1].

  Jitter, grayscale, blur, solarise, in this order. Pairs of probabilities are
  for view 1, the even entries, and view 2, the odd ones. Sigma is uniform in
  `blur_sigma`, in pixels of a view 224 high, and scales with the height; the
  blur's radius is ceil(3 sigma) of the largest sigma: 6 at 224, 2 at 64.
  """
  images = views.astype(jnp.float32) / 255
  height = views.shape[1]
  indices = _all(images) if indices is None else indices
  jitter_key, rest_key = jax.random.split(key)
  images = color_jitter(
      images,
      jitter_key,
      brightness=brightness,
      contrast=contrast,
      saturation=saturation,
      hue=hue,
      probability=jitter_probability,
      indices=indices,
  )
  gray, blur, solar, sigma = _uniform(_keys(rest_key, indices), 4)
  view_2 = indices % 2

  def per_view(probabilities):
    return jnp.where(view_2, probabilities[1], probabilities[0])

  if gray_probability:
    images = jnp.where(
        _chosen(gray, gray_probability), grayscale(images), images
    )
  if any(blur_probability):
    low, high = (s * height / _REFERENCE_SIZE for s in blur_sigma)
    blurred = gaussian_blur(
        images, low + (high - low) * sigma, radius=math.ceil(3 * high)
    )
    images = jnp.where(
        _chosen(blur, per_view(blur_probability)), blurred, images
    )
  if any(solarize_probability):
    images = jnp.where(
        _chosen(solar, per_view(solarize_probability)),
        solarize(images, threshold=solarize_threshold),
        images,
    )
  return images


def _erase(
    images: Float[Array, "n h w 3"],
    key: Key[Array, ""],
    probability: float,
    size: tuple[float, float],
    indices: Int[Array, " n"],
) -> Float[Array, "n h w 3"]:
  """Returns the images, a rectangle of odd entries filled with their mean."""
  height, width = images.shape[1:3]
  chosen, *draws = _uniform(_keys(key, indices), 5)
  x, y, w, h = (draw[:, None, None, None] for draw in draws)
  low, high = (s * height for s in size)
  rows = jnp.abs(jnp.arange(height)[:, None, None] - y * height)
  columns = jnp.abs(jnp.arange(width)[:, None] - x * width)
  inside = (rows <= (low + (high - low) * h) / 2) & (
      columns <= (low + (high - low) * w) / 2
  )
  odd = indices % 2
  mean = images.mean(axis=(1, 2), keepdims=True)
  return jnp.where(_chosen(chosen, probability * odd) & inside, mean, images)


def motion_frames(
    frames: UInt8[Array, "n h w 3"],
    key: Key[Array, ""],
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.2,
    hue: float = 0.1,
    jitter_probability: float = 0.8,
    erase_probability: float = 0.0,
    erase_size: tuple[float, float] = (0.15, 0.3),
    indices: Int[Array, " n"] | None = None,
) -> tuple[Float[Array, "n h w 3"], Float[Array, "n h w 3"]]:
  """Returns interleaved frames in [0, 1], plain and jittered.

  Both frames of a pair get the same jitter, the contrast's mean included: one
  colour in both stays one colour in both. With `erase_probability` a rectangle
  of frame 2, sides U(erase_size) times the height, gets the frame's mean colour
  in the jittered frames (RAFT, arXiv 2003.12039).
  """
  plain = frames.astype(jnp.float32) / 255
  indices = _all(plain) if indices is None else indices
  jitter_key, erase_key = jax.random.split(key)
  jittered = color_jitter(
      plain,
      jitter_key,
      brightness=brightness,
      contrast=contrast,
      saturation=saturation,
      hue=hue,
      probability=jitter_probability,
      group=2,
      indices=indices,
  )
  if erase_probability:
    jittered = _erase(
        jittered, erase_key, erase_probability, erase_size, indices
    )
  return plain, jittered
