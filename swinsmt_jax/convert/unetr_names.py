"""PyTorch names of UNETR, as in MONAI."""

from swinsmt_jax.convert.names import (
    CONV,
    LINEAR,
    MONAI_BLOCKS,
    SAME,
    UP_CONV,
    NameTable,
    Rule,
    affine,
    norm,
)

RULES = (
    *affine(
        r"vit/patch_embedding/patch_embeddings",
        r"vit.patch_embedding.patch_embeddings",
        layout=CONV,
    ),
    Rule(
        r"vit/patch_embedding/position_embeddings",
        r"vit.patch_embedding.position_embeddings",
        *SAME,
    ),
    *norm(r"vit/blocks/(\d+)/(norm\w+)", r"vit.blocks.\1.\2"),
    *affine(
        r"vit/blocks/(\d+)/(attn|mlp)/(\w+)", r"vit.blocks.\1.\2.\3", layout=LINEAR
    ),
    *norm(r"vit/norm", r"vit.norm"),
    Rule(
        r"(encoder\d)/transp_conv_init/kernel",
        r"\1.transp_conv_init.conv.weight",
        *UP_CONV,
    ),
    Rule(r"(encoder\d)/blocks/(\d)/0/kernel", r"\1.blocks.\2.0.conv.weight", *UP_CONV),
    Rule(
        r"(encoder\d)/blocks/(\d)/1/(conv\d)/kernel",
        r"\1.blocks.\2.1.\3.conv.weight",
        *CONV,
    ),
    *MONAI_BLOCKS,
)

TABLE = NameTable(RULES)
