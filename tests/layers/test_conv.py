import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax.layers.conv import Conv, PatchConv, UpConv

LAYERS = {
    "pointwise": lambda **kw: Conv(3, 3, kernel_size=1, use_bias=True, **kw),
    "3x3x3": lambda **kw: Conv(3, 3, kernel_size=3, use_bias=True, **kw),
    "strided": lambda **kw: Conv(3, 3, kernel_size=3, strides=2, use_bias=True, **kw),
    "patches": lambda **kw: PatchConv(3, 3, patch_size=2, **kw),
    "up": lambda **kw: UpConv(3, 3, use_bias=True, **kw),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_a_bfloat16_bias_is_summed_in_float32(name):
    """A sum in bfloat16 stays at 256: a further 1 is less than half of its last bit."""
    graphdef, params = nnx.split(LAYERS[name](dtype="bfloat16", rngs=nnx.Rngs(0)))
    x = jnp.ones((1, 16, 16, 16, 3))
    y = nnx.merge(graphdef, params)(x)
    assert y.dtype == jnp.bfloat16
    gradient = jax.grad(lambda p: nnx.merge(graphdef, p)(x).astype("f4").sum())(params)
    np.testing.assert_allclose(gradient["bias"][...], y.size // 3, rtol=0.01)
