"""Flow and image files: round trips, documented bytes, hostile headers."""

import io
import os
import struct
import tracemalloc
import zipfile
import zlib

import cv2
import h5py
import numpy as np
import pytest

from mcjepa_jax.data.readers import flow_files, image_files
from mcjepa_jax.errors import UserError
from tests.helpers import png_files

FORMATS = {
    ".flo": (flow_files.write_flo, flow_files.read_flo, 0.0),
    ".pfm": (flow_files.write_pfm, flow_files.read_pfm, 0.0),
    ".png": (flow_files.write_kitti_flow, flow_files.read_kitti_flow, 1 / 128),
}


def _flow(height=5, width=7):
  rng = np.random.default_rng(0)
  flow = rng.normal(0, 20, (height, width, 2)).astype(np.float32)
  valid = (rng.random((height, width, 1)) > 0.3).astype(np.float32)
  return flow, valid


def _flo(width, height, values):
  return b"PIEH" + struct.pack("<ii", width, height) + values


@pytest.mark.parametrize("suffix", FORMATS)
def test_flow_comes_back_and_is_zero_where_unknown(tmp_path, suffix):
  write, _, tolerance = FORMATS[suffix]
  flow, valid = _flow()
  write(tmp_path / f"a{suffix}", flow, valid)
  read, read_valid = flow_files.read_flow(tmp_path / f"a{suffix}")
  np.testing.assert_array_equal(read_valid, valid)
  np.testing.assert_allclose(read, flow * valid, rtol=0, atol=tolerance)


