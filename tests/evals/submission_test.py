"""The archives for the benchmarks: layout, content, and what is refused."""

import pathlib
import zipfile

import numpy as np
import pytest

from mcjepa_jax import errors, evaluate
from mcjepa_jax.data import sources
from mcjepa_jax.data.readers import flow_files
from mcjepa_jax.evals import registry, submission
from tests.helpers import layouts, tiny

_SIZE = (6, 9)


def _predict(frames):
  """Flow that tells which frames it is of, with no 64th to spare."""
  first = frames[0::2].astype(np.float32)[..., :2]
  return first - frames[1::2, ..., :2] / np.float32(7)


def _sintel_root(root: pathlib.Path, scenes=submission.SINTEL_SCENES):
  for number, scene in enumerate(scenes):
    for code, render in enumerate(("clean", "final")):
      for frame in (1, 2, 3):
        path = root / f"MPI-Sintel/test/{render}/{scene}/frame_{frame:04d}.png"
        layouts.image(path, 10 * number + frame, code, size=_SIZE)


def _motion(name, root):
  return sources.motion(name, str(root), seed=0, size=(32, 32))


def _sintel(root, **options):
  options = dict(count=24, scenes=submission.SINTEL_SCENES) | options
  return submission.frames(
      {r: _motion(f"sintel_test_{r}", root) for r in ("clean", "final")},
      submission.sintel_member,
      **options,
  )


def _kitti(root, year="2015"):
  pairs = {year: _motion(f"kitti_{year}_test", root)}
  return submission.frames(pairs, submission.kitti_member, count=2)


def _run(name, frames, folder):
  return submission.run(
      name, frames, _predict, folder, batch_size=4, max_pixels=10**6,
      progress=False,
  )  # fmt: skip


def test_sintels_bundler_finds_a_folder_a_pass_and_a_folder_a_scene(tmp_path):
  _sintel_root(tmp_path)
  frames = _sintel(tmp_path)
  result = _run("sintel", frames, tmp_path / "out")
  assert result == {
      "submit/sintel/count": 48,
      "submit/sintel/largest_change": 0,
  }
  expected = {
      f"{render}/{scene}/frame{number:04d}.flo"
      for render in ("clean", "final")
      for scene in submission.SINTEL_SCENES
      for number in (1, 2)
  }
  folder = tmp_path / "out" / "sintel"
  found = {
      path.relative_to(folder).as_posix() for path in folder.rglob("*.flo")
  }
  assert found == expected
  with zipfile.ZipFile(tmp_path / "out" / "sintel.zip") as archive:
    assert set(archive.namelist()) == expected
  # The flow of a member is that of its own frames.
  index = frames.members.index("final/tiger/frame0002.flo")
  pair = frames[index]
  flow, valid = flow_files.read_flo(folder / "final/tiger/frame0002.flo")
  wanted = _predict(np.stack([pair["frame_1"], pair["frame_2"]]))[0]
  np.testing.assert_array_equal(flow, wanted)
  assert flow.shape == (*_SIZE, 2) and valid.all()
  assert pair["frame_1"][0, 0, 1] == 1


@pytest.mark.parametrize(
    "year, archive, images, place",
    [("2015", "scene", "image_2", "flow/"), ("2012", "stereo", "image_0", "")],
)
def test_kitti_takes_16_bit_pngs(tmp_path, year, archive, images, place):
  layouts.kitti(tmp_path / f"kitti/data_{archive}_flow", images)
  frames = _kitti(tmp_path, year)
  result = _run("kitti", frames, tmp_path / "out")
  assert 0 < result["submit/kitti/largest_change"] <= 1 / 128
  with zipfile.ZipFile(tmp_path / "out" / "kitti.zip") as zipped:
    assert set(zipped.namelist()) == {
        f"{place}000000_10.png",
        f"{place}000007_10.png",
    }
    zipped.extractall(tmp_path / "unpacked")
  path = tmp_path / "unpacked" / f"{place}000007_10.png"
  flow, valid = flow_files.read_kitti_flow(path)
  pair = frames[1]
  wanted = _predict(np.stack([pair["frame_1"], pair["frame_2"]]))[0]
  np.testing.assert_allclose(flow, wanted, atol=1 / 128)
  assert valid.all()


def test_flow_beyond_the_format_is_cut_and_counted(tmp_path):
  layouts.kitti(tmp_path / "kitti/data_scene_flow")
  result = submission.run(
      "kitti", _kitti(tmp_path), lambda frames: 600 + 0 * _predict(frames),
      tmp_path / "out", batch_size=4, max_pixels=10**6, progress=False,
  )  # fmt: skip
  assert result["submit/kitti/largest_change"] == 600 - 511
  path = tmp_path / "out/kitti/flow/000007_10.png"
  assert (flow_files.read_kitti_flow(path)[0] == 511).all()


