"""The converter: what it writes, keeps, refuses, and that it can be killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time

from array_record.python import array_record_module
import numpy as np
from PIL import Image
import pytest

from mcjepa_jax import convert_images
from mcjepa_jax.data.readers import array_records
from mcjepa_jax.data.sets import image_sets, record_sets
from mcjepa_jax.errors import UserError
from tests.helpers.repository import ROOT


def _write(path, value=0, kind="PNG"):
  path.parent.mkdir(parents=True, exist_ok=True)
  file = io.BytesIO()
  Image.new("RGB", (6, 4), (value, 0, 255)).save(file, kind)
  path.write_bytes(file.getvalue())


@pytest.fixture
def source(tmp_path):
  """Ten images in two classes: image i of class i % 2 has red i."""
  for i in range(10):
    _write(tmp_path / "in" / "ab"[i % 2] / f"{i}.png", i)
  return tmp_path / "in"


def _files(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def _command(*flags):
  return convert_images.main([*flags])


def test_a_folder_and_its_shards_hold_the_same_images(source, tmp_path):
  report = convert_images.convert(
      source=source, output=tmp_path / "out", shards=3
  )
  assert report["images"] == 10 and report["shards"] == 3
  folder = image_sets.ImageFolder(source)
  shards = record_sets.ConvertedImages(tmp_path / "out")
  assert shards.classes == folder.classes == ["a", "b"]
  # Shard k holds images k, k + 3, ...
  order = [i for k in range(3) for i in range(k, 10, 3)]
  for place, i in enumerate(order):
    assert shards.path(place) == folder.record_id(i)
    assert shards[place]["label"] == folder[i]["label"]
    np.testing.assert_array_equal(shards[place]["image"], folder[i]["image"])
  assert (
      array_records.unpack(shards._records[0], "")[2]
      == (source / folder.record_id(0)).read_bytes()
  )


def test_any_tree_is_converted_without_labels(tmp_path):
  names = ["é.png", "x/1.png", "x/y/2.png", os.fsdecode(b"z/\xff.png")]
  for name in names:
    _write(tmp_path / "in" / name)
  convert_images.convert(
      source=tmp_path / "in", output=tmp_path / "out", shards=64
  )
  images = record_sets.ConvertedImages(tmp_path / "out")
  assert [images.path(i) for i in range(4)] == sorted(names, key=len)[:0] + [
      *("é.png", "x/1.png", "x/y/2.png", names[3])
  ]
  assert set(images[3]) == {"image"}


def test_shards_are_the_same_for_any_number_of_processes(source, tmp_path):
  for workers in (1, 2):
    convert_images.convert(
        source=source, output=tmp_path / str(workers), shards=4, workers=workers
    )
  one, two = _files(tmp_path / "1"), _files(tmp_path / "2")
  assert one == two and len(one) == 6


def _write_shard(path, records):
  writer = array_record_module.ArrayRecordWriter(
      str(path), array_records.WRITE_OPTIONS
  )
  for record in records:
    writer.write(record)
  writer.close()


def test_whole_shards_are_kept_and_others_made_again(source, tmp_path):
  out = tmp_path / "out"
  convert_images.convert(source=source, output=out, shards=5)
  whole, shards = _files(out), sorted(out.glob("*.array_record"))
  (out / "manifest.json").unlink()
  before = shards[4].stat().st_mtime_ns
  shards[0].write_bytes(whole[shards[0].name][:-9])
  shards[1].with_name(f"{shards[1].name}.part").write_bytes(b"begun")
  shards[1].unlink()
  # Shard 2 holds images 2 and 7: with one too many, and with another's bytes.
  second = array_records.Records([shards[2]], [2])
  records = [second[0], second[1]]
  _write_shard(shards[2], [*records, records[1]])
  third = array_records.Records([shards[3]], [2])
  label, path, image = array_records.unpack(third[0], "")
  _write_shard(
      shards[3], [array_records.pack(label, path, image + b" "), third[1]]
  )
  convert_images.convert(source=source, output=out, shards=5)
  assert _files(out) == whole
  assert shards[4].stat().st_mtime_ns == before


def test_files_that_do_not_decode_are_all_named(source, tmp_path, capsys):
  whole = (source / "a" / "2.png").read_bytes()
  (source / "a" / "2.png").write_bytes(whole[:45])
  (source / "b" / "5.png").write_text("no image")
  (source / "b" / "7.png").unlink()
  os.mkfifo(source / "b" / "7.png")
  flags = [f"--input={source}", f"--output={tmp_path / 'out'}", "--shards=3"]
  assert _command(*flags, "--workers=1") == 2
  lines = capsys.readouterr().err.splitlines()
  lines = [line for line in lines if line.startswith("error: ")]
  assert [line.split(": ")[1] for line in lines] == [
      str(source / name) for name in ("a/2.png", "b/5.png", "b/7.png")
  ]
  assert "no regular file" in lines[2]
  # Files 2, 5 and 7 are images 1, 7 and 8: the one shard without them is kept.
  shards = [p.name for p in (tmp_path / "out").glob("*array_record*")]
  assert shards == [array_records.shard_name(0, 3)]
  with pytest.raises(UserError, match="finished"):
    record_sets.ConvertedImages(tmp_path / "out")
  # Files that are mended are found.
  for name, value in (("a/2", 2), ("b/5", 5), ("b/7", 7)):
    (source / f"{name}.png").unlink()
    _write(source / f"{name}.png", value)
  assert _command(*flags, "--workers=1") == 0
  assert len(record_sets.ConvertedImages(tmp_path / "out")) == 10


def test_skipped_files_are_in_the_manifest(source, tmp_path, capsys):
  (source / "a" / "0.png").write_text("no image")
  (source / "a" / "2.png").write_text("")
  flags = [f"--input={source}", f"--output={tmp_path / 'out'}", "--shards=10"]
  assert _command(*flags, "--workers=1", "--skip-bad") == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert (report["images"], report["skipped"]) == (8, 2)
  images = record_sets.ConvertedImages(tmp_path / "out")
  assert [images.path(i)[2] for i in range(8)] == [*"46813579"]
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert [entry["path"] for entry in manifest["skipped"]] == [
      "a/0.png",
      "a/2.png",
  ]
  assert "expected an image" in manifest["skipped"][0]["fault"]
  assert str(source) not in json.dumps(manifest)
  # Started again it finds the same, and without the flag refuses them.
  before = _files(tmp_path / "out")
  assert _command(*flags, "--workers=1", "--skip-bad") == 0
  assert _files(tmp_path / "out") == before
  assert _command(*flags, "--workers=1") == 2
  assert "a/2.png: expected an image" in capsys.readouterr().err


def test_a_folder_where_nothing_decodes_is_refused(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.png").write_text("no image")
  with pytest.raises(UserError, match="came none that decodes"):
    convert_images.convert(
        source=tmp_path / "in", output=tmp_path / "out", skip_bad=True
    )


def test_output_folders_that_hold_something_else_are_refused(source, tmp_path):
  out = tmp_path / "out"
  _write(tmp_path / "other" / "x.png")
  (out / "sub").mkdir(parents=True)
  with pytest.raises(UserError, match="expected an empty folder .* with sub"):
    convert_images.convert(source=source, output=out)
  (out / "sub").rmdir()
  convert_images.convert(source=source, output=out, shards=1)
  before = _files(out)
  with pytest.raises(UserError, match="with images-00000-of-00001"):
    convert_images.convert(source=source, output=out, shards=2)
  with pytest.raises(UserError, match="of other files than .*/other holds"):
    convert_images.convert(source=tmp_path / "other", output=out)
  assert _files(out) == before
  (out / "conversion.json").unlink()
  with pytest.raises(UserError, match="conversion.json"):
    convert_images.convert(source=source, output=out, shards=1)
  for inside in (source, source / "a"):
    with pytest.raises(UserError, match="expected a folder outside of"):
      convert_images.convert(source=source, output=inside)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file: cannot be written"):
    convert_images.convert(source=source, output=tmp_path / "file")


def test_links_out_of_the_input_are_refused(source, tmp_path):
  _write(tmp_path / "secret" / "x.png")
  (source / "a" / "inside.png").symlink_to(source / "b" / "1.png")
  convert_images.convert(source=source, output=tmp_path / "ok", shards=2)
  (source / "a" / "out.png").symlink_to(tmp_path / "secret" / "x.png")
  (source / "c").symlink_to(tmp_path / "secret")
  with pytest.raises(UserError) as caught:
    convert_images.convert(source=source, output=tmp_path / "out")
  first, second = caught.value.messages
  assert f"{source}/c: expected no link out of" in first
  assert f"{source}/a/out.png: expected no link" in second
  assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_ends_in_one_error(source, tmp_path):
  if not os.path.exists("/dev/full"):
    pytest.skip("no /dev/full on this system")
  out = tmp_path / "out"
  convert_images.convert(source=source, output=out, shards=1)
  (shard,) = out.glob("*.array_record")
  shard.unlink()
  shard.with_name(f"{shard.name}.part").symlink_to("/dev/full")
  with pytest.raises(UserError, match="cannot be written: .*No space left"):
    convert_images.convert(source=source, output=out, shards=1)


def test_a_manifest_does_not_outlive_the_shards_that_it_names(source, tmp_path):
  out = tmp_path / "out"
  convert_images.convert(source=source, output=out, shards=2)
  (out / array_records.shard_name(0, 2)).unlink()
  (source / "a" / "0.png").write_text("no image")
  with pytest.raises(UserError, match="a/0.png: expected an image"):
    convert_images.convert(source=source, output=out, shards=2)
  assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    "flags, fault",
    [
        ([], "--input: expected --input=FOLDER"),
        ([], "--output: expected --output=FOLDER"),
        (["--shards=0"], "--shards: expected a number from 1 to 4096, got '0'"),
        (["--shards=4097"], "--shards: expected a number from 1"),
        (["--shards=1e3"], "--shards: expected a number from 1"),
        (["--shards=²"], "--shards: expected a number from 1"),
        (["--workers=513"], "--workers: expected a number from 1 to 512"),
        (["--workers"], "--workers: expected a number from 1 to 512, got ''"),
        (["--skip-bad=yes"], "--skip-bad: takes no value, got 'yes'"),
        (["--shard=3"], "--shard: no such flag; did you mean --shards?"),
    ],
)
def test_flags_are_checked(capsys, flags, fault):
  assert _command(*flags) == 2
  assert f"error: {fault}" in capsys.readouterr().err


def test_a_missing_input_is_one_line(tmp_path, capsys):
  flags = [f"--input={tmp_path / 'none'}", f"--output={tmp_path / 'out'}"]
  assert _command(*flags) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and "none: expected a folder" in line


@pytest.mark.slow
def test_a_killed_conversion_goes_on_with_what_is_missing(tmp_path):
  (tmp_path / "in").mkdir()
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (400, 400, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "in" / "0.png", compress_level=1)
  data = (tmp_path / "in" / "0.png").read_bytes()
  for i in range(1, 96):
    (tmp_path / "in" / f"{i}.png").write_bytes(data)
  out = tmp_path / "out"
  command = [sys.executable, "-m", "mcjepa_jax.convert_images", "--shards=24"]
  command += [f"--input={tmp_path / 'in'}", f"--output={out}", "--workers=2"]
  running = subprocess.Popen(
      command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
  )
  end = time.monotonic() + 60
  while not list(out.glob("*.array_record")) and time.monotonic() < end:
    time.sleep(0.005)
  os.kill(running.pid, signal.SIGKILL)
  running.wait()
  # The workers end with the command: nothing is left of its session.
  while time.monotonic() < end:
    try:
      os.killpg(running.pid, 0)
    except ProcessLookupError:
      break
    time.sleep(0.05)
  else:
    raise AssertionError("workers outlive the command")
  kept = {s: s.stat().st_mtime_ns for s in out.glob("*.array_record")}
  assert 0 < len(kept) < 24 and not (out / "manifest.json").exists()
  done = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert kept == {s: s.stat().st_mtime_ns for s in kept}
  assert "verifying: 100%" in done.stderr
  assert json.loads(done.stdout.splitlines()[-1])["images"] == 96
  assert not list(out.glob("*.part"))
  assert len(record_sets.ConvertedImages(out)) == 96


def test_real_photographs_are_converted_as_they_are(shared_data, tmp_path):
  source = shared_data / "imagenet" / "train"
  report = convert_images.convert(
      source=source, output=tmp_path / "out", shards=4
  )
  assert report["images"] == report["classes"] == 1000
  images = record_sets.ConvertedImages(tmp_path / "out")
  assert images.path(250) == "n01443537/n01443537_0.JPEG"
  assert images[250]["label"] == 1
  assert min(images[250]["image"].shape[:2]) == 160
