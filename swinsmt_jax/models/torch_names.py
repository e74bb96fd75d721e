"""How parameters are named and laid out in PyTorch.

PyTorch keeps volumes as [B, C, D, H, W], linear weights as [out, in], convolutions as
[out, in, D, H, W] and transposed ones as [in, out, D, H, W].
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How the array of a parameter is written in PyTorch.

    Attributes:
        to_torch: our array (of one expert, if there are many) -> theirs.
        from_torch: the inverse; gets their array and the shape of ours.
    """

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def permuted(*axes: int) -> Layout:
    """Return the layout with our axes in this order."""
    inverse = tuple(np.argsort(axes))
    return Layout(lambda a: a.transpose(axes), lambda a, _: a.transpose(inverse))


SAME = Layout(lambda a: a, lambda a, _: a)
LINEAR = permuted(1, 0)
CONV = permuted(4, 3, 0, 1, 2)
UP_CONV = permuted(3, 4, 0, 1, 2)


class NameTable(NamedTuple):
    """What is special about the PyTorch names of one network.

    A parameter's path, such as out/conv/kernel, becomes out.conv.weight: dots for
    slashes, and weight for kernel and scale. A kernel of five axes is a convolution's,
    one of two a linear layer's.

    Attributes:
        renames: (regular expression, replacement) applied to the dotted name in turn;
            "{e}" stands for the expert, one tensor for each.
        layouts: (regular expression, layout); the first one found in a path decides.
        aliases: (regular expression, template) of further names of the same tensor,
            each applied to all names so far: PyTorch repeats a module of two parents.
        unneeded: regular expression of tensors that are skipped where no parameter
            is of their name: integer buffers that follow from the shape, and weights
            that have no effect.
    """

    renames: tuple[tuple[str, str], ...] = ()
    layouts: tuple[tuple[str, Layout], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    unneeded: str = r"(?!)"

    def name(self, path: str) -> str:
        """Return the PyTorch name of a parameter's path."""
        name = re.sub(r"\.(kernel|scale)$", ".weight", path.replace("/", "."))
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def layout(self, path: str, ndim: int) -> Layout:
        """Return the layout of a path's parameter (of one expert) with `ndim` axes."""
        for pattern, layout in self.layouts:
            if re.search(pattern, path):
                return layout
        kernels = {2: LINEAR, 5: CONV} if path.endswith("kernel") else {}
        return kernels.get(ndim, SAME)

    def all_names(self, name: str) -> list[str]:
        """Return a PyTorch name and its aliases."""
        names = [name]
        for pattern, template in self.aliases:
            matches = [re.fullmatch(pattern, n) for n in names]
            names += [m.expand(template) for m in matches if m]
        return names


# The convolution blocks that MONAI's networks share.
MONAI_RENAMES = (
    (r"^(encoder\d+|decoder1)\.(conv\d)\.", r"\1.layer.\2.conv."),
    (r"\.(transp_conv|conv_block\.conv\d)\.", r".\1.conv."),
    (r"^out\.", "out.conv.conv."),
)
MONAI_LAYOUTS = ((r"/transp_conv/kernel", UP_CONV),)
