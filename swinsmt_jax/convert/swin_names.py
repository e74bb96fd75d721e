"""PyTorch names of the parameters of Swin UNETR and Swin SMT."""

from swinsmt_jax.convert.names import (
    CONV,
    LINEAR,
    MONAI_BLOCKS,
    SAME,
    NameTable,
    Rule,
)

_SLOTS = (
    lambda a: a.reshape(a.shape[0], -1).T,  # [C, E, C] -> [E C, C]
    lambda a, shape: a.T.reshape(shape),
)

_BLOCK = r"swinViT/layers(\d)/blocks/(\d+)"
_TORCH_BLOCK = r"swinViT.layers\1.0.blocks.\2"

RULES = (
    Rule(r"swinViT/patch_embed/proj/kernel", "swinViT.patch_embed.proj.weight", *CONV),
    Rule(r"swinViT/patch_embed/proj/bias", "swinViT.patch_embed.proj.bias", *SAME),
    Rule(r"swinViT/patch_embed/norm/scale", "swinViT.patch_embed.norm.weight", *SAME),
    Rule(r"swinViT/patch_embed/norm/bias", "swinViT.patch_embed.norm.bias", *SAME),
    Rule(rf"{_BLOCK}/(norm\d)/scale", rf"{_TORCH_BLOCK}.\3.weight", *SAME),
    Rule(rf"{_BLOCK}/(norm\d)/bias", rf"{_TORCH_BLOCK}.\3.bias", *SAME),
    Rule(
        rf"{_BLOCK}/attn/relative_position_bias_table",
        rf"{_TORCH_BLOCK}.attn.relative_position_bias_table",
        *SAME,
    ),
    Rule(
        rf"{_BLOCK}/(attn|mlp)/(\w+)/kernel", rf"{_TORCH_BLOCK}.\3.\4.weight", *LINEAR
    ),
    Rule(rf"{_BLOCK}/(attn|mlp)/(\w+)/bias", rf"{_TORCH_BLOCK}.\3.\4.bias", *SAME),
    Rule(rf"{_BLOCK}/mlp/gamma", rf"{_TORCH_BLOCK}.mlp.norm.gamma", *SAME),
    Rule(
        rf"{_BLOCK}/mlp/slot_kernel",
        rf"{_TORCH_BLOCK}.mlp.to_slot_embeds.0.weight",
        *_SLOTS,
    ),
    Rule(
        rf"{_BLOCK}/mlp/slot_gamma",
        rf"{_TORCH_BLOCK}.mlp.to_slot_embeds.2.gamma",
        *SAME,
    ),
    Rule(rf"{_BLOCK}/mlp/slot_embeds", rf"{_TORCH_BLOCK}.mlp.slot_embeds", *SAME),
    Rule(
        rf"{_BLOCK}/mlp/slot_norm_gamma", rf"{_TORCH_BLOCK}.mlp.slot_norm.gamma", *SAME
    ),
    Rule(
        rf"{_BLOCK}/mlp/experts/w1",
        rf"{_TORCH_BLOCK}.mlp.experts.{{e}}.0.weight",
        *LINEAR,
    ),
    Rule(
        rf"{_BLOCK}/mlp/experts/b1", rf"{_TORCH_BLOCK}.mlp.experts.{{e}}.0.bias", *SAME
    ),
    Rule(
        rf"{_BLOCK}/mlp/experts/w2",
        rf"{_TORCH_BLOCK}.mlp.experts.{{e}}.3.weight",
        *LINEAR,
    ),
    Rule(
        rf"{_BLOCK}/mlp/experts/b2", rf"{_TORCH_BLOCK}.mlp.experts.{{e}}.3.bias", *SAME
    ),
    Rule(
        r"swinViT/layers(\d)/downsample/norm/scale",
        r"swinViT.layers\1.0.downsample.norm.weight",
        *SAME,
    ),
    Rule(
        r"swinViT/layers(\d)/downsample/norm/bias",
        r"swinViT.layers\1.0.downsample.norm.bias",
        *SAME,
    ),
    Rule(
        r"swinViT/layers(\d)/downsample/reduction/kernel",
        r"swinViT.layers\1.0.downsample.reduction.weight",
        *LINEAR,
    ),
    Rule(
        r"swinViT/layers(\d)c/(conv\d)/kernel",
        r"swinViT.layers\1c.0.layer.\2.conv.weight",
        *CONV,
    ),
    *MONAI_BLOCKS,
)

TABLE = NameTable(RULES, buffers=r".*\.relative_position_index")
