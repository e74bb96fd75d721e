"""PyTorch names of 3D UX-Net, as its authors published it."""

from swinsmt_jax.convert.names import (
    CONV,
    MONAI_BLOCKS,
    SAME,
    NameTable,
    Rule,
    affine,
    norm,
)

# One kernel a channel: [k, k, k, C] -> [C, 1, k, k, k].
_DEPTHWISE = (
    lambda a: a.transpose(3, 0, 1, 2)[:, None],
    lambda a, shape: a[:, 0].transpose(1, 2, 3, 0),
)
# Of one channel to r, [C, r] -> [C r, 1, 1, 1, 1]; and back, [C, r, 1, 1, 1].
_WIDEN = (
    lambda a: a.reshape(-1, 1, 1, 1, 1),
    lambda a, shape: a.reshape(shape),
)
_NARROW = (
    lambda a: a[:, :, None, None, None],
    lambda a, shape: a.reshape(shape),
)

_BLOCK = r"uxnet_3d/stages/(\d)/(\d+)"
_TORCH_BLOCK = r"uxnet_3d.stages.\1.\2"
_DOWN = r"uxnet_3d/downsample_layers/(\d)/(\d)"
_TORCH_DOWN = r"uxnet_3d.downsample_layers.\1.\2"

RULES = (
    Rule(rf"{_DOWN}/kernel", rf"{_TORCH_DOWN}.weight", *CONV),
    *norm(_DOWN, _TORCH_DOWN),  # the biases of the convolutions too
    Rule(rf"{_BLOCK}/gamma", rf"{_TORCH_BLOCK}.gamma", *SAME),
    *affine(rf"{_BLOCK}/dwconv", rf"{_TORCH_BLOCK}.dwconv", layout=_DEPTHWISE),
    *norm(rf"{_BLOCK}/norm", rf"{_TORCH_BLOCK}.norm"),
    *affine(rf"{_BLOCK}/pwconv1", rf"{_TORCH_BLOCK}.pwconv1", layout=_WIDEN),
    *affine(rf"{_BLOCK}/pwconv2", rf"{_TORCH_BLOCK}.pwconv2", layout=_NARROW),
    *norm(r"uxnet_3d/(norm\d)", r"uxnet_3d.\1"),
    *MONAI_BLOCKS,
)

TABLE = NameTable(RULES)