@pytest.mark.parametrize("suffix", FORMATS)
def test_flow_without_a_mask_is_valid_everywhere(tmp_path, suffix):
  write, read, _ = FORMATS[suffix]
  write(tmp_path / f"a{suffix}", _flow()[0])
  assert read(tmp_path / f"a{suffix}")[1].all()


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_cut_or_longer_file_is_refused(tmp_path, suffix):
  write, read, _ = FORMATS[suffix]
  path = tmp_path / f"a{suffix}"
  write(path, *_flow(2, 3))
  whole = path.read_bytes()
  for data in [whole[:n] for n in range(len(whole))] + [whole + b"\n"]:
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
      read(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_writers_refuse_nan_where_valid(tmp_path, suffix):
  flow, valid = _flow()
  flow[0, 0, 1], valid[0, 0] = np.nan, 0
  FORMATS[suffix][0](tmp_path / "a", flow, valid)
  with pytest.raises(UserError, match="finite"):
    FORMATS[suffix][0](tmp_path / "a", flow)


def test_flo_bytes_are_rows_of_u_then_v(tmp_path):
  path = tmp_path / "a.flo"
  path.write_bytes(_flo(2, 1, struct.pack("<4f", 1, 2, 3, 4)))
  np.testing.assert_array_equal(
      flow_files.read_flo(path)[0], [[[1, 2], [3, 4]]]
  )


@pytest.mark.parametrize("value", [1.1e9, -1e10, np.nan, np.inf, -np.inf])
def test_flo_unknown_in_one_component_is_unknown(tmp_path, value):
  path = tmp_path / "a.flo"
  path.write_bytes(_flo(2, 1, struct.pack("<4f", value, 2, 3, 4)))
  flow, valid = flow_files.read_flo(path)
  np.testing.assert_array_equal(flow, [[[0, 0], [3, 4]]])
  np.testing.assert_array_equal(valid, [[[0], [1]]])


@pytest.mark.parametrize(
    "size", [(-1, -1), (0, 0), (2**31 - 1, 2**31 - 1), (-2, -1), (2**15, 2**16)]
)
def test_flo_with_a_lying_size_is_refused(tmp_path, size):
  path = tmp_path / "a.flo"
  path.write_bytes(_flo(*size, bytes(16)))
  with pytest.raises(UserError, match=f"{size[0]}x{size[1]}.* came 28"):
    flow_files.read_flo(path)


@pytest.mark.parametrize("endian, scale", [("<", b"-1.0"), (">", b"1.000000")])
def test_pfm_rows_run_upwards_and_the_third_channel_is_ignored(
    tmp_path, endian, scale
):
  path = tmp_path / "a.pfm"
  rows = struct.pack(f"{endian}6f", 1, 2, np.nan, 3, 4, np.inf)
  path.write_bytes(b"PF\n1 2\n" + scale + b"\n" + rows)
  flow, valid = flow_files.read_pfm(path)
  np.testing.assert_array_equal(flow, [[[3, 4]], [[1, 2]]])
  assert valid.all()


@pytest.mark.parametrize(
    "header",
    [
        b"Pf\n1 1\n-1\n",
        b"PF\n-1 -1\n-1\n",
        b"PF\n999999999 999999999\n-1\n",
        b"PF\n1 1\nnan\n",
        b"PF\n1\n-1\n",
        b"PF\n0 0\n-1\n",
    ],
)
def test_pfm_with_another_header_is_refused(tmp_path, header):
  path = tmp_path / "a.pfm"
  path.write_bytes(header + bytes(12))
  with pytest.raises(UserError, match="a.pfm"):
    flow_files.read_pfm(path)


def test_kitti_code_is_r_for_u_and_b_for_valid(tmp_path):
  path = tmp_path / "a.png"
  pixels = b"\0" + struct.pack(">6H", 2**15 + 64, 2**15 - 32, 1, 7, 7, 0)
  path.write_bytes(png_files.png(2, 1, pixels))
  flow, valid = flow_files.read_kitti_flow(path)
  np.testing.assert_array_equal(flow, [[[1, -0.5], [0, 0]]])
  np.testing.assert_array_equal(valid, [[[1], [0]]])


def test_kitti_flow_is_clipped_to_what_16_bits_hold(tmp_path):
  flow_files.write_kitti_flow(
      tmp_path / "a.png", np.float32([[[-600, 600], [-512, 0]]])
  )
  flow, _ = flow_files.read_kitti_flow(tmp_path / "a.png")
  np.testing.assert_array_equal(flow, [[[-512, 512 - 1 / 64], [-512, 0]]])


@pytest.mark.parametrize(
    "data, fault",
    [
        (png_files.png(1, 1, bytes(4), layout=(8, 2, 0, 0, 0)), "16-bit"),
        (png_files.png(1, 1, bytes(7), layout=(16, 2, 0, 0, 1)), "interlace"),
        (png_files.png(2**31 - 1, 2**31 - 1, bytes(7)), "can hold"),
        (png_files.png(0, 1, bytes(7)), "can hold"),
        (png_files.png(1, 2, bytes(7)), "came 7"),
        (png_files.png(1, 1, bytes(14)), "came more"),
        (
            png_files.png(1, 1, bytes(7), pack=lambda p: zlib.compress(p)[:-1]),
            "7 bytes",
        ),
        (
            png_files.png(1, 1, bytes(7), pack=lambda p: zlib.compress(p) + p),
            "7 bytes",
        ),
        (png_files.png(1, 1, bytes(7))[:-20] + bytes(20), "checksum"),
        (b"PIEH" + bytes(99), "no PNG"),
    ],
)
def test_kitti_png_with_another_header_or_length_is_refused(
    tmp_path, data, fault
):
  path = tmp_path / "a.png"
  path.write_bytes(data)
  with pytest.raises(UserError, match=f"a.png.*{fault}"):
    flow_files.read_kitti_flow(path)


def _npy(path, array, **header):
  """An .npy file whose header may say what is not so."""
  said = np.lib.format.header_data_from_array_1_0(array) | header
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(file, said)
  path.write_bytes(file.getvalue() + array.tobytes())
  return path


def _npz(path, compression=zipfile.ZIP_DEFLATED, **arrays):
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, array in arrays.items():
      array = _npy(path.with_name("member"), array).read_bytes()
      archive.writestr(f"{name}.npy", array)
  return path


def _flo5(path, array, name="flow", **options):
  with h5py.File(path, "w") as store:
    store.create_dataset(name, data=array, **options)
  return path


def _unknown():
  """A flow with every way to say unknown, and what must come of it."""
  flow = np.arange(40, dtype=np.float32).reshape(4, 5, 2)
  for i, value in enumerate((np.nan, np.inf, -np.inf, 1e10)):
    flow[0, i, i % 2] = value
  valid = np.ones((4, 5, 1), np.float32)
  valid[0, :4] = 0
  return flow, np.where(valid > 0, flow, 0), valid


PACKED = {
    ".npy": lambda path, flow: _npy(path, flow),
    ".npz": lambda path, flow: _npz(path, u=flow[..., 0], v=flow[..., 1]),
    ".flo5": lambda path, flow: _flo5(path, flow, compression="gzip"),
}


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_flow_is_zero_and_not_valid_where_unknown(tmp_path, suffix):
  flow, known, valid = _unknown()
  path = PACKED[suffix](tmp_path / f"a{suffix}", flow)
  read, read_valid = flow_files.read_flow(path)
  np.testing.assert_array_equal(read, known)
  np.testing.assert_array_equal(read_valid, valid)
  assert read.dtype == np.float32


@pytest.mark.parametrize("suffix", PACKED)
def test_every_cut_packed_file_is_refused(tmp_path, suffix):
  path = PACKED[suffix](tmp_path / f"a{suffix}", _flow(2, 3)[0])
  whole = path.read_bytes()
  for n in range(0, len(whole), 1 + len(whole) // 99):
    path.write_bytes(whole[:n])
    with pytest.raises(UserError, match=path.name):
      flow_files.read_flow(path)


@pytest.mark.parametrize("suffix", PACKED)
def test_a_damaged_byte_raises_nothing_but_a_user_error(tmp_path, suffix):
  path = PACKED[suffix](tmp_path / f"a{suffix}", _flow(4, 5)[0])
  whole = path.read_bytes()
  refused = 0
  for at in range(0, len(whole), 1 + len(whole) // 299):
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    try:
      flow_files.read_flow(path)
    except UserError:
      refused += 1
  assert refused


@pytest.mark.parametrize(
    "array, header",
    [
        (np.zeros((2, 3, 2)), {}),
        (np.zeros((2, 3, 2), ">f4"), {}),
        (np.zeros((2, 3, 3), np.float32), {}),
        (np.zeros((2, 3), np.float32), {}),
        (np.zeros((0, 3, 2), np.float32), {}),
        (np.zeros((2, 3, 2), np.float32), {"fortran_order": True}),
        (np.zeros((2, 3, 2), np.float32), {"shape": (2**31, 2**31, 2)}),
        (np.zeros((2, 3, 2), np.float32), {"shape": (2**62, 4, 2)}),
        (np.zeros((2, 3, 2), np.float32), {"shape": (-2, -3, 2)}),
        (np.zeros((2, 3, 2), np.float32), {"descr": "|O"}),
    ],
)
def test_npy_of_another_kind_or_a_lying_header_is_refused(
    tmp_path, array, header
):
  with pytest.raises(UserError, match="a.npy"):
    flow_files.read_flow(_npy(tmp_path / "a.npy", array, **header))


class _Opened:
  """What a pickle would run."""

  def __reduce__(self):
    return os.abort, ()


def test_pickled_objects_are_refused_and_not_run(tmp_path):
  objects = np.array([[_Opened()] * 2] * 2, dtype=object)
  np.save(tmp_path / "a.npy", objects, allow_pickle=True)
  np.savez(tmp_path / "a.npz", u=objects, v=objects)
  for name in ("a.npy", "a.npz"):
    with pytest.raises(UserError, match=f"{name}: expected numbers"):
      flow_files.read_flow(tmp_path / name)


def test_an_npy_header_of_version_2_is_refused_before_it_is_read(tmp_path):
  path = tmp_path / "a.npy"
  path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1))
  with pytest.raises(UserError, match="version 1.0"):
    flow_files.read_npy(path, np.uint8, 2)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
)
def test_npz_u_points_right_in_every_float(tmp_path, dtype, compression):
  u = np.arange(6, dtype=dtype).reshape(2, 3)
  path = _npz(tmp_path / "a.npz", compression, u=u, v=-u)
  flow, _ = flow_files.read_flow(path)
  np.testing.assert_array_equal(flow[..., 0], u)
  np.testing.assert_array_equal(flow[..., 1], -u)


