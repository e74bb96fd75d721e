"""PyTorch names of nnU-Net, plain or with a residual encoder."""

from swinsmt_jax.convert.names import CONV, UP_CONV, NameTable, affine, norm


def _conv_norm(pattern, template):
    return (
        *affine(rf"{pattern}/conv", rf"{template}.conv", layout=CONV),
        *norm(rf"{pattern}/norm", rf"{template}.norm"),
    )


RULES = (
    *_conv_norm(r"encoder/stem/convs/(\d+)", r"encoder.stem.convs.\1"),
    *_conv_norm(r"encoder/stages/(\d+)/convs/(\d+)", r"encoder.stages.\1.0.convs.\2"),
    *_conv_norm(
        r"encoder/stages/(\d+)/blocks/(\d+)/(conv\d)",
        r"encoder.stages.\1.blocks.\2.\3",
    ),
    *_conv_norm(
        r"encoder/stages/(\d+)/blocks/(\d+)/skip/(\d)",
        r"encoder.stages.\1.blocks.\2.skip.\3",
    ),
    *_conv_norm(r"decoder/stages/(\d+)/convs/(\d+)", r"decoder.stages.\1.convs.\2"),
    *affine(r"decoder/transpconvs/(\d+)", r"decoder.transpconvs.\1", layout=UP_CONV),
    *affine(r"decoder/seg_layers/(\d+)", r"decoder.seg_layers.\1", layout=CONV),
)

TABLE = NameTable(
    RULES,
    aliases=(
        (r"(.*)\.conv\.(\w+)", r"\1.all_modules.0.\2"),
        (r"(.*)\.norm\.(\w+)", r"\1.all_modules.1.\2"),
        (r"encoder\.(.*)", r"decoder.encoder.\1"),
    ),
)
