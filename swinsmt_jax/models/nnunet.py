"""nnU-Net: the plain U-Net and the one with a residual encoder (Isensee et al.).

Both as in the package dynamic-network-architectures, without deep supervision: the
heads of the lower decoder stages are there, as they are in trained weights, but only
the last one is used.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.conv import Conv, InstanceNorm, UpConv, leaky_relu
from swinsmt_jax.layers.recompute import runner
from swinsmt_jax.network_config import PlainConvUNetConfig, ResidualEncoderUNetConfig


class ConvNorm(nnx.Module):
    """Convolution and instance norm, then a leaky ReLU unless `activate` is false."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        kernel_size: int = 3,
        strides: int = 1,
        activate: bool = True,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.activate = activate
        self.conv = Conv(
            channels,
            features,
            kernel_size=kernel_size,
            strides=strides,
            use_bias=kernel_size > 1,  # projections of shortcuts have none
            initializer=initializers.he_normal,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = InstanceNorm(features, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]."""
        x = self.norm(self.conv(x))
        return leaky_relu(x) if self.activate else x


class ConvStack(nnx.Module):
    """`count` convolutions in a row, of which the first has the stride."""

    def __init__(self, channels, features, *, count, strides=1, dtype, rngs):
        self.convs = nnx.List(
            ConvNorm(
                features if i else channels,
                features,
                strides=1 if i else strides,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(count)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]."""
        for conv in self.convs:
            x = conv(x)
        return x


class AveragePool(nnx.Module):
    """Mean of every cube of `size` voxels a side."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/size, H/size, W/size, C]."""
        b, d, h, w, c = x.shape
        n = self.size
        cubes = x.reshape(b, d // n, n, h // n, n, w // n, n, c)
        return jnp.mean(cubes, axis=(2, 4, 6), dtype=jnp.float32).astype(x.dtype)


class ResidualConvs(nnx.Module):
    """Two convolutions and a shortcut, pooled and projected where the shape changes."""

    def __init__(self, channels, features, *, strides, dtype, rngs):
        self.conv1 = ConvNorm(
            channels, features, strides=strides, dtype=dtype, rngs=rngs
        )
        self.conv2 = ConvNorm(
            features, features, activate=False, dtype=dtype, rngs=rngs
        )
        skip = [AveragePool(strides)] if strides > 1 else []
        if channels != features:
            projection = ConvNorm(
                channels,
                features,
                kernel_size=1,
                activate=False,
                dtype=dtype,
                rngs=rngs,
            )
            skip.append(projection)
        self.skip = nnx.List(skip)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]."""
        y = self.conv2(self.conv1(x))
        for part in self.skip:
            x = part(x)
        return leaky_relu(y + x.astype(y.dtype))


class ResidualStack(nnx.Module):
    """`count` residual blocks in a row, of which the first has the stride."""

    def __init__(self, channels, features, *, count, strides, dtype, rngs):
        self.blocks = nnx.List(
            ResidualConvs(
                features if i else channels,
                features,
                strides=1 if i else strides,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(count)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]."""
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(nnx.Module):
    """Stages of convolutions or, behind a stem, of residual blocks."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.recompute = "encoder" in config.remat
        features, dtype = config.features_per_stage, config.dtype
        residual = isinstance(config, ResidualEncoderUNetConfig)
        stage = ResidualStack if residual else ConvStack
        counts = config.n_blocks_per_stage if residual else config.n_conv_per_stage
        channels = features[0] if residual else config.in_channels
        self.stem = (
            ConvStack(config.in_channels, channels, count=1, dtype=dtype, rngs=rngs)
            if residual
            else None
        )
        self.stages = nnx.List(
            stage(before, after, count=count, strides=stride, dtype=dtype, rngs=rngs)
            for before, after, count, stride in zip(
                (channels, *features), features, counts, config.strides, strict=False
            )
        )

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Return the result of every stage, the finest first."""
        run = runner(self.recompute)
        x = x if self.stem is None else run(self.stem, x)
        results = []
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"encoder{i}"):
                x = run(stage, x)
            results.append(x)
        return results


class Decoder(nnx.Module):
    """Transposed convolution, concatenation with the skip, convolutions; and heads."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.recompute = "decoder" in config.remat
        dtype, he = config.dtype, initializers.he_normal
        features = config.features_per_stage[::-1]
        pairs = list(zip(features, features[1:], strict=False))
        self.stages = nnx.List(
            ConvStack(2 * finer, finer, count=count, dtype=dtype, rngs=rngs)
            for (_, finer), count in zip(
                pairs, config.n_conv_per_stage_decoder, strict=True
            )
        )
        self.transpconvs = nnx.List(
            UpConv(
                coarser,
                finer,
                strides=stride,
                use_bias=True,
                initializer=he,
                dtype=dtype,
                rngs=rngs,
            )
            for (coarser, finer), stride in zip(
                pairs, config.strides[:0:-1], strict=True
            )
        )
        self.seg_layers = nnx.List(
            Conv(
                finer,
                config.out_channels,
                kernel_size=1,
                use_bias=True,
                initializer=he,
                dtype=dtype,
                rngs=rngs,
            )
            for _, finer in pairs
        )

    def __call__(self, skips: list[jax.Array]) -> jax.Array:
        """Return the features of the finest stage."""

        def level(up, stage, x, skip):
            return stage(jnp.concatenate([up(x), skip], axis=-1))

        run = nnx.remat(level) if self.recompute else level
        x = skips[-1]
        for i, skip in enumerate(skips[-2::-1]):
            with jax.named_scope(f"decoder{i}"):
                x = run(self.transpconvs[i], self.stages[i], x, skip)
        return x


class NNUNet(nnx.Module):
    """nnU-Net, plain or with a residual encoder, as the type of the config says.

    Args:
        config: `PlainConvUNetConfig` or `ResidualEncoderUNetConfig`.
        rngs: initialises the parameters, in float32.
    """

    def __init__(
        self,
        config: PlainConvUNetConfig | ResidualEncoderUNetConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.total_stride = config.total_stride
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Segment a batch of volumes.

        Args:
            x: [B, D, H, W, C_in], every side a multiple of `total_stride`.
            rngs: taken for the sake of one interface; nothing here is random.

        Returns:
            float32 logits [B, D, H, W, K].

        Raises:
            UserError: for a wrong rank, number of channels or side.
        """
        y = self.features(x, rngs=rngs)
        with jax.named_scope("head"):
            return self.head(y).astype(jnp.float32)

    @property
    def head(self) -> Conv:
        """The last layer, from features to logits."""
        return self.decoder.seg_layers[-1]

    def features(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return what the head is applied to, [B, D, H, W, F]."""
        checks.image_batch(
            x.shape, channels=self.config.in_channels, stride=self.total_stride
        )
        return self.decoder(self.encoder(x))
