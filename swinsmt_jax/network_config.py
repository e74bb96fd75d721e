"""Typed, checked configs of the networks that Swin SMT is compared with.

Imports no jax. `config.MODEL_CONFIGS` lists them with Swin UNETR and Swin SMT.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swinsmt_jax import checks

DTYPES = ("float32", "bfloat16")
REMAT_PARTS = ("encoder", "decoder")


@dataclass(frozen=True, kw_only=True)
class PlainConvUNetConfig:
    """Plain nnU-Net (Isensee et al. 2021): a U-Net of stacked convolutions.

    Attributes:
        in_channels: channels of the image, 1 for CT.
        out_channels: classes, background included.
        features_per_stage: channels of each encoder stage; their number is the depth.
        strides: of each stage's first convolution, 1 or 2; the first one is 1.
        n_conv_per_stage: convolutions of each encoder stage, one number or one each.
        n_conv_per_stage_decoder: the same of the decoder, which has a stage fewer.
        dtype: of matrix products and convolutions: "float32" or "bfloat16".
        remat: parts whose activations are recomputed in the backward pass, of
            "encoder" and "decoder".
    """

    in_channels: int
    out_channels: int
    features_per_stage: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[int, ...] = (1, 2, 2, 2, 2, 2)
    n_conv_per_stage: int | tuple[int, ...] = 2
    n_conv_per_stage_decoder: int | tuple[int, ...] = 2
    dtype: str = "float32"
    remat: tuple[str, ...] = ()

    def __post_init__(self):
        settle(self, REMAT_PARTS)
        _check_pyramid(self)
        spread(self, "n_conv_per_stage", len(self.features_per_stage))
        spread(self, "n_conv_per_stage_decoder", len(self.features_per_stage) - 1)

    @property
    def total_stride(self) -> int:
        """Number of which every side of the input must be a multiple."""
        return math.prod(self.strides)

    @property
    def input_shape(self) -> None:
        """Any shape of whole strides is taken."""
        return None


@dataclass(frozen=True, kw_only=True)
class ResidualEncoderUNetConfig:
    """nnU-Net with a residual encoder (Isensee et al. 2024), presets M and L.

    The presets share this network and differ in the patch and batch that they plan.

    Attributes:
        in_channels, out_channels, features_per_stage, strides, dtype, remat,
            n_conv_per_stage_decoder: see `PlainConvUNetConfig`.
        n_blocks_per_stage: residual blocks of each encoder stage, one number or one
            each.
    """

    in_channels: int
    out_channels: int
    features_per_stage: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[int, ...] = (1, 2, 2, 2, 2, 2)
    n_blocks_per_stage: int | tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    n_conv_per_stage_decoder: int | tuple[int, ...] = 1
    dtype: str = "float32"
    remat: tuple[str, ...] = ()

    def __post_init__(self):
        settle(self, REMAT_PARTS)
        _check_pyramid(self)
        spread(self, "n_blocks_per_stage", len(self.features_per_stage))
        spread(self, "n_conv_per_stage_decoder", len(self.features_per_stage) - 1)

    @property
    def total_stride(self) -> int:
        """Number of which every side of the input must be a multiple."""
        return math.prod(self.strides)

    @property
    def input_shape(self) -> None:
        """Any shape of whole strides is taken."""
        return None


@dataclass(frozen=True, kw_only=True)
class UNETRConfig:
    """UNETR (Hatamizadeh et al. 2022): a vision transformer of 12 layers as encoder.

    Attributes:
        in_channels, out_channels, dtype, remat: see `PlainConvUNetConfig`.
        img_size: the only input shape (D, H, W) that the network takes, or its side;
            multiples of 16. Every patch has a learnt position embedding.
        feature_size: channels of the finest decoder stage.
        hidden_size: channels of the transformer, a multiple of `num_heads`.
        mlp_dim: hidden channels of its MLPs.
        num_heads: attention heads.
        qkv_bias: whether queries, keys and values have a bias.
        dropout_rate: after embedding, projections, MLPs and on attention weights.
    """

    in_channels: int
    out_channels: int
    img_size: int | tuple[int, ...]
    feature_size: int = 16
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_heads: int = 12
    qkv_bias: bool = False
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: tuple[str, ...] = ()

    def __post_init__(self):
        settle(self, REMAT_PARTS)
        spread(self, "img_size", 3)
        checks.spatial_shape("model.img_size", self.img_size, self.total_stride)
        for name in ("feature_size", "hidden_size", "mlp_dim", "num_heads"):
            checks.positive(f"model.{name}", getattr(self, name))
        checks.require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size is {self.hidden_size}, but must be a multiple of "
            f"model.num_heads, {self.num_heads}.",
        )
        checks.in_range("model.dropout_rate", self.dropout_rate, 0.0, 1.0)

    @property
    def total_stride(self) -> int:
        """Number of which every side of the input must be a multiple: the patch."""
        return 16

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The only spatial shape that the network takes."""
        return self.img_size


