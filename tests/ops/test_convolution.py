import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import stacked_planes
from swinsmt_jax.ops import by_platform, convolution


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def convolve_3d(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 5, 6, 3),
        (1, 1, 3, 2, 4),
        (1, 2, 1, 1, 1),
        (2, 3, 64, 66, 6),
        (1, 5, 37, 40, 2),  # in strips of single rows
        (2, 1, 48, 33, 1),
        (1, 4, 36, 33, 5),  # in the place of its input
    ],
)
def test_conv3x3x3_equals_the_direct_convolution_with_its_gradients(rng, shape):
    x, kernel = draw(rng, *shape), draw(rng, 3, 3, 3, shape[-1], 5)
    cotangent = draw(rng, *shape[:4], 5)
    ours, pullback = jax.vjp(by_platform.conv3x3x3, x, kernel)
    theirs, expected = jax.vjp(convolve_3d, x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)
    for a, b in zip(pullback(cotangent), expected(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6, 3), (1, 1, 3, 2, 8), (1, 2, 1, 1, 1)])
def test_stacked_planes_equal_the_direct_convolution_with_its_gradients(rng, shape):
    x, kernel = draw(rng, *shape), draw(rng, 3, 3, 3, shape[-1], 5)
    cotangent = draw(rng, *shape[:4], 5)
    ours, pullback = jax.vjp(stacked_planes.conv, x, kernel)
    theirs, expected = jax.vjp(convolve_3d, x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)
    for a, b in zip(pullback(cotangent), expected(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_stacked_planes_are_2d_convolutions_forward_and_backward(rng):
    x, kernel = draw(rng, 1, 4, 4, 4, 2), draw(rng, 3, 3, 3, 2, 5)
    gradient = jax.grad(lambda *operands: stacked_planes.conv(*operands).sum(), (0, 1))
    text = str(jax.make_jaxpr(gradient)(x, kernel))
    assert text.count("conv_general_dilated[") == text.count("strides=(1, 1)\n") >= 3


def test_the_results_in_place_of_the_first_part_leave_the_operands(rng):
    parts, kernel = (
        [draw(rng, 1, 4, 36, 33, c) for c in (4, 2)],
        draw(rng, 3, 3, 3, 6, 4),
    )
    joined = jnp.concatenate(parts, axis=-1)
    for _ in range(2):
        ours = by_platform.conv3x3x3(*parts, kernel)
        np.testing.assert_allclose(
            ours, convolve_3d(joined, kernel), rtol=1e-5, atol=5e-5
        )


def test_a_nan_reaches_only_its_neighbours(rng):
    x, kernel = draw(rng, 1, 4, 36, 36, 1), draw(rng, 3, 3, 3, 1, 1)
    found = by_platform.conv3x3x3(x.at[0, 0, 0, 0].set(jnp.nan), kernel)
    found = np.isnan(found[0, ..., 0])
    assert found[:2, :2, :2].all() and found.sum() == 8


def test_conv3x3x3_is_a_3d_convolution_on_accelerators_and_2d_on_cpu(rng):
    x, kernel = draw(rng, 1, 4, 8, 8, 2), draw(rng, 3, 3, 3, 2, 2)
    program = jax.jit(by_platform.conv3x3x3)
    cuda = jax.export.export(program, platforms=("cuda",))(x, kernel).mlir_module()
    cpu = jax.export.export(program, platforms=("cpu",))(x, kernel).mlir_module()
    assert "[b, 0, 1, 2, f]" in cuda and "[b, 0, 1, f]" not in cuda
    assert "[b, 0, 1, f]" in cpu and "[b, 0, 1, 2, f]" not in cpu


def by_autodiff(convolve):
    """Return the form that convolves as on an accelerator."""
    return by_platform.Form(
        lambda *operands: (convolve(*operands), ()),
        lambda operands, _, cotangent: jax.vjp(convolve, *operands)[1](cotangent),
    )


ON_ACCELERATORS = by_platform.of_concatenation(by_autodiff(convolution.conv))


@pytest.mark.parametrize(
    "conv",
    [
        by_platform.conv3x3x3,
        by_platform.pointwise_conv,
        by_platform.choose(default=ON_ACCELERATORS, cpu=ON_ACCELERATORS),
    ],
    ids=["conv3x3x3", "pointwise_conv", "on accelerators"],
)
@pytest.mark.parametrize("side", [4, 64])
def test_several_arrays_are_convolved_as_their_concatenation(rng, conv, side):
    parts = [draw(rng, 1, 2, side, side, channels) for channels in (3, 2)]
    sides = () if conv is by_platform.pointwise_conv else (3, 3, 3)
    kernel, joined = draw(rng, *sides, 5, 4), jnp.concatenate(parts, axis=-1)
    ours, pullback = jax.vjp(conv, *parts, kernel)
    theirs, expected = jax.vjp(convolve_3d if sides else jnp.matmul, joined, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)
    *of_parts, of_kernel = pullback(ours)
    found = jnp.concatenate(of_parts, axis=-1), of_kernel
    for a, b in zip(found, expected(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-3)


def test_several_arrays_are_not_copied_side_by_side_on_a_cpu():
    part = jax.ShapeDtypeStruct((1, 16, 64, 64, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 16, 8), jnp.float32)
    program = jax.jit(by_platform.conv3x3x3).lower(part, part, kernel).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * part.size  # half of the copy


@pytest.mark.parametrize("sides", [(3, 3, 1), (1, 3, 1), (3, 1, 3), (3, 1, 1)])
def test_flat_conv_equals_the_direct_convolution_with_its_gradients(rng, sides):
    x, kernel = draw(rng, 2, 4, 5, 6, 3), draw(rng, *sides, 3, 5)
    ours, pullback = jax.vjp(by_platform.flat_conv, x, kernel)
    theirs, expected = jax.vjp(convolve_3d, x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)
    for a, b in zip(pullback(ours), expected(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("side", "strides"), [(3, (1, 2, 2)), (7, (2, 2, 2))])
def test_strided_conv_equals_the_direct_convolution_with_its_gradients(
    rng, side, strides
):
    x, kernel = draw(rng, 2, 4, 6, 2, 3), draw(rng, side, side, side, 3, 5)

    def direct(x, kernel):
        half = ((side // 2, side // 2),) * 3
        return lax.conv_general_dilated(
            x, kernel, strides, half, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    def ours(x, kernel):
        return by_platform.strided_conv(x, kernel, strides)

    @jax.jit
    def run(x, kernel):
        wanted, expected = jax.vjp(direct, x, kernel)
        result, pullback = jax.vjp(ours, x, kernel)
        return (wanted, *expected(wanted)), (result, *pullback(wanted))

    for a, b in zip(*run(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * jnp.abs(a).max())
    program = jax.export.export(jax.jit(ours), platforms=("cuda",))(x, kernel)
    assert f"stride = {list(strides)}" in program.mlir_module()


def test_strided_conv_does_not_copy_its_input_on_a_cpu():
    x = jax.ShapeDtypeStruct((1, 32, 64, 64, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 8, 8), jnp.float32)
    program = jax.jit(lambda *o: by_platform.strided_conv(*o, (2, 2, 2)))
    program = program.lower(x, kernel).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * x.size / 2


@pytest.mark.parametrize("side", [5, 9])  # by shifted sums, and by transforms
def test_depthwise_conv_equals_the_grouped_convolution_with_its_gradients(rng, side):
    x, kernel = draw(rng, 2, 3, 13, 4, 3), draw(rng, side, side, side, 3)

    def grouped(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel[:, :, :, None],
            (1, 1, 1),
            "SAME",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            feature_group_count=3,
        )

    @jax.jit
    def run(x, kernel):
        wanted, expected = jax.vjp(grouped, x, kernel)
        result, pullback = jax.vjp(by_platform.depthwise_conv, x, kernel)
        return (wanted, *expected(wanted)), (result, *pullback(wanted))

    for a, b in zip(*run(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * jnp.abs(a).max())
    export = jax.export.export(jax.jit(by_platform.depthwise_conv), platforms=("tpu",))
    program = export(x, kernel).mlir_module()
    assert ("feature_group_count = 3" in program) == (side == 5)


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


@pytest.mark.parametrize("side", [4, 36])
@pytest.mark.parametrize("with_bias", [False, True])
def test_up_conv_equals_unpatchify_with_its_gradients(rng, side, with_bias):
    x, kernel = draw(rng, 2, 2, side, 3, 3), draw(rng, 1, 2, 5, 3, 4)
    operands = (x, kernel, draw(rng, 4)) if with_bias else (x, kernel)
    ours, pullback = jax.vjp(by_platform.up_conv, *operands)
    theirs, expected = jax.vjp(convolution.unpatchify, *operands)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(pullback(ours), expected(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_up_conv_makes_its_result_in_place_on_a_cpu():
    x, kernel = jnp.zeros((1, 32, 32, 32, 16)), jnp.zeros((2, 2, 2, 16, 16))
    program = jax.jit(by_platform.up_conv).lower(x, kernel, jnp.zeros(16)).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * memory.output_size_in_bytes
