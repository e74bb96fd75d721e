"""3D RepUX-Net (Lee et al., MICCAI 2023): 3D UX-Net with kernels of 21 voxels a side.

Its blocks are a depthwise convolution, batch norm and GELU, without a shortcut. In
training a prior favours the centres of the kernels.
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import numpy as np
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.conv import BatchNorm
from swinsmt_jax.layers.linear import gelu
from swinsmt_jax.models import ux_net
from swinsmt_jax.models.registry import Prior, register


@dataclass(frozen=True, kw_only=True)
class RepUXNetConfig(ux_net.StagesConfig):
    """3D RepUX-Net.

    Attributes:
        kernel_size: side of the depthwise kernels, odd.
        alpha: of the frequency prior, in voxels; 0 has no prior.
        prior_rule: what the prior acts on, of `training.prior`: "fixed" on what is
            learnt, "compound" on the kernel in each step, "released" as the
            published code does, which never trains these kernels.
    """

    kernel_size: Annotated[
        int, checks.Rule("be odd and positive", lambda k: k > 0 and k % 2 == 1)
    ] = 21
    alpha: Annotated[float, checks.Within(0.0, 1e6)] = 1.0
    prior_rule: Annotated[str, checks.Among(("fixed", "compound", "released"))] = (
        "fixed"
    )

    @property
    def prior(self) -> Prior | None:
        """The frequency prior of the depthwise kernels, [k, k, k, 1]."""
        if not self.alpha:
            return None
        weights = frequency_prior(self.kernel_size, self.alpha)[..., None]
        return Prior(self.prior_rule, r"/dwconv/kernel$", weights)


def frequency_prior(kernel_size: int, alpha: float) -> np.ndarray:
    """Return alpha / (alpha + distance to the centre in voxels), float32 [k, k, k]."""
    offsets = np.indices((kernel_size,) * 3) - kernel_size // 2
    distance = np.sqrt((offsets**2).sum(0))
    return (alpha / (alpha + distance)).astype(np.float32)


class RepUXBlock(nnx.Module):
    """Depthwise convolution, batch norm and GELU."""

    def __init__(
        self, channels: int, *, number: int, config: RepUXNetConfig, rngs: nnx.Rngs
    ):
        self.dwconv = ux_net.DepthwiseConv(
            channels, kernel_size=config.kernel_size, dtype=config.dtype, rngs=rngs
        )
        kernel, prior = self.dwconv.kernel, config.prior
        if prior is not None:
            self.dwconv.kernel = nnx.Param(
                initializers.made(lambda: kernel[...] * prior.weights, kernel.shape)
            )
        self.norm = BatchNorm(channels, dtype=config.dtype)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map [B, D, H, W, C] to the same shape; with a key, as in training."""
        return gelu(self.norm(self.dwconv(x), training=key is not None))


class RepUXNet(ux_net.UXNet):
    """3D RepUX-Net."""

    def __init__(self, config: RepUXNetConfig, *, rngs: nnx.Rngs):
        super().__init__(config, block=RepUXBlock, rngs=rngs)


register(
    "repux_net",
    RepUXNetConfig,
    RepUXNet,
    torch_names=ux_net.TORCH_NAMES._replace(
        renames=(("^uxnet_3d", "repuxnet_3d"), *ux_net.TORCH_NAMES.renames),
        unneeded=r".*\.num_batches_tracked",
    ),
    tiny={
        "depths": (1, 1, 1, 1),
        "feat_size": (3, 3, 3, 4),
        "hidden_size": 4,
        "kernel_size": 9,
    },
)
