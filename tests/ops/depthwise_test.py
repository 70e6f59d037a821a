"""The forms of the depthwise convolution agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjepa_jax.ops import depthwise


@pytest.mark.parametrize("shape", [(2, 9, 17, 5), (1, 2, 3, 4), (3, 8, 8, 16)])
@pytest.mark.parametrize("form", ["shifts", "toeplitz"])
def test_depthwise_forms_agree_with_their_gradients(form, shape):
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape).astype(np.float32)
  kernel = rng.normal(size=(7, 7, 1, shape[-1])).astype(np.float32)
  weight = rng.normal(size=shape).astype(np.float32)

  def loss(x, kernel, form):
    y = depthwise.depthwise_conv(x, kernel, form=form)
    return jnp.sum(y * weight), y

  grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
  (dx, dkernel), y = grad(x, kernel, form)
  (dx_0, dkernel_0), y_0 = grad(x, kernel, "grouped")
  np.testing.assert_allclose(y, y_0, atol=2e-5)
  np.testing.assert_allclose(dx, dx_0, atol=2e-5)
  np.testing.assert_allclose(dkernel, dkernel_0, atol=2e-4)


@pytest.mark.parametrize("form", ["grouped", "shifts", "toeplitz"])
def test_depthwise_forms_keep_bfloat16(form):
  def loss(x, kernel):
    y = depthwise.depthwise_conv(x, kernel, form=form)
    assert y.dtype == jnp.bfloat16
    return jnp.sum(y)

  arrays = [jnp.zeros(s, jnp.bfloat16) for s in ((1, 9, 9, 2), (7, 7, 1, 2))]
  grads = jax.eval_shape(jax.grad(loss, argnums=(0, 1)), *arrays)
  assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
