"""Begin from other weights: what fits is taken, the rest stays as it is."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.convert import files
from swinsmt_jax.convert.torch_state import load_torch, to_torch
from swinsmt_jax.runtime.files import absolute
from swinsmt_jax.training.checkpoint import load_model

SHOWN = 8


@dataclass(frozen=True)
class Report:
    """What became of the weights, by PyTorch's names.

    Attributes:
        loaded: names taken over.
        other_shape: names that both have, with the shapes (given, the network's).
        missing: names that the weights lack.
        unused: names that the network lacks.
    """

    loaded: tuple[str, ...]
    other_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        """Say it in lines, one for each kind."""
        shapes = [f"{n} {a} for {b}" for n, (a, b) in self.other_shape.items()]
        lines = [f"{len(self.loaded)} parameters loaded"]
        for names, words in (
            (shapes, "of another shape, so newly initialised"),
            (self.missing, "not in the weights, so newly initialised"),
            (self.unused, "of the weights not used"),
        ):
            if names:
                more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                listed = ", ".join(names[:SHOWN])
                lines.append(f"{len(names)} {words}: {listed}{more}")
        return "\n".join(lines)


def load_what_fits(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> Report:
    """Replace the parameters of `model` that a state dictionary has in the same shape.

    Args:
        model: made by `models.create`.
        state_dict: arrays under PyTorch's names. Those of MONAI's self-supervised Swin
            encoder are understood too: the prefix `module.`, no `swinViT.`, and `fc1`
            and `fc2` for `linear1` and `linear2`.

    Raises:
        UserError: if nothing fits; the model is unchanged.
    """
    own = to_torch(model)
    given = _as_published(state_dict, own)
    fitting = {n: np.asarray(a) for n, a in given.items() if n in own}
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
    load_torch(model, own | {name: fitting[name] for name in loaded})
    missing = tuple(name for name in own if name not in given)
    unused = tuple(name for name in given if name not in own)
    return Report(loaded, wrong, missing, unused)


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Read weights under PyTorch's names from a file, or from a run's workdir.

    Raises:
        UserError: as `files.read`, and as `checkpoint.load_model` for a folder.
    """
    path = absolute(path)
    if path.is_dir():
        _, model, info = load_model(path)
        logging.info("weights of step %d of %s", info["step"], path)
        return to_torch(model)
    return files.read(path)


def start_from(path: str | Path) -> Callable[[nnx.Module], Report]:
    """Read weights; return the function that puts what fits into a network.

    Raises:
        UserError: as `read_weights`, and the function as `load_what_fits`.
    """
    return functools.partial(load_what_fits, state_dict=read_weights(path))


def _as_published(state_dict, own):
    """Return the weights under the names of the published networks."""
    names = [name.removeprefix("module.") for name in state_dict]
    encoder_alone = not any(n.startswith("swinViT.") for n in names) and any(
        n.startswith("swinViT.") for n in own
    )
    if encoder_alone and any(n.startswith("patch_embed.") for n in names):
        names = [f"swinViT.{name}" for name in names]
    names = [
        name if name in own else re.sub(r"\.fc([12])\.", r".linear\1.", name)
        for name in names
    ]
    arrays = dict(zip(names, state_dict.values(), strict=True))
    return {
        name: array
        for name, array in arrays.items()
        if not name.endswith("relative_position_index")
    }
