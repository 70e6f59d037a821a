"""What is read of a checkpoint, and what cannot be."""

import os
import shutil

import optax
import pytest

from mcjepa_jax.errors import UserError
from mcjepa_jax.storage import checkpoint, checkpoint_reader
from tests.helpers import saved_states


@pytest.mark.parametrize("form", ["", "checkpoints", "checkpoints/3"])
def test_parameters_are_read_without_their_optimizer(tmp_path, form):
  state = saved_states.save(
      tmp_path, state=saved_states.make_state(tx=optax.sgd(0.1, momentum=0.9))
  )
  params = checkpoint_reader.restore_params(
      tmp_path / form, saved_states.shapes(state.params)
  )
  saved_states.assert_bit_equal(params, state.params)
  encoder = {"encoder": saved_states.shapes(state.params)["encoder"]}
  part = checkpoint_reader.restore_params(tmp_path / form, encoder)
  saved_states.assert_bit_equal(part, {"encoder": state.params["encoder"]})


def test_one_step_is_read_by_its_path(tmp_path):
  saved_states.save(tmp_path, [3, 12], keep_last=2)
  assert checkpoint_reader.read_meta(tmp_path)["step"] == 12
  path = tmp_path / "checkpoints" / "3"
  assert checkpoint_reader.read_meta(path)["step"] == 3
  relative = os.path.relpath(path)
  assert checkpoint_reader.read_meta(relative)["step"] == 3


def test_another_architecture_is_named_by_its_first_parameters(tmp_path):
  saved_states.save(tmp_path)
  other = saved_states.shapes(saved_states.make_state(width=5))
  other.params["estimator"]["extra"] = other.params["estimator"].pop("bias")
  with pytest.raises(UserError) as caught:
    checkpoint_reader.restore_params(tmp_path, other.params)
  (message,) = caught.value.messages
  assert "params/encoder/kernel is float32[8, 4], expected float32[8, 5]" in (
      message
  )
  assert "params/encoder/scale is bfloat16[4], expected bfloat16[5]" in message
  assert "params/estimator/bias is float32[3], expected nothing" in message
  assert "params/estimator/extra is nothing, expected float32[3]" in message
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(
        UserError, match=r"kernel is float32\[8, 4\], .* and 4 more$"
    ):
      checkpoints.restore(3, other)
  missing = {
      "encoder": saved_states.shapes(saved_states.make_state().params)[
          "encoder"
      ]
  }
  del missing["encoder"]["scale"]
  with pytest.raises(UserError, match="encoder/scale is .* expected nothing"):
    checkpoint_reader.restore_params(tmp_path, missing)


def test_a_path_without_a_checkpoint_is_named(tmp_path):
  with pytest.raises(UserError, match="nowhere does not exist"):
    checkpoint_reader.read_meta(tmp_path / "nowhere")
  (tmp_path / "file").write_text("no checkpoint")
  for path in (tmp_path, tmp_path / "file"):
    with pytest.raises(UserError, match=f"{path} holds no complete checkpoint"):
      checkpoint_reader.read_meta(path)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
    with pytest.raises(UserError, match="checkpoints/5 does not exist"):
      checkpoints.restore(5, {})


# Reads of other arrays may still end after Orbax has raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(tmp_path, file, fault):
  state = saved_states.save(tmp_path)
  path = tmp_path / "checkpoints" / "3" / "state" / file
  if fault == "cut":
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  else:
    path.unlink()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="checkpoints/3 "):
      checkpoints.restore(3, saved_states.shapes(state))
  with pytest.raises(UserError, match="checkpoints/3 "):
    checkpoint_reader.restore_params(
        tmp_path, saved_states.shapes(state.params)
    )


# As above.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_with_a_damaged_one_the_one_before_it_is_named(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep_last=2) as checkpoints:
    for step in (2, 5):
      checkpoints.save(step, saved_states.make_state(), {}, {})
  folder = tmp_path / "checkpoints" / "5"
  (folder / "state" / "manifest.ocdbt").unlink()
  hint = "without its folder step 2 is the newest"
  with checkpoint.Checkpoints(tmp_path, keep_last=2) as checkpoints:
    with pytest.raises(UserError, match=f"checkpoints/5 .*{hint}$"):
      checkpoints.restore(5, saved_states.shapes(saved_states.make_state()))
  shutil.rmtree(folder)
  with checkpoint.Checkpoints(tmp_path, keep_last=2) as checkpoints:
    assert checkpoints.latest_step() == 2
  metrics = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"
  metrics.write_text('{"loss": ')
  with pytest.raises(UserError, match="checkpoints cannot be read"):
    checkpoint.Checkpoints(tmp_path, keep_last=2)