_U = np.ones((2, 3), np.float16)


@pytest.mark.parametrize(
    "arrays, fault",
    [
        (dict(u=_U), "'v', came"),
        (dict(u=_U, v=_U[:1]), "one size"),
        (dict(u=_U, v=_U.astype(int)), "expected floats"),
        (dict(u=_U[0], v=_U[0]), "expected floats"),
        (dict(u=_U[:0], v=_U[:0]), "expected numbers"),
    ],
)
def test_npz_without_u_and_v_of_one_size_is_refused(tmp_path, arrays, fault):
  with pytest.raises(UserError, match=f"a.npz.*{fault}"):
    flow_files.read_flow(_npz(tmp_path / "a.npz", **arrays))


def test_npz_packed_by_other_means_is_refused(tmp_path):
  path = _npz(tmp_path / "a.npz", zipfile.ZIP_BZIP2, u=_U, v=_U)
  with pytest.raises(UserError, match="stored or deflated"):
    flow_files.read_flow(path)


@pytest.mark.parametrize(
    "shape, fault",
    [
        ((2**13, 2**13 + 1), "can hold"),
        ((2, 4), "8 bytes|16 bytes"),
        ((2, 2), "more"),
    ],
)
def test_npz_members_hold_what_their_header_says(tmp_path, shape, fault):
  member = _npy(tmp_path / "member", _U, shape=shape).read_bytes()
  with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
    for name in "uv":
      archive.writestr(f"{name}.npy", member)
  with pytest.raises(UserError, match=f"a.npz.*{fault}"):
    flow_files.read_flow(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(compression="gzip"),
        dict(compression="gzip", shuffle=True),
        dict(compression="gzip", shuffle=True, chunks=(3, 4, 1)),
        dict(chunks=(3, 4, 1)),
    ],
)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_flo5_reads_as_hdf5_itself_does(tmp_path, options, dtype):
  flow = _flow(7, 9)[0].astype(dtype)
  path = _flo5(tmp_path / "a.flo5", flow, **options)
  with h5py.File(path) as store:
    wanted = store["flow"][()].astype(np.float32)
  np.testing.assert_array_equal(flow_files.read_flow(path)[0], wanted)


