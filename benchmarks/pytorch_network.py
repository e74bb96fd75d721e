"""The PyTorch network of a config, from MONAI and soft-moe-pytorch."""

import inspect

import soft_moe_pytorch
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import PatchMergingV2

from swinsmt_jax import SwinSMTConfig, SwinUNETRConfig
from swinsmt_jax.layers.patch import OCTANTS


class _Flat:
    """A Soft MoE of the tokens of a volume `[B, D, H, W, C]`."""

    def forward(self, x):
        return super().forward(x.flatten(1, 3)).reshape(x.shape)


class _DynamicSlots(_Flat, soft_moe_pytorch.DynamicSlotsSoftMoE):
    pass


class _LearnedSlots(_Flat, soft_moe_pytorch.SoftMoE):
    pass


def create(config: SwinUNETRConfig, *, fused: bool = False) -> torch.nn.Module:
    """Return Swin UNETR, or Swin SMT as published, with freshly drawn weights.

    `fused` asks for MONAI's fused attention, which it has from 1.6 on and uses only in
    forward passes without gradient.
    """
    argument = "use_flash_attention"
    known = argument in inspect.signature(SwinUNETR).parameters

    class Merging(PatchMergingV2):
        def forward(self, x):
            parts = [
                x[:, int(d) :: 2, int(h) :: 2, int(w) :: 2]
                for d, h, w in OCTANTS[config.patch_merging]
            ]
            return self.reduction(self.norm(torch.cat(parts, -1)))

    network = SwinUNETR(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        feature_size=config.feature_size,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        qkv_bias=config.qkv_bias,
        use_v2=config.residual_conv,
        downsample=Merging,
        **({argument: True} if fused and known else {}),
    )
    if isinstance(config, SwinSMTConfig):
        for stage in range(4 - config.num_moe_stages, 4):
            for block in getattr(network.swinViT, f"layers{stage + 1}")[0].blocks:
                block.mlp = _soft_moe(config, config.feature_size * 2**stage)
    return network


def _soft_moe(config, channels):
    if config.slots == "dynamic":
        return _DynamicSlots(channels, num_experts=config.num_experts)
    return _LearnedSlots(
        channels, num_experts=config.num_experts, num_slots=config.slots_per_expert
    )
