"""Photometry against torchvision, and the rules of who shares which draw."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
import torch

from mcjepa_jax.step import augmentation

_TOLERANCE = 1e-5
_NAMES = ("brightness", "contrast", "saturation", "hue")
_OFF = dict(
    jitter_probability=0.0,
    gray_probability=0.0,
    blur_probability=(0.0, 0.0),
    solarize_probability=(0.0, 0.0),
)


@pytest.fixture(scope="module")
def torchvision():
  """torchvision's functions, also where its compiled operators are missing."""
  try:
    import torchvision  # noqa: F401
  except (RuntimeError, AttributeError):
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
  return pytest.importorskip("torchvision.transforms.functional")


@functools.cache
def _images(count=6, height=12, width=10):
  """Random colours, grays, saturated corners: every branch of the hue."""
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(count, height, width, 3)).astype(np.float32)
  images[:, 0] = images[:, 0, :, :1]
  corners = list(itertools.product((0.0, 1.0), repeat=3))
  images[:, 1, :8] = corners
  return jnp.asarray(images)


def _bytes(count=6, **size):
  return jnp.round(255 * _images(count, **size)).astype(jnp.uint8)


def _theirs(function, image, *args):
  chw = torch.tensor(np.asarray(image)).permute(2, 0, 1)
  return function(chw, *args).permute(1, 2, 0).numpy()


def _full(value, count=6):
  return jnp.full((count,), value, jnp.float32)


def _run(function, images, seed=0, **recipe):
  # One compilation instead of one for each eager operation.
  function = functools.partial(getattr(augmentation, function), **recipe)
  return jax.jit(function)(images, jax.random.key(seed))


@functools.partial(jax.jit, static_argnames="group")
def _adjust(images, amounts, ranks, group=1):
  return augmentation.adjust_color(images, amounts, ranks, group=group)


@pytest.mark.parametrize(
    ("name", "amount"),
    [*itertools.product(_NAMES[:3], (0.0, 0.3, 1.0, 1.7))]
    + [("hue", amount) for amount in (-0.45, -0.1, 0.0, 0.3, 0.5)],
)
def test_each_adjustment_alone_is_torchvisions(torchvision, name, amount):
  ours = _adjust(_images(), {name: _full(amount)}, {name: _full(0.0)})
  adjust = getattr(torchvision, f"adjust_{name}")
  for image, result in zip(_images(), ours, strict=True):
    expected = _theirs(adjust, image, amount)
    np.testing.assert_allclose(result, expected, atol=_TOLERANCE)


def test_all_orders_in_one_batch_are_torchvisions(torchvision):
  orders = list(itertools.permutations(range(4)))
  images = _images(len(orders))
  rng = np.random.default_rng(1)
  amounts = rng.uniform(
      (0.4, 0.4, 0.3, -0.3), (1.8, 1.8, 1.9, 0.3), (len(orders), 4)
  ).astype(np.float32)
  ranks = np.argsort(orders, axis=1).astype(np.float32)
  ours = _adjust(
      images,
      {name: amounts[:, i] for i, name in enumerate(_NAMES)},
      {name: ranks[:, i] for i, name in enumerate(_NAMES)},
  )
  for i, order in enumerate(orders):
    expected = images[i]
    for j in order:
      adjust = getattr(torchvision, f"adjust_{_NAMES[j]}")
      expected = _theirs(adjust, expected, float(amounts[i, j]))
    # A hue is ill-conditioned where a clip has left nearly no chroma.
    np.testing.assert_allclose(ours[i], expected, atol=1 / 255, err_msg=order)
    assert np.mean(np.abs(ours[i] - expected)) < _TOLERANCE, order