@pytest.mark.parametrize(
    "array, options, fault",
    [
        (np.zeros((2, 3, 2), np.int32), {}, "expected floats"),
        (np.zeros((2, 3), np.float32), {}, "expected floats"),
        (np.zeros((2, 3, 3), np.float32), {}, "h w 2"),
        (np.zeros((2, 3, 2), np.float32), dict(name="disparity"), "'flow'"),
        (np.zeros((2, 3, 2), np.float32), dict(compression="lzf"), "deflated"),
        (np.zeros((0, 3, 2), np.float32), {}, "h w 2"),
    ],
)
def test_flo5_of_another_kind_is_refused(tmp_path, array, options, fault):
  with pytest.raises(UserError, match=f"a.flo5.*{fault}"):
    flow_files.read_flow(_flo5(tmp_path / "a.flo5", array, **options))


@pytest.mark.parametrize("suffix", [".npz", ".flo5"])
def test_packed_flow_over_the_pixel_limit_is_refused(
    tmp_path, monkeypatch, suffix
):
  path = PACKED[suffix](tmp_path / f"a{suffix}", np.zeros((2, 3, 2)))
  monkeypatch.setattr(image_files, "MAX_PIXELS", 5)
  with pytest.raises(UserError, match="more than 5 pixels"):
    flow_files.read_flow(path)


