"""The initial train state."""

from mcjepa_jax.step import train_state
from mcjepa_jax.training import build
from tests.helpers import arrays, tiny


def test_parameters_depend_on_the_seed_and_on_no_batch_size():
  model = build.model(tiny.config())
  optimizers = build.optimizers(tiny.config(content__batch_size=16))
  one = train_state.init_state(model, optimizers, 3)
  two = train_state.init_state(model, optimizers, 3)
  other = train_state.init_state(model, optimizers, 4)
  assert arrays.trees_equal(one, two)
  assert not arrays.trees_equal(one.params, other.params)
