"""Names of weights that differ from a network's by one prefix."""

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import product
from typing import TypeVar

T = TypeVar("T")

DEEPEST = 3  # parts of a prefix, as in module._orig_mod.net.
LEAST = {"weights": 0.5, "network": 0.25}  # share of the names that have a prefix


def renamed(weights: Mapping[str, T], own: Collection[str]) -> tuple[dict[str, T], str]:
    """Exchange the one prefix of weights for another, if more names are then known.

    Wrappers put `module.`, `_orig_mod.`, `net.` or `model.` before all names; what is
    an encoder alone lacks the network's `swinViT.`, or has another name for it.

    Args:
        weights: by PyTorch's names.
        own: names of the network.

    Returns:
        the weights under names as the network's, and in words what was replaced, "" if
        nothing was.
    """
    own = set(own)

    def renamed(before, after):
        return {
            after + name.removeprefix(before) if name.startswith(before) else name: name
            for name in weights
        }

    def known(pair):
        return len(own & renamed(*pair).keys())

    pairs = product(
        _prefixes(weights, LEAST["weights"]), _prefixes(own, LEAST["network"])
    )
    best = max(pairs, key=known)  # of equals the first: that without prefixes
    found = {name: weights[before] for name, before in renamed(*best).items()}
    if best[0] == best[1] or len(found) < len(weights):
        return dict(weights), ""
    before, after = best
    if not after:
        return found, f"the prefix {before!r} of the weights was left out"
    return found, f"the prefix {before!r} of the weights was read as {after!r}"


def _prefixes(names, least):
    """Return "" and what many names begin with, such as `module.`; short ones first."""
    counts = Counter(
        ".".join(parts[:depth]) + "."
        for parts in (name.split(".") for name in names)
        for depth in range(1, min(DEEPEST, len(parts) - 1) + 1)
    )
    often = [p for p, count in counts.items() if count >= least * len(names)]
    return ["", *sorted(often, key=lambda prefix: (prefix.count("."), prefix))]
