"""PyTorch names of the parameters of Swin UNETR and Swin SMT."""

from swinsmt_jax.models.torch_names import (
    LINEAR,
    MONAI_LAYOUTS,
    MONAI_RENAMES,
    Layout,
    NameTable,
)

_SLOTS = Layout(  # [C, E, C] -> [E C, C]
    lambda a: a.reshape(a.shape[0], -1).T, lambda a, shape: a.T.reshape(shape)
)

TORCH_NAMES = NameTable(
    renames=(
        (r"^(swinViT\.layers\dc?)\.", r"\1.0."),
        (r"^(swinViT\.layers\dc\.0)\.(conv\d)\.", r"\1.layer.\2.conv."),
        (r"\.mlp\.gamma$", r".mlp.norm.gamma"),
        (r"\.mlp\.slot_kernel$", r".mlp.to_slot_embeds.0.weight"),
        (r"\.mlp\.slot_gamma$", r".mlp.to_slot_embeds.2.gamma"),
        (r"\.mlp\.slot_norm_gamma$", r".mlp.slot_norm.gamma"),
        (r"\.experts\.w1$", r".experts.{e}.0.weight"),
        (r"\.experts\.b1$", r".experts.{e}.0.bias"),
        (r"\.experts\.w2$", r".experts.{e}.3.weight"),
        (r"\.experts\.b2$", r".experts.{e}.3.bias"),
        *MONAI_RENAMES,
    ),
    layouts=(
        (r"/slot_kernel$", _SLOTS),
        (r"/experts/w\d$", LINEAR),
        *MONAI_LAYOUTS,
    ),
    unneeded=r".*\.relative_position_index",
)