def test_flo5_without_its_values_is_refused(tmp_path):
  path = tmp_path / "a.flo5"
  for shape, chunks in (((2**20, 2**20, 2), (8, 8, 2)), ((8, 8, 2), (4, 4, 2))):
    with h5py.File(path, "w") as store:
      store.create_dataset(
          "flow", shape, np.float32, chunks=chunks, compression="gzip"
      )
    with pytest.raises(UserError, match="a.flo5.*can hold"):
      flow_files.read_flow(path)


def test_flo5_follows_nothing_out_of_its_file(tmp_path):
  other = _flo5(tmp_path / "other.h5", np.ones((2, 3, 2), np.float32))
  (tmp_path / "raw").write_bytes(bytes(48))
  layout = h5py.VirtualLayout((2, 3, 2), np.float32)
  layout[:] = h5py.VirtualSource(other, "flow", (2, 3, 2))
  raw = [(str(tmp_path / "raw"), 0, 48)]
  makers = (
      lambda store: store.update(flow=h5py.ExternalLink(other, "flow")),
      lambda store: store.update(flow=h5py.SoftLink("/elsewhere")),
      lambda store: store.create_virtual_dataset("flow", layout),
      lambda store: store.create_group("flow"),
      lambda store: store.create_dataset(
          "flow", (2, 3, 2), np.float32, external=raw
      ),
  )
  for make in makers:
    with h5py.File(tmp_path / "a.flo5", "w") as store:
      make(store)
    with pytest.raises(
        UserError, match="a.flo5: expected (a data set )?'flow'"
    ):
      flow_files.read_flow(tmp_path / "a.flo5")


def _bomb_npz(path):
  """A member that unpacks to 16 MB where its header says 24 bytes."""
  header = _npy(path.with_name("member"), _U).read_bytes()[:-12]
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name in "uv":
      archive.writestr(f"{name}.npy", header + bytes(2**24))


def _bomb_flo5(path):
  """A chunk that unpacks to 16 MB where 512 bytes are its size."""
  with h5py.File(path, "w") as store:
    flow = store.create_dataset(
        "flow", (8, 8, 2), np.float32, chunks=(8, 8, 2), compression="gzip"
    )
    flow.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(2**24)))


@pytest.mark.parametrize(
    "name, make", [("a.npz", _bomb_npz), ("a.flo5", _bomb_flo5)]
)
def test_what_unpacks_to_more_than_it_says_takes_no_memory(
    tmp_path, name, make
):
  make(tmp_path / name)
  tracemalloc.start()
  with pytest.raises(UserError, match=f"{name}.*came more"):
    flow_files.read_flow(tmp_path / name)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 2**22


def test_missing_files_folders_and_suffixes_are_named(tmp_path):
  (tmp_path / "folder.flo").mkdir()
  for name in ("none.flo", "folder.flo", "flow.txt"):
    with pytest.raises(UserError, match=name):
      flow_files.read_flow(tmp_path / name)


def test_kitti_sample_reads_as_another_decoder_of_16_bits_does(shared_data):
  path = shared_data / "kitti" / "devkit2015" / "flow_gt.png"
  raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1].astype(float)
  flow, valid = flow_files.read_kitti_flow(path)
  assert flow.shape == (375, 1242, 2)
  np.testing.assert_array_equal(valid[..., 0], raw[..., 2])
  np.testing.assert_allclose(flow, valid * (raw[..., :2] - 32768) / 64)