def test_grayscale_and_solarize_are_torchvisions(torchvision):
  # The threshold itself is inverted.
  image = _images()[0].at[3].set(0.5).at[4].set(0.75)
  np.testing.assert_allclose(
      augmentation.grayscale(image[None])[0],
      _theirs(torchvision.rgb_to_grayscale, image),
      atol=_TOLERANCE,
  )
  np.testing.assert_array_equal(
      augmentation.solarize(image[None], threshold=0.75)[0],
      _theirs(torchvision.solarize, image, 0.75),
  )


def test_blur_is_torchvisions_with_a_sigma_per_image(torchvision):
  sigma = jnp.array([0.1, 0.3, 0.7, 1.0, 1.5, 2.0])
  ours = augmentation.gaussian_blur(_images(), sigma, radius=3)
  for image, width, result in zip(_images(), sigma, ours, strict=True):
    expected = _theirs(
        torchvision.gaussian_blur, image, [7, 7], [float(width)] * 2
    )
    np.testing.assert_allclose(result, expected, atol=_TOLERANCE)


@pytest.mark.parametrize("group", [1, 2])
def test_jitter_draws_uniform_factors_for_the_stated_share(group):
  images = jnp.full((4000, 1, 1, 3), 0.25)
  ours = _run(
      "color_jitter",
      images,
      brightness=0.4,
      contrast=0.0,
      saturation=0.0,
      hue=0.0,
      probability=0.8,
      group=group,
  )
  factor = np.asarray(ours)[:, 0, 0, 0].reshape(-1, group) / 0.25
  np.testing.assert_array_equal(factor, np.tile(factor[:, :1], group))
  changed = factor[np.abs(factor[:, 0] - 1) > 1e-6, 0]
  assert changed.size / len(factor) == pytest.approx(0.8, abs=0.03)
  quantiles = np.quantile(changed, [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(quantiles, [0.6, 0.8, 1, 1.2, 1.4], atol=0.03)


def test_hue_moves_both_ways_by_at_most_its_strength():
  images = jnp.tile(jnp.array([1, 0.5, 0]), (2000, 1, 1, 1))
  ours = _run(
      "color_jitter",
      images,
      brightness=0.0,
      contrast=0.0,
      saturation=0.0,
      hue=0.05,
      probability=1.0,
  )
  # Between red and yellow the hue is green / 6.
  turns = np.asarray(ours)[:, 0, 0, 1] / 6 - 0.5 / 6
  quantiles = np.quantile(turns, [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(
      quantiles, [-0.05, -0.025, 0, 0.025, 0.05], atol=0.005
  )


def test_every_order_is_equally_likely_whatever_the_amounts(monkeypatch):
  drawn = {}

  def capture(images, amounts, ranks, *, group):
    drawn.update(amounts=amounts, ranks=ranks)
    return images

  monkeypatch.setattr(augmentation, "adjust_color", capture)
  augmentation.color_jitter(jnp.zeros((6000, 1, 1, 3)), jax.random.key(3))
  ranks = np.stack([drawn["ranks"][name] for name in _NAMES], axis=1)
  _, counts = np.unique(np.argsort(ranks, axis=1), axis=0, return_counts=True)
  assert counts.size == 24
  np.testing.assert_allclose(counts / 6000, 1 / 24, atol=0.01)
  for name, middle, most in zip(
      _NAMES, (1, 1, 1, 0), (0.4, 0.4, 0.2, 0.1), strict=True
  ):
    quantiles = np.quantile(drawn["amounts"][name], [0, 0.25, 0.5, 0.75, 1])
    expected = middle + most * np.linspace(-1, 1, 5)
    np.testing.assert_allclose(quantiles, expected, atol=0.05 * most)
  draws = np.stack([*drawn["amounts"].values(), *ranks.T])
  correlation = np.corrcoef(draws) - np.eye(8)
  assert np.abs(correlation).max() < 0.06


def test_both_frames_of_a_pair_get_the_same_colour_map():
  # Frame 2 holds every colour of frame 1's lower half, and others above it, so
  # that a contrast around each frame's own mean would differ.
  frames = _bytes(8)
  frames = frames.at[1::2, 6:].set(frames[::2, 6:])
  plain, jittered = _run("motion_frames", frames, jitter_probability=1.0)
  np.testing.assert_allclose(plain, frames / 255, atol=1e-7)
  np.testing.assert_allclose(
      jittered[::2, 6:], jittered[1::2, 6:], atol=_TOLERANCE
  )
  assert np.abs(jittered - plain).max() > 0.05
  change = np.abs(jittered - plain).mean(axis=(1, 2, 3))[::2]
  assert np.unique(np.round(change, 5)).size == 4


def test_contrast_of_a_pair_is_around_the_mean_of_both_frames():
  frames = jnp.stack([jnp.full((2, 2, 3), 0.2), jnp.full((2, 2, 3), 0.4)])
  ours = _adjust(
      frames, {"contrast": _full(0.0, 2)}, {"contrast": _full(0.0, 2)}, 2
  )
  np.testing.assert_allclose(ours, 0.3, atol=1e-4)


def test_eraser_is_off_by_default_and_fills_frame_2_alone():
  frames = _bytes(64)
  off = dict(jitter_probability=0.0)
  plain, same = _run("motion_frames", frames, **off)
  np.testing.assert_array_equal(plain, same)
  plain, erased = _run("motion_frames", frames, erase_probability=0.5, **off)
  differs = np.any(plain != erased, axis=-1)
  assert not differs[::2].any()
  hit = differs[1::2].any(axis=(1, 2))
  assert 8 <= hit.sum() <= 24
  i = 2 * np.flatnonzero(hit)[0] + 1
  mean = plain[i].mean(axis=(0, 1))
  filled = np.asarray(erased[i])[differs[i]]
  np.testing.assert_allclose(
      filled, np.tile(mean, (len(filled), 1)), atol=_TOLERANCE
  )


def test_sigma_is_uniform_in_its_range(monkeypatch):
  drawn = {}

  def capture(images, sigma, *, radius):
    drawn.update(sigma=sigma, radius=radius)
    return images

  monkeypatch.setattr(augmentation, "gaussian_blur", capture)
  views = jnp.zeros((2000, 224, 1, 3), jnp.uint8)
  off = {k: v for k, v in _OFF.items() if k != "blur_probability"}
  augmentation.content_views(views, jax.random.key(4), **off)
  quantiles = np.quantile(drawn["sigma"], [0, 0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(quantiles, np.linspace(0.1, 2.0, 5), atol=0.06)
  assert drawn["radius"] == 6


def test_erased_rectangles_are_torchvisions_of_every_size_and_place(
    torchvision,
):
  side = 64
  frames = _bytes(800, height=side, width=side)
  plain, erased = _run(
      "motion_frames", frames, jitter_probability=0.0, erase_probability=1.0
  )
  plain, erased = np.asarray(plain[1::2]), np.asarray(erased[1::2])
  boxes = []
  for image, result in zip(plain, erased, strict=True):
    rows, columns = np.nonzero((image != result).any(axis=-1))
    top, left = rows.min(), columns.min()
    height, width = rows.max() - top + 1, columns.max() - left + 1
    boxes.append((top, left, height, width))
    mean = torch.tensor(image.mean(axis=(0, 1)))[:, None, None]
    expected = _theirs(torchvision.erase, image, top, left, height, width, mean)
    np.testing.assert_allclose(result, expected, atol=_TOLERANCE)
  top, left, height, width = np.array(boxes).T / side
  y, x = top + height / 2, left + width / 2
  # None is cut off whose centre lies so far inside.
  far = (np.abs(y - 0.5) < 0.3) & (np.abs(x - 0.5) < 0.3)
  assert far.mean() == pytest.approx(0.36, abs=0.08)
  for draws, low, high in (
      *((height, 0.15, 0.3), (width, 0.15, 0.3)),
      *((y, 0.2, 0.8), (x, 0.2, 0.8)),
  ):
    quantiles = np.quantile(draws[far], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(
        quantiles, np.linspace(low, high, 5), atol=0.15 * (high - low)
    )
  assert (
      np.abs(
          np.corrcoef(np.stack([height, width, y, x])[:, far]) - np.eye(4)
      ).max()
      < 0.3
  )


def test_view_1_is_always_blurred_and_never_solarized():
  # A step edge of 100 and 200 of 255: blur makes values between them, solarise
  # turns 200 into 55.
  views = jnp.full((2000, 8, 8, 3), 100, jnp.uint8).at[:, :, 4:].set(200)
  recipe = _OFF | dict(
      blur_probability=(1.0, 0.1),
      blur_sigma=(28.0, 28.0),
      solarize_probability=(0.0, 0.2),
  )
  out = _run("content_views", views, **recipe)
  out = np.round(255 * np.asarray(out)[:, 0, :, 0])
  # The radius of 3 reaches neither the first column nor the last.
  blurred = np.abs(out[:, 3] - 100) > 1
  solarized = np.abs(out[:, 7] - 200) > 1
  assert blurred[::2].all() and not solarized[::2].any()
  assert blurred[1::2].mean() == pytest.approx(0.1, abs=0.03)
  assert solarized[1::2].mean() == pytest.approx(0.2, abs=0.04)


def test_blur_scales_with_the_view():
  views = _bytes(2, height=56, width=56)
  recipe = _OFF | dict(blur_probability=(1.0, 1.0), blur_sigma=(4.0, 4.0))
  out = _run("content_views", views, **recipe)
  expected = augmentation.gaussian_blur(
      views.astype(jnp.float32) / 255, _full(1.0, 2), radius=3
  )
  np.testing.assert_allclose(out, expected, atol=_TOLERANCE)


def test_gray_takes_its_share_of_both_views():
  views = jnp.tile(jnp.array([200, 100, 0], jnp.uint8), (2000, 1, 1, 1))
  out = _run("content_views", views, **_OFF | dict(gray_probability=0.2))
  out = np.asarray(out)[:, 0, 0]
  gray = out[:, 0] == out[:, 2]
  for view in (0, 1):
    assert gray[view::2].mean() == pytest.approx(0.2, abs=0.04)
  np.testing.assert_allclose(
      255 * out[gray][0], np.full(3, 0.2989 * 200 + 0.587 * 100), atol=1e-3
  )


def test_recipe_of_zeros_computes_nothing():
  def compute(views, key):
    return augmentation.content_views(views, key, **_OFF)

  views = _bytes(2)
  text = jax.jit(compute).lower(views, jax.random.key(0)).compile().as_text()
  # Neither a draw nor a comparison is left of an augmentation.
  assert "compare" not in text and "xor" not in text
  np.testing.assert_allclose(
      compute(views, jax.random.key(0)), views / 255, atol=1e-7
  )


def test_views_depend_on_key_and_index_alone():
  views = _bytes(16)
  augment = jax.jit(augmentation.content_views)
  out = augment(views, jax.random.key(0))
  assert out.min() >= 0 and out.max() <= 1
  # The first examples of a batch do not see how many follow.
  part = augment(views[:4], jax.random.key(0))
  np.testing.assert_allclose(out[:4], part, atol=_TOLERANCE)
  other = augment(views, jax.random.key(1))
  assert np.abs(out - other).max(axis=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("function", ["content_views", "motion_frames"])
def test_result_does_not_depend_on_the_number_of_devices(function):
  views = _bytes(16)
  augment = jax.jit(getattr(augmentation, function))
  alone = augment(views, jax.random.key(0))
  mesh = jax.make_mesh(
      (8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharded = jax.device_put(views, NamedSharding(mesh, PartitionSpec("batch")))
  together = augment(sharded, jax.random.key(0))
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=_TOLERANCE),
      alone,
      together,
  )
