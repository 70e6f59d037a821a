import numpy as np
from PIL import Image
import pytest

from mcjepa_jax import errors, predict
from mcjepa_jax.data.readers import flow_files
from mcjepa_jax.storage import checkpoint_reader
from tests.helpers import tiny


def test_two_images_of_any_size_give_flow_and_pictures(untrained, tmp_path):
  inputs = [
      tiny.save_image(tmp_path / f"{i}.png", (37, 50), i) for i in range(2)
  ]
  output = tmp_path / "out"
  code = predict.main([
      f"--checkpoint={untrained}", "--inputs", *map(str, inputs), f"--output={output}"
  ])  # fmt: skip
  assert code == 0
  flow, valid = flow_files.read_flo(output / "0_flow.flo")
  assert flow.shape == (37, 50, 2)
  assert np.isfinite(flow).all() and valid.all()
  for kind in ("color", "warped"):
    assert Image.open(output / f"0_{kind}.png").size == (50, 37)


def test_all_faults_are_told_and_nothing_is_loaded(tmp_path, capsys):
  a, b = tiny.save_image(tmp_path / "a.png", (8, 8)), tmp_path / "b.png"
  b.write_bytes(b"no image")
  code = predict.main([
      f"--checkpoint={tmp_path / 'none'}", "--inputs", str(a), str(b),
      f"--output={a}/folder",
  ])  # fmt: skip
  assert code == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 3
  assert all(line.startswith("error: ") for line in lines)
  for word in ("b.png", "none", "--output"):
    assert any(word in line for line in lines)


def test_images_of_unequal_size_are_refused_with_both_sizes(tmp_path):
  inputs = [
      str(tiny.save_image(tmp_path / f"{w}.png", (8, w))) for w in (9, 10)
  ]
  with pytest.raises(errors.UserError, match="9x8.*10x8"):
    predict.read_pair(inputs)


def test_a_checkpoint_of_another_architecture_is_refused(untrained):
  import jax

  abstract = {"encoder": {"stem_0": jax.ShapeDtypeStruct((3,), np.float32)}}
  with pytest.raises(errors.UserError, match="expected"):
    checkpoint_reader.restore_params(untrained, abstract)
