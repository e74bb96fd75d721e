"""DiNTS (He et al. 2021): a topology of cells that was found by a search.

What a search found is data: which paths join the feature maps of one block to those of
the next, and the operation of each. The search itself is not here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers.conv import Conv, InstanceNorm
from swinsmt_jax.layers.recompute import maybe_remat
from swinsmt_jax.models import dints_architecture
from swinsmt_jax.models.dints_architecture import Cell, cells
from swinsmt_jax.models.network import Network
from swinsmt_jax.models.registry import NetworkConfig, register
from swinsmt_jax.models.torch_names import NameTable
from swinsmt_jax.ops.interpolation import resize
from swinsmt_jax.runtime.files import absolute

CHANNELS = 32  # at full resolution, times `channel_mul`
# Kernels of the convolutions of each operation; operation 0 does nothing.
KERNELS = {
    "0": (),
    "1": ((3, 3, 3),),
    "2": ((3, 3, 1), (1, 1, 3)),
    "3": ((3, 1, 3), (1, 3, 1)),
    "4": ((1, 3, 3), (3, 1, 1)),
}


@dataclass(frozen=True, kw_only=True)
class DiNTSConfig(NetworkConfig):
    """DiNTS (He et al. 2021): a topology of cells that was found by a search.

    Attributes:
        architecture: "published"; a file with what another search found, see
            `dints_architecture.read`; or its rows, which the others become, so that a
            checkpoint needs no file.
        channel_mul: factor of the channels, 32 at full resolution.
        use_downsample: whether the finest cells work at half resolution.
    """

    architecture: str | tuple[str, ...] = "published"
    channel_mul: Annotated[
        float, checks.Rule(f"be at least 1 / {CHANNELS}", lambda f: f * CHANNELS >= 1)
    ] = 1.0
    use_downsample: bool = True

    def __post_init__(self):
        rows = self.architecture
        if isinstance(rows, (str, os.PathLike)):
            file = dints_architecture.PUBLISHED
            file = file if rows == "published" else absolute(rows)
            rows = dints_architecture.read(file)
            object.__setattr__(self, "architecture", rows)
        super().__post_init__()
        dints_architecture.check(self.architecture, "model.architecture")

    @property
    def num_depths(self) -> int:
        """Number of resolutions of the cells."""
        return dints_architecture.depths(self.architecture)

    @property
    def total_stride(self) -> int:
        """Divisor of every side of the input."""
        return 2 ** (self.num_depths - 1 + self.use_downsample)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels at full resolution and at each half of it."""
        count = self.num_depths + self.use_downsample
        return tuple(int(CHANNELS * 2**i * self.channel_mul) for i in range(count))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the cells at each depth."""
        return self.channels[int(self.use_downsample) :]

    def check_patch(self, name: str, shape: Sequence[int]) -> None:
        """Raise `UserError` also where the coarsest grid is a single voxel."""
        super().check_patch(name, shape)
        checks.require(
            max(shape) > self.total_stride,
            f"{name} has shape {tuple(shape)}, but one side must be at least "
            f"{2 * self.total_stride}: the coarsest grid would be a single voxel, which"
            " an instance norm makes 0.",
        )


class ReLUConvNorm(nnx.Module):
    """ReLU, convolutions without a bias, and an instance norm."""

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        kernels: tuple = ((3, 3, 3),),
        strides: int = 1,
        dtype: str,
        rngs: nnx.Rngs,
    ):

        def conv(inputs, size, strides=1):
            sizes = {"kernel_size": size, "strides": strides}
            return Conv(inputs, features, **sizes, dtype=dtype, rngs=rngs)

        self.conv = conv(channels, kernels[0], strides)
        self.conv_1 = conv(features, kernels[1]) if len(kernels) > 1 else None
        self.norm = InstanceNorm(features, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/s, H/s, W/s, O]."""
        x = self.conv(jax.nn.relu(x))
        return self.norm(x if self.conv_1 is None else self.conv_1(x))


def double(x: jax.Array) -> jax.Array:
    """Interpolate [B, D, H, W, C] to sides twice as long."""
    return resize(x, [2 * side for side in x.shape[1:4]])


class Up(ReLUConvNorm):
    """Double the grid; then ReLU, a pointwise convolution and a norm."""

    def __init__(self, channels: int, features: int, **common: Any):
        super().__init__(channels, features, kernels=((1, 1, 1),), **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, 2D, 2H, 2W, O]."""
        return super().__call__(double(x))


class Down(nnx.Module):
    """Halve the grid: one half of the channels from even voxels, one from odd ones."""

    def __init__(self, channels: int, features: int, *, dtype: str, rngs: nnx.Rngs):
        common: dict = {"kernel_size": 1, "dtype": dtype, "rngs": rngs}
        self.conv_1 = Conv(channels, features // 2, **common)
        self.conv_2 = Conv(channels, features - features // 2, **common)
        self.norm = InstanceNorm(features, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, D/2, H/2, W/2, O]."""
        x = jax.nn.relu(x)
        even = self.conv_1(x[:, ::2, ::2, ::2])
        odd = self.conv_2(x[:, 1::2, 1::2, 1::2])
        return self.norm(jax.numpy.concatenate([even, odd], axis=-1))


