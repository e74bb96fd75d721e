"""PyTorch names of nnFormer, as its authors published it."""

from swinsmt_jax.convert.names import (
    CONV,
    LINEAR,
    SAME,
    UP_CONV,
    NameTable,
    Rule,
    affine,
    norm,
)

_BLOCK = r"(model_down|decoder)/layers/(\d)/blocks/(\d+)"
_TORCH_BLOCK = r"\1.layers.\2.blocks.\3"
_EMBED = r"model_down/patch_embed"
_TORCH_EMBED = r"model_down.patch_embed"

RULES = (
    *affine(rf"{_EMBED}/(proj\d)/(conv\d)", rf"{_TORCH_EMBED}.\1.\2", layout=CONV),
    *norm(rf"{_EMBED}/(proj\d)/(norm\d)", rf"{_TORCH_EMBED}.\1.\2"),
    *norm(rf"{_EMBED}/norm", rf"{_TORCH_EMBED}.norm"),
    *norm(rf"{_BLOCK}/(norm\d)", rf"{_TORCH_BLOCK}.\4"),
    Rule(
        rf"{_BLOCK}/attn/relative_position_bias_table",
        rf"{_TORCH_BLOCK}.attn.relative_position_bias_table",
        *SAME,
    ),
    *affine(rf"{_BLOCK}/attn/(\w+)", rf"{_TORCH_BLOCK}.attn.\4", layout=LINEAR),
    *affine(rf"{_BLOCK}/mlp/linear(\d)", rf"{_TORCH_BLOCK}.mlp.fc\4", layout=LINEAR),
    *affine(
        r"model_down/layers/(\d)/downsample/reduction",
        r"model_down.layers.\1.downsample.reduction",
        layout=CONV,
    ),
    *norm(
        r"model_down/layers/(\d)/downsample/norm",
        r"model_down.layers.\1.downsample.norm",
    ),
    *norm(r"model_down/(norm\d)", r"model_down.\1"),
    *norm(r"decoder/layers/(\d)/upsample/norm", r"decoder.layers.\1.Upsample.norm"),
    *affine(
        r"decoder/layers/(\d)/upsample/up",
        r"decoder.layers.\1.Upsample.up",
        layout=UP_CONV,
    ),
    *affine(r"final/up", r"final.0.up", layout=UP_CONV),
)

TABLE = NameTable(RULES, buffers=r".*\.relative_position_index")
