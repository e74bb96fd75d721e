"""Begin from other weights: what fits is taken, the rest stays as it is."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.class_map import class_key
from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.convert import files, nnunet_folder
from swinsmt_jax.convert.prefixes import renamed
from swinsmt_jax.convert.torch_state import (
    class_axes,
    load_torch,
    names_by_path,
    some,
    to_torch,
)
from swinsmt_jax.convert.upcycling import upcycled
from swinsmt_jax.labels import class_name
from swinsmt_jax.models.registry import entry_of
from swinsmt_jax.runtime.files import absolute

LEAST = 0.5  # share of what must fit, unless less is requested
UNNAMED = (
    "not both name their classes: the outputs of the weights are taken for the "
    "network's, in their order"
)


@dataclass(frozen=True)
class Report:
    """What became of the weights, by PyTorch's names.

    Attributes:
        loaded: names taken over.
        other_shape: names that both have, with the shapes (given, the network's).
        missing: names that the weights lack.
        unused: names that the network lacks.
        share: of the network's values that were loaded.
        renamed: which prefix was exchanged, in words.
        heads: what became of the outputs of each class, in words.
        experts: what they were copied from, in words.
    """

    loaded: tuple[str, ...]
    other_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    share: float
    renamed: str = ""
    heads: str = ""
    experts: str = ""

    def __str__(self) -> str:
        """Say it in lines, one for each kind."""
        shapes = [f"{n} {a} for {b}" for n, (a, b) in self.other_shape.items()]
        lines = [
            f"{len(self.loaded)} parameters loaded, {self.share:.0%} of the network's "
            f"values{'; ' if self.renamed else ''}{self.renamed}"
        ]
        for names, words in (
            (shapes, "of another shape, so newly initialised"),
            (self.missing, "not in the weights, so newly initialised"),
            (self.unused, "of the weights not used"),
        ):
            if names:
                lines.append(f"{len(names)} {words}: {some(names)}")
        lines += [words for words in (self.heads, self.experts) if words]
        return "\n".join(lines)


def load_what_fits(
    model: nnx.Module,
    state_dict: Mapping[str, np.ndarray],
    *,
    theirs: Sequence[str] = (),
    names: Sequence[str] = (),
    partial: bool = False,
    noise: float = 0.0,
) -> Report:
    """Replace the parameters of `model` that a state dictionary has in the same shape.

    Where both know the names of their classes, the last layers are taken class by
    class, by name; those of new classes keep their values. Experts that the weights
    lack are copied from their MLPs or experts; see `upcycling.upcycled`.

    Args:
        model: made by `models.create`.
        state_dict: arrays under PyTorch's names, but for one prefix (`renamed`). Those
            of MONAI's self-supervised Swin encoder are understood too: no `swinViT.`,
            and `fc1` and `fc2` for `linear1` and `linear2`.
        partial: take also weights of another width, and those without an encoder.
        noise: of the copies of experts.
        theirs, names: of the label ids of the weights and of the network, the
            background first; empty if they are not known.

    Raises:
        UserError: if nothing fits, or so little, unless `partial`; the model is
            unchanged.
    """
    own = to_torch(model)
    given, words = _as_published(state_dict, own, model)
    given, experts = upcycled(given, own, noise=noise)
    fitting = {n: np.asarray(a) for n, a in given.items() if n in own}
    heads = _heads_by_name(model, fitting, own, theirs, names)
    wrong = {
        name: (array.shape, own[name].shape)
        for name, array in fitting.items()
        if array.shape != own[name].shape
    }
    loaded = tuple(name for name in fitting if name not in wrong)
    checks.require(
        bool(loaded),
        f"none of the {len(given)} weights fits the network: they are named like "
        f"{', '.join(list(given)[:3])}, the network's like {', '.join(list(own)[:3])}, "
        f"and {len(wrong)} have its names but other shapes.",
    )
    sizes = {name: array.size for name, array in own.items()}
    share = sum(sizes[name] for name in loaded) / sum(sizes.values())
    if not partial:
        misfit = sum(sizes[name] for name in wrong)
        name, shapes = next(iter(wrong.items()), ("", ((), ())))
        checks.require(
            misfit <= LEAST * sum(sizes[name] for name in fitting),
            f"the weights have another width: {len(wrong)} of {len(fitting)} "
            f"parameters have other shapes, such as {name} {shapes[0]} for {shapes[1]},"
            f" and {share:.0%} of the network's values would be loaded. Use the "
            "config of the weights, or pass --partial to load what fits.",
        )
        _require_encoder(model, loaded)
    load_torch(model, own | {name: fitting[name] for name in loaded})
    missing = tuple(name for name in own if name not in given)
    unused = tuple(name for name in given if name not in own)
    return Report(loaded, wrong, missing, unused, share, words, heads, experts)


def _require_encoder(model, loaded):
    """Raise `UserError` if most parts of the encoder would stay random."""
    parts = [
        names <= set(loaded)
        for path, names in names_by_path(model).items()
        if model.config.layer_decay_stage(path)
    ]
    checks.require(
        sum(parts) >= LEAST * len(parts),
        f"the weights have only {sum(parts)} of the {len(parts)} parameters of the "
        "encoder; the others would be random. Use weights of this network, or pass "
        "--partial to load what fits.",
    )


def _heads_by_name(model, fitting, own, theirs, names):
    """Put the outputs of common classes at their places in `fitting`; say which."""
    axes = {n: a for n, a in class_axes(model).items() if n in fitting}
    axes = {n: a for n, a in axes.items() if fitting[n].ndim == own[n].ndim}
    if not axes or theirs == names:
        return ""
    if not theirs or not names:
        same = all(fitting[name].shape == own[name].shape for name in axes)
        return UNNAMED if same else ""
    keys = {class_key(name): i for i, name in enumerate(theirs)}
    places = [keys.get(class_key(name)) for name in names]
    kept = [i for i, place in enumerate(places) if place is not None]
    for name, axis in axes.items():
        if fitting[name].shape[axis] != len(theirs):
            continue
        whole = own[name].copy()
        found = fitting[name].take([places[i] for i in kept], axis)
        whole[(slice(None),) * axis + (kept,)] = found
        fitting[name] = whole
    old = [name for i, name in enumerate(names) if i and places[i] is not None]
    new = [name for i, name in enumerate(names) if places[i] is None]
    return (
        f"the weights are of other classes; outputs kept by name: "
        f"{', '.join(old) or 'none'}; newly initialised: {', '.join(new) or 'none'}"
    )


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Read weights under PyTorch's names from a file, or from a run's workdir.

    Of a model folder of nnU-Net, those of its first fold, for scans whose axes run to
    the right, front and head.

    Raises:
        UserError: as `files.read`, and as `checkpoint.load_model` for a folder.
    """
    return _with_names(path)[0]


def _with_names(path):
    """Return weights, and the names of their label ids, () if they are not known."""
    path = absolute(path)
    if nnunet_folder.is_folder(path):
        return nnunet_folder.start_of(path)
    if not path.is_dir():
        return files.read(path), files.class_names(path)
    from swinsmt_jax.training.checkpoint import load_model

    config, model, info = load_model(path)
    logging.info("weights of step %d of %s", info["step"], path)
    return to_torch(model), names_of(config)


def names_of(config: ExperimentConfig) -> tuple[str, ...]:
    """Return the names of a network's label ids; () for those that conversion gave."""
    names = config.data.class_names
    neutral = names[1:2] == (class_name(1, ()),)
    return () if neutral or len(names) != config.model.out_channels else names


def start_from(
    path: str | Path,
    *,
    names: Sequence[str] = (),
    partial: bool = False,
    noise: float = 0.0,
) -> Callable[[nnx.Module], Report]:
    """Read weights; return the function that puts what fits into a network.

    Args:
        path: of a file or a workdir.
        names: of the network's label ids, the background first, if they are known.
        partial, noise: as in `load_what_fits`.

    Raises:
        UserError: as `read_weights`, and the function as `load_what_fits`.
    """
    weights, theirs = _with_names(path)
    return functools.partial(
        load_what_fits,
        state_dict=weights,
        theirs=theirs,
        names=names,
        partial=partial,
        noise=noise,
    )


def _as_published(state_dict, own, model):
    """Return weights under the names of the published networks, and what was done."""
    arrays, words = renamed(state_dict, own)
    unneeded = entry_of(model.config).torch_names.unneeded
    return {
        name if name in own else re.sub(r"\.fc([12])\.", r".linear\1.", name): array
        for name, array in arrays.items()
        if name in own or not re.fullmatch(unneeded, name)
    }, words
