"""Experts from a dense MLP, or from fewer experts, under PyTorch's names.

Komatsuzaki et al. 2023, "Sparse Upcycling: Training Mixture-of-Experts from Dense
Checkpoints" (arXiv:2212.05055): every expert begins as a copy of the MLP that it stands
for, and the router at random. The slots of a Soft MoE are averages of tokens, so the
copies do not keep the network's function.
"""

import re
import zlib
from collections.abc import Mapping

import numpy as np

EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.([03])\.(weight|bias)")
DENSE = {"0": "linear1", "3": "linear2"}
SLOTS = ("to_slot_embeds.0.weight", "slot_embeds")  # an equal part for each expert


def upcycled(
    given: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], *, noise: float
) -> tuple[dict[str, np.ndarray], str]:
    """Return weights with all experts of a network that has more of them.

    Expert e of a block is a copy of the block's MLP or, if the weights have E experts,
    of expert e mod E; the first E keep their slots. All other slots are the network's
    own, newly drawn ones: with copied slots two copies would stay equal for ever.

    Args:
        given: the weights.
        own: the network's, newly drawn.
        noise: standard deviation of what is added to the values of a copy, as a share
            of that of its weights; 0 adds nothing.

    Returns:
        The weights, and in words what was done; "" if there was nothing to do.
    """
    found, sources, counts = dict(given), set(), set()
    blocks: dict[str, int] = {}  # of the network: {MLP: experts}
    for name in own:
        if match := EXPERT.fullmatch(name):
            blocks[match[1]] = max(blocks.get(match[1], 0), int(match[2]) + 1)
    for block, number in blocks.items():
        before = sum(f"{block}.experts.{e}.0.weight" in given for e in range(number))
        dense = f"{block}.linear1.weight" in given
        if before == number or not (before or dense):
            continue
        counts.add((before, number))
        for layer, linear in DENSE.items():
            for kind in ("weight", "bias"):
                for e in range(before, number):
                    source = f"{block}.{linear}.{kind}"
                    if before:
                        source = f"{block}.experts.{e % before}.{layer}.{kind}"
                    if source not in given:
                        continue
                    copy = f"{block}.experts.{e}.{layer}.{kind}"
                    found[copy] = _noisy(given[source], noise, copy)
                    sources |= {source}
        for slots in (f"{block}.{part}" for part in SLOTS):
            if before and slots in given and slots in own:
                whole, part = own[slots].copy(), np.asarray(given[slots])
                if part.shape[1:] == whole.shape[1:] and len(part) <= len(whole):
                    whole[: len(part)] = part
                    found[slots] = whole
    for source in sources:
        if ".linear" in source:
            del found[source]
    return found, "; ".join(_words(*pair, noise) for pair in sorted(counts))


def _words(before, number, noise):
    what = f"experts {before + 1} to {number} are copies of the {before} before"
    slots = "the first keep their slots, the others' are newly drawn"
    if not before:
        what = f"each of the {number} experts is a copy of the dense MLP"
        slots = "their slots are newly drawn"
    added = f", with noise of {noise:g} of its deviation" if noise else ""
    return f"sparse upcycling: {what}{added}; {slots}"


def _noisy(array, noise, name):
    """Return an array with noise that depends only on its name."""
    array = np.asarray(array)
    if not noise:
        return array
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(
        array.shape, np.float32
    )
    return array + np.float32(noise * array.std()) * drawn
