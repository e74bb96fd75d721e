"""PyTorch names and layouts of the parameters of Swin UNETR and Swin SMT.

PyTorch keeps volumes as [B, C, D, H, W], linear weights as [out, in], convolutions as
[out, in, D, H, W] and transposed ones as [in, out, D, H, W].
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """How one kind of parameter is written in PyTorch.

    Attributes:
        pattern: regular expression of the "/"-joined path of our parameter.
        template: PyTorch name; "{e}" stands for the expert, one tensor for each.
        to_torch: our array (of one expert, if there are many) -> theirs.
        from_torch: the inverse; gets their array and the shape of ours.
    """

    pattern: str
    template: str
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _same(array, shape=None):
    return array


def _transposed(array, shape=None):
    return array.T


def _permuted(*axes):
    inverse = tuple(np.argsort(axes))
    return (lambda a: a.transpose(axes)), (lambda a, shape: a.transpose(inverse))


_CONV = _permuted(4, 3, 0, 1, 2)
_UP_CONV = _permuted(3, 4, 0, 1, 2)
_LINEAR = (_transposed, _transposed)
_SAME = (_same, _same)
_SLOTS = (
    lambda a: a.reshape(a.shape[0], -1).T,  # [C, E, C] -> [E C, C]
    lambda a, shape: a.T.reshape(shape),
)

_BLOCK = r"swinViT/layers(\d)/blocks/(\d+)"
_TORCH_BLOCK = r"swinViT.layers\1.0.blocks.\2"

# The first rule that matches a path decides.
RULES = (
    Rule(r"swinViT/patch_embed/proj/kernel", "swinViT.patch_embed.proj.weight", *_CONV),
    Rule(r"swinViT/patch_embed/proj/bias", "swinViT.patch_embed.proj.bias", *_SAME),
    Rule(r"swinViT/patch_embed/norm/scale", "swinViT.patch_embed.norm.weight", *_SAME),
    Rule(r"swinViT/patch_embed/norm/bias", "swinViT.patch_embed.norm.bias", *_SAME),
    Rule(rf"{_BLOCK}/(norm\d)/scale", rf"{_TORCH_BLOCK}.\3.weight", *_SAME),
    Rule(rf"{_BLOCK}/(norm\d)/bias", rf"{_TORCH_BLOCK}.\3.bias", *_SAME),
    Rule(
        rf"{_BLOCK}/attn/relative_position_bias_table",
        rf"{_TORCH_BLOCK}.attn.relative_position_bias_table",
        *_SAME,
    ),
    Rule(
        rf"{_BLOCK}/(attn|mlp)/(\w+)/kernel", rf"{_TORCH_BLOCK}.\3.\4.weight", *_LINEAR
    ),
    Rule(rf"{_BLOCK}/(attn|mlp)/(\w+)/bias", rf"{_TORCH_BLOCK}.\3.\4.bias", *_SAME),
    Rule(rf"{_BLOCK}/mlp/gamma", rf"{_TORCH_BLOCK}.mlp.norm.gamma", *_SAME),
    Rule(
        rf"{_BLOCK}/mlp/slot_kernel",
        rf"{_TORCH_BLOCK}.mlp.to_slot_embeds.0.weight",
        *_SLOTS,
    ),
    Rule(
        rf"{_BLOCK}/mlp/slot_gamma",
        rf"{_TORCH_BLOCK}.mlp.to_slot_embeds.2.gamma",
        *_SAME,
    ),
    Rule(rf"{_BLOCK}/mlp/slot_embeds", rf"{_TORCH_BLOCK}.mlp.slot_embeds", *_SAME),
    Rule(
        rf"{_BLOCK}/mlp/slot_norm_gamma", rf"{_TORCH_BLOCK}.mlp.slot_norm.gamma", *_SAME
    ),
    Rule(
        rf"{_BLOCK}/mlp/experts/w1",
        rf"{_TORCH_BLOCK}.mlp.experts.{{e}}.0.weight",
        *_LINEAR,
    ),
    Rule(
        rf"{_BLOCK}/mlp/experts/b1", rf"{_TORCH_BLOCK}.mlp.experts.{{e}}.0.bias", *_SAME
    ),
    Rule(
        rf"{_BLOCK}/mlp/experts/w2",
        rf"{_TORCH_BLOCK}.mlp.experts.{{e}}.3.weight",
        *_LINEAR,
    ),
    Rule(
        rf"{_BLOCK}/mlp/experts/b2", rf"{_TORCH_BLOCK}.mlp.experts.{{e}}.3.bias", *_SAME
    ),
    Rule(
        r"swinViT/layers(\d)/downsample/norm/scale",
        r"swinViT.layers\1.0.downsample.norm.weight",
        *_SAME,
    ),
    Rule(
        r"swinViT/layers(\d)/downsample/norm/bias",
        r"swinViT.layers\1.0.downsample.norm.bias",
        *_SAME,
    ),
    Rule(
        r"swinViT/layers(\d)/downsample/reduction/kernel",
        r"swinViT.layers\1.0.downsample.reduction.weight",
        *_LINEAR,
    ),
    Rule(
        r"swinViT/layers(\d)c/(conv\d)/kernel",
        r"swinViT.layers\1c.0.layer.\2.conv.weight",
        *_CONV,
    ),
    Rule(r"(encoder\d+)/(conv\d)/kernel", r"\1.layer.\2.conv.weight", *_CONV),
    Rule(r"(decoder\d)/transp_conv/kernel", r"\1.transp_conv.conv.weight", *_UP_CONV),
    Rule(
        r"(decoder\d)/conv_block/(conv\d)/kernel",
        r"\1.conv_block.\2.conv.weight",
        *_CONV,
    ),
    Rule(r"out/kernel", "out.conv.conv.weight", *_CONV),
    Rule(r"out/bias", "out.conv.conv.bias", *_SAME),
)

# Integer buffers of the PyTorch network that follow from its shape.
BUFFERS = r".*\.relative_position_index"


def find_rule(path: str) -> tuple[Rule, str]:
    """Return the rule of a parameter's path, and its PyTorch name or name template."""
    for rule in RULES:
        match = re.fullmatch(rule.pattern, path)
        if match:
            return rule, match.expand(rule.template)
    raise KeyError(f"no PyTorch name is known for the parameter {path}")