@pytest.mark.parametrize("fault", ["changed", "holes"])
def test_a_file_that_does_not_hold_what_was_written_is_named(
    tmp_path, monkeypatch, fault
):
  layouts.kitti(tmp_path / "kitti/data_scene_flow")
  plain = flow_files.write_kitti_flow

  def damaged(path, field):
    if fault == "changed":
      return plain(path, field + 0.1)
    return plain(path, field, np.zeros((*field.shape[:2], 1), np.float32))

  monkeypatch.setattr(flow_files, "write_kitti_flow", damaged)
  with pytest.raises(errors.UserError, match="0_10.png: expected the flow"):
    _run("kitti", _kitti(tmp_path), tmp_path / "out")
  assert not (tmp_path / "out/kitti.zip").exists()


def test_an_archive_comes_out_of_the_suite_or_is_refused_before(
    tmp_path, untrained
):
  layouts.whole_kitti_2012_test(tmp_path)
  cfg = tiny.config(
      task="evaluate", evals=("submit/kitti_2012",), data_root=str(tmp_path),
      checkpoint=str(untrained), mesh__devices=1, eval_batch_size=65,
  )  # fmt: skip
  workdir = tmp_path / "w"
  results = evaluate.evaluate(cfg.copy_and_resolve_references(), workdir)
  assert results["submit/kitti_2012/count"] == 195
  with zipfile.ZipFile(workdir / "submissions/kitti_2012.zip") as archive:
    assert len(archive.namelist()) == 195
  blocked = tmp_path / "blocked"
  blocked.mkdir()
  (blocked / "submissions").touch()
  found = registry.faults(cfg, blocked)
  assert "submit/kitti_2012: cannot write" in found.by_eval[cfg.evals[0]][0]


def test_files_of_an_earlier_archive_do_not_stay(tmp_path):
  layouts.kitti(tmp_path / "kitti/data_scene_flow")
  stale = tmp_path / "out/kitti/flow/000199_10.png"
  stale.parent.mkdir(parents=True)
  stale.write_bytes(b"")
  _run("kitti", _kitti(tmp_path), tmp_path / "out")
  assert not stale.exists()


def test_a_set_that_is_not_whole_is_refused_before_anything_is_written(
    tmp_path,
):
  _sintel_root(tmp_path, (*submission.SINTEL_SCENES[1:], "market_3"))
  with pytest.raises(errors.UserError) as caught:
    _sintel(tmp_path)
  assert "without ['PERTURBED_market_3'] and with ['market_3']" in str(
      caught.value
  )
  with pytest.raises(errors.UserError, match="clean: expected 552 pairs.* 24"):
    _sintel(tmp_path, count=552)
  cfg = tiny.config(evals=("submit/sintel",), data_root=str(tmp_path))
  found = registry.faults(cfg)
  assert not found.mistakes
  assert "expected 552 pairs" in found.by_eval["submit/sintel"][0]
  cfg.evals = ("submit/nowhere",)
  assert "kitti, kitti_2012, sintel" in registry.faults(cfg).mistakes[0]


def test_an_output_that_cannot_be_written_is_named(tmp_path):
  layouts.kitti(tmp_path / "kitti/data_scene_flow")
  blocked = tmp_path / "out"
  blocked.write_bytes(b"")
  with pytest.raises(errors.UserError, match="out.*cannot be written"):
    _run("kitti", _kitti(tmp_path), blocked)


def _zip(path, members):
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return path


def _flo(tmp_path, size):
  flow_files.write_flo(tmp_path / "one.flo", np.ones((*size, 2), np.float32))
  return (tmp_path / "one.flo").read_bytes()


@pytest.mark.parametrize(
    "member, expected",
    [
        ("clean/wall/frame_0001.flo", "frame0001.flo is missing"),
        ("clean/wall/frame_0001.flo", "frame_0001.flo does not belong"),
        ("wall/frame0001.flo", "wall/frame0001.flo does not belong"),
    ],
)
def test_an_archive_of_another_layout_is_refused(tmp_path, member, expected):
  path = _zip(tmp_path / "a.zip", {member: _flo(tmp_path, (2, 3))})
  with pytest.raises(errors.UserError, match=expected):
    submission.check(path, {"clean/wall/frame0001.flo": (2, 3)})


def test_an_archive_of_flow_of_another_size_is_refused(tmp_path):
  path = _zip(tmp_path / "a.zip", {"a.flo": _flo(tmp_path, (2, 3))})
  submission.check(path, {"a.flo": (2, 3)})
  with pytest.raises(errors.UserError, match="a.flo: expected 2x3, came 3x2"):
    submission.check(path, {"a.flo": (3, 2)})


def test_damaged_archives_are_refused(tmp_path):
  whole = _flo(tmp_path, (20, 30))
  path = _zip(tmp_path / "a.zip", {"a.flo": whole})
  data = bytearray(path.read_bytes())
  data[300] ^= 1
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match="a.flo is damaged"):
    submission.check(path, {"a.flo": (20, 30)})
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(errors.UserError, match="expected a zip archive"):
    submission.check(path, {"a.flo": (20, 30)})
  with pytest.raises(errors.UserError, match="none.zip"):
    submission.check(tmp_path / "none.zip", {})
