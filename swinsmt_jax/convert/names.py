"""How parameters are written in PyTorch: rules, tables of rules, and layouts.

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


class NameTable(NamedTuple):
    """The PyTorch names of one network.

    Attributes:
        rules: the first one that matches a path decides.
        aliases: (pattern, template) of further names of the same tensor, each applied
            to all the names so far: PyTorch repeats a module that has two parents.
        buffers: regular expression of integer buffers that follow from the shape.
    """

    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    buffers: str = r"(?!)"

    def find(self, path: str) -> tuple[Rule, str]:
        """Return the rule of a parameter's path, and its PyTorch name or template."""
        for rule in self.rules:
            match = re.fullmatch(rule.pattern, path)
            if match:
                return rule, match.expand(rule.template)
        raise KeyError(f"no PyTorch name is known for the parameter {path}")

    def all_names(self, name: str) -> list[str]:
        """Return a PyTorch name and its aliases."""
        names = [name]
        for pattern, template in self.aliases:
            matches = [re.fullmatch(pattern, n) for n in names]
            names += [m.expand(template) for m in matches if m]
        return names


def _same(array, shape=None):
    return array


def _transposed(array, shape=None):
    return array.T


def _permuted(*axes):
    inverse = tuple(np.argsort(axes))
    return (lambda a: a.transpose(axes)), (lambda a, shape: a.transpose(inverse))


CONV = _permuted(4, 3, 0, 1, 2)
UP_CONV = _permuted(3, 4, 0, 1, 2)
LINEAR = (_transposed, _transposed)
SAME = (_same, _same)


def affine(pattern: str, template: str, weight: str = "kernel", layout=SAME):
    """Return the two rules of a layer's weight (our name `weight`) and bias."""
    return (
        Rule(rf"{pattern}/{weight}", rf"{template}.weight", *layout),
        Rule(rf"{pattern}/bias", rf"{template}.bias", *SAME),
    )


def norm(pattern: str, template: str):
    """Return the two rules of a norm's scale and bias."""
    return affine(pattern, template, "scale")


# The convolution blocks that MONAI's networks share.
MONAI_BLOCKS = (
    Rule(r"(encoder\d+|decoder1)/(conv\d)/kernel", r"\1.layer.\2.conv.weight", *CONV),
    Rule(r"(decoder\d)/transp_conv/kernel", r"\1.transp_conv.conv.weight", *UP_CONV),
    Rule(
        r"(decoder\d)/conv_block/(conv\d)/kernel",
        r"\1.conv_block.\2.conv.weight",
        *CONV,
    ),
    *affine(r"out", r"out.conv.conv", layout=CONV),
)
