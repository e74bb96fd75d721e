"""Typed, checked configs of Swin UNETR and Swin SMT. Imports no jax."""

import dataclasses
import math
from dataclasses import dataclass

from swinsmt_jax import checks
from swinsmt_jax.network_config import settle, spread

STAGES = ("stage1", "stage2", "stage3", "stage4")
REMAT_CHOICES = (*STAGES, "encoder", "decoder")
PATCH_MERGING = ("legacy", "octants", "octants_v2")
ROUTING = ("dense", "streaming", "auto", "cudnn")
SLOTS = ("dynamic", "learned")


@dataclass(frozen=True)
class SwinUNETRConfig:
    """Swin UNETR (Hatamizadeh et al. 2022), as in MONAI.

    Attributes:
        in_channels: channels of the image, 1 for CT.
        out_channels: classes, background included.
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
        dtype: of matrix products and convolutions: "float32" or "bfloat16".
            Parameters, norms' statistics, softmax and logits are float32.
        remat: parts whose activations are recomputed in the backward pass, of
            "stage1".."stage4", "encoder" (its convolution blocks), "decoder".
    """

    in_channels: int
    out_channels: int
    feature_size: int
    residual_conv: bool = False
    patch_merging: str = "legacy"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, ...] = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    patch_norm: bool = False
    normalize: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: tuple[str, ...] = ()

    def __post_init__(self):
        settle(self, REMAT_CHOICES)
        checks.positive("model.feature_size", self.feature_size)
        for name, length in (("depths", 4), ("num_heads", 4), ("window_size", 3)):
            spread(self, name, length)
        for stage, heads in enumerate(self.num_heads):
            channels = self.feature_size * 2**stage
            checks.require(
                channels % heads == 0,
                f"model.feature_size is {self.feature_size}: stage {stage + 1} has "
                f"{channels} channels, which {heads} attention heads do not divide; "
                "with the default heads take a multiple of 3.",
            )
        checks.one_of("model.patch_merging", self.patch_merging, PATCH_MERGING)
        for name in ("dropout", "attention_dropout", "drop_path"):
            checks.in_range(f"model.{name}", getattr(self, name), 0.0, 1.0)
        checks.require(
            int(self.feature_size * self.mlp_ratio) >= 1,
            f"model.mlp_ratio is {self.mlp_ratio}, which gives the MLPs of "
            f"{self.feature_size} channels no hidden one; take at least "
            f"{1 / self.feature_size:.3g}.",
        )

    @property
    def total_stride(self) -> int:
        """Number of which every side of the input must be a multiple."""
        return 2 ** (1 + len(self.depths))

    @property
    def input_shape(self) -> None:
        """Any shape of whole strides is taken."""
        return None


@dataclass(frozen=True)
class SwinSMTConfig(SwinUNETRConfig):
    """Swin SMT (Plotka et al., MICCAI 2024): Soft MoE in Swin UNETR's last stages.

    Attributes:
        num_experts: experts E of every Soft MoE.
        num_moe_stages: in how many of the last stages the MLP is a Soft MoE.
        routing: "dense" makes the weights of all tokens and slots, "streaming" never
            holds more than a block of them, "auto" takes the faster. Equal up to
            rounding. "cudnn" streams by cuDNN's kernel, with logits of bfloat16
            operands, where its limits allow.
        slots: "dynamic" makes as many slots as tokens, from the tokens, as published;
            "learned" has parameters for `slots_per_expert`, as in the Soft MoE paper.
        slots_per_expert: number of learned slots of each expert.
    """

    num_experts: int = dataclasses.field(kw_only=True)
    num_moe_stages: int = dataclasses.field(kw_only=True)
    routing: str = "auto"
    slots: str = "dynamic"
    slots_per_expert: int = 0

    def __post_init__(self):
        super().__post_init__()
        checks.positive("model.num_experts", self.num_experts)
        checks.require(
            1 <= self.num_moe_stages <= len(self.depths),
            f"model.num_moe_stages is {self.num_moe_stages!r}, but must be a whole "
            f"number from 1 to {len(self.depths)}, the number of stages; a network "
            "without experts is SwinUNETRConfig.",
        )
        checks.one_of("model.routing", self.routing, ROUTING)
        checks.one_of("model.slots", self.slots, SLOTS)
        slot_count("model.slots_per_expert", self.slots, self.slots_per_expert)

    def require_tokens(self, patch_shape: tuple[int, ...]) -> None:
        """Raise `UserError` if dynamic slots lack tokens: one per expert.

        The last stage has the fewest.
        """
        if self.slots == "learned":
            return
        sides = [side // 2 ** len(self.depths) for side in patch_shape]
        tokens = math.prod(sides)
        checks.require(
            tokens >= self.num_experts,
            f"patch {tuple(patch_shape)} has {tokens} tokens in the last stage, but "
            f"needs one for each of model.num_experts = {self.num_experts}; take a "
            "larger patch or fewer experts.",
        )


def slot_count(name: str, slots: str, count: int) -> None:
    """Raise `UserError` unless learned slots have a count, and dynamic ones none."""
    if slots == "learned":
        checks.positive(name, count)
        return
    checks.require(
        count == 0,
        f"{name} is {count}, but dynamic slots are as many as the tokens; set "
        'slots="learned" or leave it out.',
    )
