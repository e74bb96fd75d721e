import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from swinsmt_jax.ops import convolution


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def convolve_3d(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


@pytest.mark.parametrize("shape", [(2, 4, 5, 6, 3), (1, 1, 3, 2, 4), (1, 2, 1, 1, 1)])
def test_conv3x3x3_equals_the_direct_convolution_with_its_gradients(rng, shape):
    x, kernel = draw(rng, *shape), draw(rng, 3, 3, 3, shape[-1], 5)
    cotangent = draw(rng, *shape[:4], 5)
    ours, pullback = jax.vjp(convolution.conv3x3x3, x, kernel)
    theirs, expected = jax.vjp(convolve_3d, x, kernel)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for a, b in zip(pullback(cotangent), expected(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_conv3x3x3_is_a_3d_convolution_on_accelerators_and_2d_on_cpu(rng):
    x, kernel = draw(rng, 1, 4, 4, 4, 2), draw(rng, 3, 3, 3, 2, 2)
    program = jax.jit(convolution.conv3x3x3)
    cuda = jax.export.export(program, platforms=("cuda",))(x, kernel).mlir_module()
    cpu = jax.export.export(program, platforms=("cpu",))(x, kernel).mlir_module()
    assert "[b, 0, 1, 2, f]" in cuda and "[b, 0, 1, f]" not in cuda
    assert "[b, 0, 1, f]" in cpu and "[b, 0, 1, 2, f]" not in cpu


def test_patchify_equals_a_strided_convolution(rng):
    x, kernel = draw(rng, 2, 4, 6, 8, 3), draw(rng, 2, 2, 2, 3, 5)
    expected = lax.conv_general_dilated(
        x, kernel, (2, 2, 2), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    np.testing.assert_allclose(convolution.patchify(x, kernel), expected, atol=1e-5)


def test_unpatchify_is_the_adjoint_of_patchify(rng):
    x, y = draw(rng, 2, 4, 6, 8, 3), draw(rng, 2, 2, 3, 4, 5)
    kernel = draw(rng, 2, 2, 2, 3, 5)
    left = jnp.vdot(convolution.patchify(x, kernel), y)
    right = jnp.vdot(x, convolution.unpatchify(y, kernel.swapaxes(3, 4)))
    np.testing.assert_allclose(left, right, rtol=1e-4)
