"""3 x 3 x 3 convolutions as 2-D ones over planes that are stacked into channels.

No network uses them: `benchmarks.gpu_variants` measures what they would change.
"""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, D, H, W, C] with [3, 3, 3, C, O], stride 1, zero padding 1."""
    b, d, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    stacked = jnp.concatenate([padded[:, i : i + d] for i in range(3)], axis=-1)
    taps = jnp.concatenate([*kernel], axis=2)  # [3, 3, 3 C, O]
    y = lax.conv_general_dilated(
        stacked.reshape(b * d, h, w, -1),
        taps,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, d, h, w, -1)


def _backward(operands, cotangent):
    """The input's gradient is such a convolution too."""
    x, kernel = operands
    flipped = kernel[::-1, ::-1, ::-1].swapaxes(3, 4)
    _, of_kernel = jax.vjp(lambda k: conv.fun(x, k), kernel)
    return conv(cotangent, flipped), *of_kernel(cotangent)


conv.defvjp(lambda *operands: (conv.fun(*operands), operands), _backward)
