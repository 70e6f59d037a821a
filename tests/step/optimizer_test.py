"""The schedule, the decay mask and the optimizer of a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax import errors
from mcjepa_jax.step import optimizer

PARAMS = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}


def _schedule(**changes):
  keys = dict(learning_rate=0.4, warmup_steps=4, num_steps=11)
  return optimizer.schedule(**(keys | changes))


def _update(tx, grads, params=PARAMS):
  updates, _ = tx.update(grads, tx.init(params), params)
  return updates


def test_warm_up_is_linear_and_its_first_update_moves():
  rates = [_schedule()(k) for k in range(4)]
  np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def test_cosine_halves_in_its_middle_and_ends_with_the_last_update():
  rate = _schedule()
  np.testing.assert_allclose(rate(4), 0.4, rtol=1e-6)
  np.testing.assert_allclose(rate(7), 0.2, rtol=1e-6)
  np.testing.assert_allclose(rate(10), 0.0, atol=1e-7)


def test_cosine_ends_at_its_floor_and_stays_there():
  rate = _schedule(final_fraction=0.25)
  np.testing.assert_allclose(rate(7), 0.4 * (1 + 0.25) / 2, rtol=1e-6)
  np.testing.assert_allclose([rate(10), rate(50)], 0.1, rtol=1e-6)


def test_without_warm_up_the_first_update_has_the_peak():
  np.testing.assert_allclose(_schedule(warmup_steps=0)(0), 0.4, rtol=1e-6)


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
  rate = _schedule(warmup_steps=11)
  rates = [rate(k) for k in range(11)]
  np.testing.assert_allclose(rates, 0.4 * np.arange(1, 12) / 11, rtol=1e-6)


def test_schedule_takes_a_traced_count():
  rate = _schedule()
  traced = jax.vmap(rate)(jnp.arange(11))
  np.testing.assert_allclose(traced, [rate(k) for k in range(11)], atol=1e-7)


def test_decay_spares_parameters_of_one_axis_and_scalars():
  params = PARAMS | {"scale": jnp.ones(())}
  mask = optimizer.decay_mask(params)
  assert mask == {"kernel": True, "bias": False, "scale": False}


def test_decay_is_decoupled_from_the_gradient():
  tx = optimizer.make_optimizer(
      learning_rate=0.5, num_steps=10, weight_decay=0.1
  )
  updates = _update(tx, jax.tree.map(jnp.zeros_like, PARAMS))
  # -learning_rate x weight_decay x parameter, whatever Adam divides by.
  np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 2, rtol=1e-6)
  np.testing.assert_allclose(updates["bias"], 0.0)


def test_two_updates_equal_adam_by_hand():
  b1, b2, eps = 0.8, 0.9, 1e-3
  tx = optimizer.make_optimizer(
      learning_rate=0.1, num_steps=2, b1=b1, b2=b2, eps=eps, final_fraction=0.5
  )
  params = {"bias": jnp.array([1.0, -1.0])}
  state = tx.init(params)
  m = v = 0.0
  for k, rate in ((1, 0.1), (2, 0.05)):
    grad = np.array([0.3, -2.0]) * k
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
    expected = m / (1 - b1**k) / (np.sqrt(v / (1 - b2**k)) + eps)
    grads = {"bias": jnp.asarray(grad, jnp.float32)}
    updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["bias"], -rate * expected, rtol=1e-4)


def test_clip_scales_the_whole_group_to_its_norm():
  # With eps far above the gradient Adam is linear in it.
  keys = dict(learning_rate=1.0, num_steps=10, eps=1e6)
  grads = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}
  free = _update(optimizer.make_optimizer(**keys), grads)
  clipped = _update(optimizer.make_optimizer(**keys, clip_norm=1.5), grads)
  np.testing.assert_allclose(clipped["kernel"], free["kernel"] / 4, rtol=1e-5)
  loose = _update(optimizer.make_optimizer(**keys, clip_norm=7.0), grads)
  np.testing.assert_allclose(loose["kernel"], free["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": -1.0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"num_steps": 0},
        {"warmup_steps": 11},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"clip_norm": -1.0},
        {"final_fraction": 1.5},
    ],
    ids=str,
)
def test_an_impossible_value_is_named(changes):
  ((name, value),) = changes.items()
  with pytest.raises(errors.UserError, match=f"{name}: expected .* {value}"):
    optimizer.make_optimizer(
        **(dict(learning_rate=1.0, num_steps=10) | changes)
    )


def test_all_impossible_values_are_named_at_once():
  with pytest.raises(errors.UserError) as caught:
    optimizer.make_optimizer(
        learning_rate=-1.0, num_steps=10, weight_decay=-1.0
    )
  assert len(caught.value.messages) == 2
