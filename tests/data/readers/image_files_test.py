"""Images decode to Pillow's pixels, whichever decoder takes them."""

import contextlib
import io
import tracemalloc

import cv2
import numpy as np
from PIL import Image
import pytest

from mcjepa_jax import errors
from mcjepa_jax.data.readers import image_files
from mcjepa_jax.errors import UserError
from tests.helpers import png_files


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
  picture = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
  path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
  picture.save(path)
  image = image_files.read_image(path)
  assert image.shape == (4, 6, 3)
  assert (image >= 254).all()


@pytest.mark.parametrize("suffix", ["ppm", "png", "webp", "bmp"])
def test_image_channels_are_rgb_in_every_format(tmp_path, suffix):
  pixels = np.zeros((3, 5, 3), np.uint8)
  pixels[:, 1] = (10, 120, 250)
  Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
  np.testing.assert_array_equal(
      image_files.read_image(tmp_path / f"a.{suffix}"), pixels
  )


def test_min_side_decodes_a_large_jpeg_smaller_but_not_too_small():
  file = io.BytesIO()
  Image.new("RGB", (640, 480)).save(file, "JPEG")
  decode = image_files.decode_image
  assert decode(file.getvalue(), "a").shape == (480, 640, 3)
  assert decode(file.getvalue(), "a", min_side=241).shape == (480, 640, 3)
  assert decode(file.getvalue(), "a", min_side=240).shape == (240, 320, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P6\n60000 1000\n255\n" + bytes(9),
        png_files.png(2**14, 2**14, bytes(7), layout=(8, 2, 0, 0, 0)),
        png_files.png(2**10, 2**10, bytes(7), layout=(8, 2, 0, 0, 0)),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_images_that_lie_about_their_size_or_kind_are_refused(tmp_path, data):
  path = tmp_path / "a.png"
  path.write_bytes(data)
  with pytest.raises(UserError, match="a.png"):
    image_files.read_image(path)


def test_an_image_chunk_that_lies_about_its_size_takes_no_memory(tmp_path):
  path = tmp_path / "a.png"
  Image.new("RGB", (64, 64)).save(path)
  data = bytearray(path.read_bytes())
  at = data.index(b"IDAT")
  data[at - 4 : at] = (2**31 - 1).to_bytes(4, "big")
  path.write_bytes(data)
  tracemalloc.start()
  with contextlib.suppress(UserError):
    image_files.read_image(path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 2**24


def test_images_over_the_pixel_limit_are_refused(tmp_path):
  Image.new("L", (100, 10)).save(tmp_path / "a.png")
  with pytest.raises(UserError, match="999 pixels.* came 100x10"):
    image_files.read_image(tmp_path / "a.png", max_pixels=999)


@pytest.mark.parametrize("kind", ["gif", "tiff"])
def test_formats_that_no_set_uses_are_not_even_tried(tmp_path, kind):
  Image.new("RGB", (4, 4)).save(tmp_path / f"a.{kind}")
  with pytest.raises(UserError, match=f"a.{kind}: expected an image"):
    image_files.read_image(tmp_path / f"a.{kind}")


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 3)])
def test_16_bit_pngs_are_refused_rather_than_clipped(tmp_path, shape):
  cv2.imwrite(str(tmp_path / "a.png"), np.full(shape, 300, np.uint16))
  with pytest.raises(UserError, match="8 bits"):
    image_files.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["ppm", "png", "jpg", "webp"])
def test_cut_images_are_refused(tmp_path, suffix):
  path = tmp_path / f"a.{suffix}"
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(UserError, match=path.name):
    image_files.read_image(path)
