"""Configs of Swin UNETR and Swin SMT."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from swinsmt_jax import checks
from swinsmt_jax.layers.patch import OCTANTS
from swinsmt_jax.layers.soft_moe import SoftMoEConfig
from swinsmt_jax.models.registry import NetworkConfig, PerStage, broadcast_to_tuple

STAGES = ("stage1", "stage2", "stage3", "stage4")


@dataclass(frozen=True)
class SwinUNETRConfig(NetworkConfig):
    """Swin UNETR (Hatamizadeh et al. 2022), as in MONAI.

    Attributes:
        feature_size: channels of the patch embedding; a multiple of `num_heads[0]`.
        residual_conv: residual convolution block before each stage ("v2").
        patch_merging: which octants are concatenated, in which order: "legacy" takes
            two twice and two never (MONAI v0.9), "octants" is its correction,
            "octants_v2" is lexicographic.
        depths: transformer blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of the attention window in tokens, or its (D, H, W).
        mlp_ratio: hidden over input channels of the MLPs and experts.
        qkv_bias: whether queries, keys and values have a bias.
        patch_norm: layer norm after the patch embedding.
        normalize: layer norm without parameters on the hidden states that are handed
            to the decoder.
        dropout: rate after embedding, projections and MLPs.
        attention_dropout: rate on attention weights.
        drop_path: stochastic depth, rising linearly from 0 to this rate.
        remat: of "stage1".."stage4", "encoder" (its convolution blocks), "decoder".
    """

    feature_size: checks.Positive
    residual_conv: bool = False
    patch_merging: Annotated[str, checks.Among(tuple(OCTANTS))] = "legacy"
    depths: PerStage = (2, 2, 2, 2)
    num_heads: PerStage = (3, 6, 12, 24)
    window_size: checks.OneOrEach = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    patch_norm: bool = False
    normalize: bool = True
    dropout: checks.Share = 0.0
    attention_dropout: checks.Share = 0.0
    drop_path: checks.Share = 0.0

    remat_parts: ClassVar = (*STAGES, "encoder", "decoder")
    encoder_stages: ClassVar = (
        *(f"swinViT/layers{stage}" for stage in (4, 3, 2, 1)),
        "swinViT/patch_embed",
    )
    decayed: ClassVar = r"(kernel|w1|w2)$"

    def __post_init__(self):
        super().__post_init__()
        broadcast_to_tuple(self, "window_size", 3)
        for stage, heads in enumerate(self.num_heads):
            channels = self.feature_size * 2**stage
            checks.require(
                channels % heads == 0,
                f"model.feature_size is {self.feature_size}: stage {stage + 1} has "
                f"{channels} channels, which {heads} attention heads do not divide; "
                "with the default heads take a multiple of 3.",
            )
        checks.require(
            int(self.feature_size * self.mlp_ratio) >= 1,
            f"model.mlp_ratio is {self.mlp_ratio}, which gives the MLPs of "
            f"{self.feature_size} channels no hidden one; take at least "
            f"{1 / self.feature_size:.3g}.",
        )

    @property
    def total_stride(self) -> int:
        """Divisor of every side of the input."""
        return 2 ** (1 + len(self.depths))


@dataclass(frozen=True)
class SwinSMTConfig(SoftMoEConfig, SwinUNETRConfig):
    """Swin SMT (Plotka et al., MICCAI 2024): Soft MoE in Swin UNETR's last stages.

    Attributes:
        num_moe_stages: in how many of the last stages the MLP is a Soft MoE.
    """

    num_moe_stages: int = dataclasses.field(kw_only=True)

    def __post_init__(self):
        SwinUNETRConfig.__post_init__(self)
        SoftMoEConfig.__post_init__(self)
        checks.require(
            1 <= self.num_moe_stages <= len(self.depths),
            f"model.num_moe_stages is {self.num_moe_stages!r}, but must be a whole "
            f"number from 1 to {len(self.depths)}, the number of stages; a network "
            "without experts is SwinUNETRConfig.",
        )

    @property
    def moe_strides(self) -> Mapping[str, int]:
        """Side in voxels of the tokens of "stage2/block0" and every other Soft MoE."""
        first = len(STAGES) - self.num_moe_stages
        return {
            f"{STAGES[stage]}/block{block}": 2 ** (1 + stage)
            for stage in range(first, len(STAGES))
            for block in range(self.depths[stage])
        }

    def check_patch(self, name: str, shape: Sequence[int]) -> None:
        """Refuse also a patch with fewer tokens than experts, where slots are dynamic.

        The last stage has the fewest.
        """
        super().check_patch(name, shape)
        tokens = math.prod(side // 2 ** len(self.depths) for side in shape)
        checks.require(
            self.slots == "learned" or tokens >= self.num_experts,
            f"{name} {tuple(shape)} has {tokens} tokens in the last stage, but needs "
            f"one for each of model.num_experts = {self.num_experts}; take a larger "
            "patch or fewer experts.",
        )
