"""Swin UNETR, and Swin SMT with Soft Mixture-of-Experts in its last stages."""

from swinsmt_jax.models.registry import register
from swinsmt_jax.models.swin.config import SwinSMTConfig, SwinUNETRConfig
from swinsmt_jax.models.swin.network import SwinUNETR
from swinsmt_jax.models.swin.torch_names import TORCH_NAMES

__all__ = ["SwinSMTConfig", "SwinUNETR", "SwinUNETRConfig"]

TINY = dict(feature_size=2, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4)
register(
    "swin_smt",
    SwinSMTConfig,
    SwinUNETR,
    torch_names=TORCH_NAMES,
    tiny={**TINY, "num_experts": 2, "num_moe_stages": 2},
)
register(
    "swin_unetr",
    SwinUNETRConfig,
    SwinUNETR,
    torch_names=TORCH_NAMES,
    tiny={**TINY, "residual_conv": True, "patch_merging": "octants"},
)
