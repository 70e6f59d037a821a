"""A program that was begun is the one that runs; its error is told."""

import jax
import jax.numpy as jnp
import pytest

from mcjepa_jax.compiled.compiled_steps import CompiledSteps
from mcjepa_jax.step import train_state


@pytest.fixture
def programs():
  traced = []

  def step(state, arrays):
    traced.append(arrays["views"].shape)
    if arrays["views"].shape[0] == 3:
      raise ValueError("three")
    return state.replace(step=state.step + arrays["views"].sum()), {}

  made = CompiledSteps(
      {"content": jax.jit(step), "both": jax.jit(step)},
      expected={"content": 1, "both": 2},
      devices=1,
  )
  made.traced = traced
  return made


def _state(step):
  return train_state.TrainState(step, {}, {}, None, None)


_ABSTRACT = _state(jax.ShapeDtypeStruct((), jnp.float32))


def _shapes(count):
  return {"views": jax.ShapeDtypeStruct((count, 2), jnp.float32)}


def test_the_program_that_was_begun_runs(programs):
  state = _state(jnp.zeros(()))
  programs.begin("content", _ABSTRACT, _shapes(4))
  batch = {"views": jnp.ones((4, 2))}
  assert not programs.is_compiled("content", batch)
  programs.compile("content", state, batch)
  assert programs.is_compiled("content", batch)
  assert programs.run("content", state, batch)[0].step == 8
  assert programs.traced == [(4, 2)]
  assert programs.compiles == 1


def test_a_batch_of_another_shape_has_its_own_program(programs):
  state = _state(jnp.zeros(()))
  programs.begin("content", _ABSTRACT, _shapes(4))
  batch = {"views": jnp.ones((6, 2))}
  programs.compile("content", state, batch)
  assert programs.run("content", state, batch)[0].step == 12
  assert programs.traced == [(4, 2), (6, 2)]
  # What was begun and not used is no recompilation.
  assert programs.compiles == 1
  assert programs.beyond("content") == 0
  programs.compile("content", state, {"views": jnp.ones((4, 2))})
  assert programs.beyond("content") == 1
  # What another kind may still compile is not its own.
  assert programs.beyond("both") == -2


def test_a_step_that_is_run_again_counts_once(programs):
  state, batch = _state(jnp.zeros(())), {"views": jnp.ones((4, 2))}
  programs.compile("content", state, batch)
  programs.run("content", state, batch)
  counted = programs.images, programs.flops
  assert counted[0] == 2 and counted[1] > 0
  assert programs.run("content", state, batch, again=True)[0].step == 8
  assert (programs.images, programs.flops) == counted


def test_what_fails_beside_fails_where_it_is_waited_for(programs):
  programs.begin("content", _ABSTRACT, _shapes(3))
  with pytest.raises(ValueError, match="three"):
    programs.compile(
        "content", _state(jnp.zeros(())), {"views": jnp.ones((3, 2))}
    )
