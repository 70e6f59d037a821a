"""Images decode to Pillow's pixels, whichever decoder takes them."""

import io

import numpy as np
from PIL import Image
import pytest

from mcjepa_jax import errors
from mcjepa_jax.data.readers import image_files
from mcjepa_jax.errors import UserError


def _image(height=60, width=91, seed=0):
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
  return Image.fromarray(small).resize((width, height))


def _jpeg(image, **options):
  file = io.BytesIO()
  image.save(file, "JPEG", **options)
  return file.getvalue()


def _pillow(data, min_side=None):
  with Image.open(io.BytesIO(data)) as image:
    if min_side:
      image.draft("RGB", (min_side, min_side))
    return np.asarray(image.convert("RGB"))


@pytest.fixture
def without_pillow(monkeypatch):
  """Makes Pillow's decoder a fault."""

  def refuse(*_, **__):
    raise AssertionError("Pillow was asked")

  monkeypatch.setattr(image_files.Image, "open", refuse)


def test_what_a_signal_raises_meanwhile_is_no_fault_of_the_image(monkeypatch):
  def interrupted(*_, **__):
    raise errors.Stop(errors.EXIT_PREEMPTED, "SIGTERM")

  monkeypatch.setattr(image_files.Image, "open", interrupted)
  with pytest.raises(errors.Stop, match="SIGTERM"):
    image_files.decode_image(b"BM", "a.bmp")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_decode_to_pillows_pixels_without_it(
    mode, progressive, subsampling, monkeypatch, request
):
  data = _jpeg(
      _image().convert(mode), progressive=progressive, subsampling=subsampling
  )
  expected = _pillow(data)
  request.getfixturevalue("without_pillow")
  np.testing.assert_array_equal(image_files.decode_image(data, "a"), expected)


@pytest.mark.parametrize("min_side", [300, 151, 150, 75, 40, 37, 1])
def test_reduced_jpegs_have_pillows_size_and_pixels(min_side):
  data = _jpeg(_image(301, 437))
  ours = image_files.decode_image(data, "a", min_side=min_side)
  expected = _pillow(data, min_side)
  assert ours.shape == expected.shape
  assert min(ours.shape[:2]) >= min_side
  np.testing.assert_allclose(ours.astype(int), expected, atol=2)


def test_cmyk_is_left_to_pillow():
  data = _jpeg(_image().convert("CMYK"))
  np.testing.assert_array_equal(
      image_files.decode_image(data, "a"), _pillow(data)
  )


def test_a_jpeg_that_pillow_forgives_decodes_as_there():
  data = _jpeg(_image())
  # Bytes after the last pixel, which a strict decoder refuses.
  data = data[:-2] + b"\x12\x34" + data[-2:]
  with pytest.raises(ValueError):
    image_files.simplejpeg.decode_jpeg(data)
  np.testing.assert_array_equal(
      image_files.decode_image(data, "a"), _pillow(data)
  )


def test_a_jpeg_that_claims_more_than_it_holds_allocates_nothing(monkeypatch):
  data = bytearray(_jpeg(_image()))
  frame = data.index(b"\xff\xc0") + 5
  data[frame : frame + 4] = b"\xea\x60\xea\x60"  # 60000 x 60000
  monkeypatch.setattr(
      image_files.simplejpeg,
      "decode_jpeg",
      lambda *_, **__: pytest.fail("decoded"),
  )
  for limit in (2**26, 2**40):
    with pytest.raises(
        UserError, match="a.jpg: expected at most .* 60000x60000"
    ):
      image_files.decode_image(bytes(data), "a.jpg", max_pixels=limit)


@pytest.mark.parametrize("cut", [1, 2, 3, 20, 400])
def test_cut_and_empty_jpegs_are_the_users_fault(cut):
  data = _jpeg(_image())
  with pytest.raises(UserError, match="a.jpg"):
    image_files.decode_image(data[:cut], "a.jpg")


@pytest.mark.parametrize("header", [b"P6\n91 60\n255\n", b"P6 \n91 60 \n255\n"])
def test_plain_ppms_decode_without_pillow(header, without_pillow):
  pixels = np.asarray(_image())
  ours = image_files.decode_image(header + pixels.tobytes(), "a")
  np.testing.assert_array_equal(ours, pixels)
  ours[0] = 0  # not a view of the file


@pytest.mark.parametrize(
    "header",
    [b"P6\n# made\n91 60\n255\n", b"P6\n91 60\n127\n", b"P6\n91 60\n255\n"],
)
@pytest.mark.parametrize("more", [b"", b"\n"])
def test_other_ppms_are_as_pillow_has_them(header, more):
  pixels = np.asarray(_image()) // 3
  data = header + pixels.tobytes() + more
  np.testing.assert_array_equal(
      image_files.decode_image(data, "a"), _pillow(data)
  )


def test_a_ppm_of_a_lying_header_is_refused():
  for header in (b"P6\n91 61\n255\n", b"P6\n0 60\n255\n"):
    with pytest.raises(UserError, match="a.ppm"):
      image_files.decode_image(header + bytes(91 * 60 * 3), "a.ppm")
  with pytest.raises(UserError, match="999 pixels.* came 91x60"):
    image_files.decode_image(
        b"P6\n91 60\n255\n" + bytes(91 * 60 * 3), "a.ppm", max_pixels=999
    )
