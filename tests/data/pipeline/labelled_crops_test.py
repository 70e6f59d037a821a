import numpy as np
import pytest

from mcjepa_jax.data.pipeline import batches, labelled_crops

_OPTIONS = dict(size=32, short_side=48, scale=(1.0, 1.0), max_share=1.0)


def _example(h=96, w=120):
  """An image whose colour is the place, and whose class goes with its column."""
  y, x = np.mgrid[:h, :w]
  image = np.stack([2 * y, 2 * x, 0 * x], axis=-1).astype(np.uint8)
  return image, (x // (w // 4)).astype(np.uint8)


def test_labels_stay_on_their_pixels():
  image, labels = _example()
  flipped = 0
  for seed in range(20):
    (crop,) = labelled_crops.random_crop(
        image, labels, np.random.default_rng(seed), **_OPTIONS
    )
    assert crop.shape == (32, 32, 4) and crop.dtype == np.uint8
    # Green is twice the column, and a class is 30 columns wide; a shift by a
    # pixel of the crop is two of the image.
    column = crop[..., 1] / 2
    centre = 30 * crop[..., 3] + 15
    assert np.abs(column - centre).max() <= 16
    flipped += int(crop[0, 0, 1] > crop[0, -1, 1])
  assert 3 < flipped < 17


def test_a_crop_is_a_function_of_its_generator():
  image, labels = _example()
  options = _OPTIONS | dict(scale=(0.5, 2.0))
  first, again, other = (
      labelled_crops.random_crop(
          image, labels, np.random.default_rng(s), **options
      )[0]
      for s in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_what_is_smaller_than_a_crop_is_padded_with_void():
  image, labels = _example(16, 20)
  (crop,) = labelled_crops.random_crop(
      image, labels, np.random.default_rng(3), **_OPTIONS | dict(short_side=0)
  )
  void = crop[..., 3] == labelled_crops.VOID
  assert void[16:].all()
  assert void[:16].sum() == 16 * 12
  assert (crop[void][:, :3] == (124, 116, 104)).all()


def test_a_crop_of_one_class_is_avoided():
  labels = np.zeros((64, 64), np.uint8)
  labels[:, 52:] = 1
  image = np.zeros((64, 64, 3), np.uint8)
  options = _OPTIONS | dict(short_side=64)

  def both(max_share):
    return sum(
        len(np.unique(labelled_crops.random_crop(
            image, labels, np.random.default_rng(seed),
            **options | dict(max_share=max_share))[0][..., 3])) == 2
        for seed in range(30)
    )  # fmt: skip

  assert both(1.0) < 18 < 25 < both(0.95)


@pytest.mark.parametrize(
    "size, short_side, wanted",
    [
        ((683, 512), 512, (683, 512)),
        ((300, 400), 150, (150, 200)),
        ((100, 1000), 50, (20, 200)),  # the long side is at most 4 short ones
        ((30, 40), 0, (30, 40)),
    ],
)
def test_images_are_fitted_into_a_box(size, short_side, wanted):
  image = np.zeros((*size, 3), np.uint8)
  assert labelled_crops.fitted(image, short_side).shape[:2] == wanted


class _Set:
  """Two images, of which the second cannot be cut alike."""

  def __len__(self):
    return 2

  def record_id(self, index):
    return f"image_{index}"

  def __getitem__(self, index):
    image, labels = _example()
    return {"image": image, "labels": labels + 4 * index}


def test_the_stream_holds_each_record_once_a_pass_with_new_crops():
  stream = batches.crop_stream("set", _Set(), batch_size=2, seed=0, **_OPTIONS)
  first, second = stream[0], stream[1]
  for part in (first, second):
    assert part.arrays["crops"].shape == (2, 32, 32, 4)
    assert sorted(part.records) == ["set/image_0", "set/image_1"]
    tops = part.arrays["crops"][..., 3].max(axis=(1, 2)) > 3
    assert tops.tolist() == [r.endswith("1") for r in part.records]
  order = np.argsort(first.records), np.argsort(second.records)
  crops_ = [p.arrays["crops"][o] for p, o in zip((first, second), order,
                                                 strict=True)]  # fmt: skip
  assert (crops_[0] != crops_[1]).any()
  with stream:
    np.testing.assert_array_equal(
        next(stream).arrays["crops"], first.arrays["crops"]
    )