@dataclass(frozen=True, kw_only=True)
class UXNetConfig:
    """3D UX-Net (Lee et al. 2023): large-kernel depthwise convolutions as encoder.

    Attributes:
        in_channels, out_channels, dtype, remat: see `PlainConvUNetConfig`.
        depths: blocks of each of the four stages.
        feat_size: channels of each stage.
        hidden_size: channels at the bottom of the decoder.
        drop_path_rate: stochastic depth, rising linearly from 0 to this rate.
        layer_scale_init_value: initial value of the blocks' layer scale.
    """

    in_channels: int
    out_channels: int
    depths: tuple[int, ...] = (2, 2, 2, 2)
    feat_size: tuple[int, ...] = (48, 96, 192, 384)
    hidden_size: int = 768
    drop_path_rate: float = 0.0
    layer_scale_init_value: float = 1e-6
    dtype: str = "float32"
    remat: tuple[str, ...] = ()

    def __post_init__(self):
        settle(self, REMAT_PARTS)
        spread(self, "depths", 4)
        spread(self, "feat_size", 4)
        checks.positive("model.hidden_size", self.hidden_size)
        checks.in_range("model.drop_path_rate", self.drop_path_rate, 0.0, 1.0)
        checks.require(
            self.layer_scale_init_value > 0,
            f"model.layer_scale_init_value is {self.layer_scale_init_value}, but must "
            "be positive: a block scaled by 0 learns nothing.",
        )

    @property
    def total_stride(self) -> int:
        """Number of which every side of the input must be a multiple."""
        return 16

    @property
    def input_shape(self) -> None:
        """Any shape of whole strides is taken."""
        return None


@dataclass(frozen=True, kw_only=True)
class NNFormerConfig:
    """nnFormer (Zhou et al. 2023), in its published form for abdominal CT.

    Attributes:
        in_channels, out_channels, dtype, remat: see `PlainConvUNetConfig`.
        crop_size: the only input shape (D, H, W) that the network takes, or its side;
            multiples of 16, 32 and 32. Where a stage's grid is smaller than its
            window, the window and its table of positions shrink to the grid.
        embedding_dim: channels of the first stage, doubled at each further one.
        depths: transformer blocks per stage; those of the first three are the
            decoder's too.
        num_heads: attention heads per stage.
        patch_size: (2, 4, 4), for which alone the embedding's strides are published.
        window_size: side of the attention window per stage.
        drop_path_rate: stochastic depth, rising linearly from 0 to this rate.
    """

    in_channels: int
    out_channels: int
    crop_size: int | tuple[int, ...]
    embedding_dim: int = 192
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (6, 12, 24, 48)
    patch_size: tuple[int, ...] = (2, 4, 4)
    window_size: tuple[int, ...] = (4, 4, 8, 4)
    drop_path_rate: float = 0.2
    dtype: str = "float32"
    remat: tuple[str, ...] = ()

    def __post_init__(self):
        settle(self, REMAT_PARTS)
        spread(self, "crop_size", 3)
        for name in ("depths", "num_heads", "window_size"):
            spread(self, name, 4)
        checks.positive("model.embedding_dim", self.embedding_dim)
        checks.one_of("model.patch_size", self.patch_size, [(2, 4, 4)])
        checks.spatial_shape(
            "model.crop_size", self.crop_size, [8 * p for p in self.patch_size]
        )
        checks.in_range("model.drop_path_rate", self.drop_path_rate, 0.0, 1.0)
        checks.require(
            self.embedding_dim % 2 == 0,
            f"model.embedding_dim is {self.embedding_dim}, but must be even.",
        )
        for stage, heads in enumerate(self.num_heads):
            channels = self.embedding_dim * 2**stage
            checks.require(
                channels % heads == 0,
                f"model.num_heads is {self.num_heads}: stage {stage + 1} has "
                f"{channels} channels, which {heads} heads do not divide.",
            )

    @property
    def total_stride(self) -> int:
        """Smallest number of which all sides may be multiples; the depth needs less."""
        return 8 * max(self.patch_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The only spatial shape that the network takes."""
        return self.crop_size


def dtype_name(name: str, dtype: object) -> str:
    """Return "float32" or "bfloat16", also for jnp.bfloat16 and np.float32.

    Raises:
        UserError: for another dtype.
    """
    if not isinstance(dtype, str):
        dtype = getattr(dtype, "__name__", str(dtype))
    checks.one_of(name, dtype, DTYPES)
    return dtype


def settle(config: object, parts: Sequence[str]) -> None:
    """Check what the configs of all networks share: types, channels, dtype and remat.

    Args:
        config: whose lists become tuples, and whose dtype a name.
        parts: what `remat` may name.

    Raises:
        UserError: for a field of another type or out of range.
    """
    name = dtype_name("model.dtype", config.dtype)
    object.__setattr__(config, "dtype", name)
    checks.typed_fields("model", config)
    for name in ("in_channels", "out_channels"):
        checks.positive(f"model.{name}", getattr(config, name))
    for part in config.remat:
        checks.one_of("an entry of model.remat", part, parts)


def spread(config: object, name: str, length: int) -> None:
    """Repeat a single number, and require `length` whole numbers of at least 1.

    Raises:
        UserError: for another number of entries, or one below 1.
    """
    value = getattr(config, name)
    value = (value,) * length if isinstance(value, int) else value
    object.__setattr__(config, name, value)
    checks.require(
        len(value) == length,
        f"model.{name} is {value}, but must have {length} entries.",
    )
    for entry in value:
        checks.positive(f"an entry of model.{name} {value}", entry)


def _check_pyramid(config):
    depth = len(config.features_per_stage)
    checks.require(
        depth >= 2,
        f"model.features_per_stage is {config.features_per_stage}, but must have at "
        "least 2 entries: a U-Net has a stage to come up from.",
    )
    spread(config, "features_per_stage", depth)
    spread(config, "strides", depth)
    for stride in config.strides:
        checks.one_of(f"an entry of model.strides {config.strides}", stride, (1, 2))
    checks.require(
        config.strides[0] == 1,
        f"model.strides is {config.strides}, but must begin with 1: the logits have "
        "the grid of the first stage.",
    )