class CellOf(nnx.Module):
    """Bring a feature map to the target's grid and channels; then the operation."""

    def __init__(self, cell: Cell, widths: tuple[int, ...], **common: Any):
        before, after = widths[cell.source], widths[cell.target]
        resample = {-1: Up, 0: None, 1: Down}[cell.target - cell.source]
        kernels = KERNELS[cell.operation]
        self.preprocess = resample and resample(before, after, **common)
        self.op = (
            ReLUConvNorm(after, after, kernels=kernels, **common) if kernels else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map the source's [B, D, H, W, C] to the target's."""
        for part in (self.preprocess, self.op):
            x = x if part is None else part(x)
        return x


class Block(nnx.Module):
    """The cells between two columns of feature maps."""

    def __init__(self, row: str, widths: tuple[int, ...], **common: Any):
        self.row = row
        for cell in cells(row):
            setattr(self, f"cell{cell.path}", CellOf(cell, widths, **common))

    def __call__(self, nodes: list) -> list:
        """Map the feature maps, finest first, to the next ones; None for no map."""
        sums: list = [None] * len(nodes)
        for path, source, target, _ in cells(self.row):
            y = getattr(self, f"cell{path}")(nodes[source])
            sums[target] = _sum(sums[target], y)
        return sums


def _sum(x, y):
    """Add two feature maps; None means none."""
    return x if y is None else y if x is None else x + y


class StemDown(nnx.Module):
    """Bring the image to the grid and channels of a depth."""

    def __init__(self, depth: int, config: DiNTSConfig, **common: Any):
        self.depth = depth
        width = config.channels[depth]
        self.conv = Conv(config.in_channels, width, kernel_size=3, **common)
        self.norm = InstanceNorm(width, dtype=config.dtype)
        self.halve = (
            ReLUConvNorm(width, config.channels[depth + 1], strides=2, **common)
            if config.use_downsample
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map the image [B, D, H, W, C_in] to the first feature map of the depth."""
        x = resize(x, [side // 2**self.depth for side in x.shape[1:4]])
        x = self.norm(self.conv(x.astype(self.conv.dtype)))
        return x if self.halve is None else self.halve(x)


class StemUp(ReLUConvNorm):
    """Bring the sum of a depth to channels and grid of the next finer one."""

    def __init__(self, depth: int, config: DiNTSConfig, **common: Any):
        finer = max(depth - 1 + config.use_downsample, 0)
        super().__init__(config.widths[depth], config.channels[finer], **common)
        self.doubles = depth > 0 or config.use_downsample

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to [B, 2D, 2H, 2W, O]."""
        y = super().__call__(x)
        return double(y) if self.doubles else y


class DiNTS(Network):
    """DiNTS with a fixed architecture."""

    def __init__(self, config: DiNTSConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        common: dict = {"dtype": config.dtype, "rngs": rngs}
        depths, full = range(config.num_depths), config.channels[0]
        self.stem_down = nnx.List(StemDown(depth, config, **common) for depth in depths)
        self.blocks = nnx.List(
            Block(row, config.widths, **common) for row in config.architecture
        )
        self.stem_up = nnx.List(StemUp(depth, config, **common) for depth in depths)
        self.final = ReLUConvNorm(full, full, **common)
        self.out = Conv(
            full, config.out_channels, kernel_size=1, use_bias=True, **common
        )

    def features(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return what the head is applied to, [B, D, H, W, F]; nothing is random."""
        self.check_input(x)
        run = maybe_remat("encoder" in self.config.remat)
        sources = {cell.source for cell in cells(self.blocks[0].row)}
        nodes: Any = [
            run(stem, x) if depth in sources else None
            for depth, stem in enumerate(self.stem_down)
        ]
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block{i}"):
                nodes = run(block, nodes)
        run = maybe_remat("decoder" in self.config.remat)
        y: jax.Array | None = None
        for depth in reversed(range(len(nodes))):
            y = _sum(y, nodes[depth])
            if y is not None:
                with jax.named_scope(f"stem_up{depth}"):
                    y = run(self.stem_up[depth], y)
        return run(self.final, y)


TORCH_NAMES = NameTable(
    renames=(
        (r"^blocks\.(\d+)\.cell(\d+)\.", r"dints_space.cell_tree.(\1, \2)."),
        (r"\.op\.", ".op.ops.0."),
        (r"^(stem_down\.\d+)\.halve\.conv", r"\1.mod.4"),
        (r"^(stem_down\.\d+)\.halve\.norm", r"\1.mod.5"),
        (r"^(stem_(?:down|up)\.\d+)\.conv", r"\1.mod.1"),
        (r"^(stem_(?:down|up)\.\d+)\.norm", r"\1.mod.2"),
        (r"^final\.", "stem_finals.0."),
        (r"^out\.", "stem_finals.1."),
    ),
)
register(
    "dints",
    DiNTSConfig,
    DiNTS,
    torch_names=TORCH_NAMES,
    tiny={"architecture": ("1.2.", "3041"), "channel_mul": 3 / 32},
)
