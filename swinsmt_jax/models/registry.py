"""The networks by name, and what the rest of the program asks their configs.

A network is one file or folder of this package that calls `register`;
`docs/extending.md` has the recipe. Those files import jax, so they are imported when
the first network is requested. This file does not.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np

from swinsmt_jax import checks

AUTO = ("auto",)  # `remat` that training chooses; elsewhere nothing is recomputed
PerStage = Annotated[checks.Positives, checks.entries(4)]  # of an encoder of four


@dataclass(frozen=True)
class Prior:
    """Weights on the entries of some parameters, see `training.prior`.

    Attributes:
        rule: one of `training.prior.RULES`.
        paths: pattern of the paths of these parameters.
        weights: positive; of a shape that is broadcast to theirs.
    """

    rule: str
    paths: str
    weights: np.ndarray

    def acts_on(self, path: str) -> bool:
        """Whether a parameter has these weights."""
        return re.search(self.paths, path) is not None


@dataclass(frozen=True)
class NetworkConfig:
    """What the configs of all networks share.

    Attributes:
        in_channels: channels of the image, 1 for CT.
        out_channels: classes, background included.
        dtype: of matrix products and convolutions: "float32" or "bfloat16".
            Parameters, norms' statistics, softmax and logits are float32.
        remat: parts whose activations are recomputed in the backward pass, of
            `remat_parts`; "auto" lets training choose, see `training.remat`.

    A network's own config says the following of it, and overrides the properties.

        remat_parts: what `remat` may name.
        num_experts: experts of each Soft MoE; 0 if there is none.
        encoder_stages: patterns of the paths of each encoder stage's parameters, that
            next to the decoder first; for `optimizer.layer_decay`.
        decayed: pattern of the paths of the parameters that weight decay acts on.
    """

    in_channels: checks.Positive
    out_channels: checks.Positive
    dtype: str = field(default="float32", kw_only=True)
    remat: tuple[str, ...] = field(default=(), kw_only=True)

    remat_parts: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    num_experts: ClassVar[int] = 0
    encoder_stages: ClassVar[tuple[str, ...]] = ()
    decayed: ClassVar[str] = r"kernel$"

    @property
    def total_stride(self) -> int | tuple[int, ...]:
        """Divisor of every side of the input, or one for each of (D, H, W)."""
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The only spatial shape (D, H, W) that the network takes; None for any."""
        return None

    @property
    def moe_strides(self) -> Mapping[str, int]:
        """Side in voxels of a token of each Soft MoE block, by the block's name."""
        return {}

    def __post_init__(self):
        name = checks.dtype_name("model.dtype", self.dtype)
        object.__setattr__(self, "dtype", name)
        if self.remat == AUTO[0]:
            object.__setattr__(self, "remat", AUTO)
        checks.typed_fields("model", self)
        for part in () if self.remat == AUTO else self.remat:
            checks.one_of("an entry of model.remat", part, self.remat_parts)

    def check_patch(self, name: str, shape: Sequence[int]) -> None:
        """Raise `UserError` unless the network takes inputs of this (D, H, W)."""
        checks.spatial_shape(name, shape, self.total_stride, exact=self.input_shape)

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise `UserError` unless a new network fits the classes that are learnt.

        `names` are those of the label ids, the background first.
        """

    @property
    def prior(self) -> Prior | None:
        """Weights on the entries of some parameters in training; None has none."""
        return None

    def layer_decay_stage(self, path: str) -> int:
        """Return how many encoder stages a parameter is away from the decoder.

        1 in the stage next to the decoder; 0 outside of the encoder.
        """
        found = (bool(re.search(pattern, path)) for pattern in self.encoder_stages)
        return next((i for i, here in enumerate(found, start=1) if here), 0)

    def is_decayed(self, path: str) -> bool:
        """Whether weight decay acts on a parameter: by default only on kernels.

        Biases, scales of norms and embeddings of positions and slots are left out, as
        in the Swin transformer's own recipe (Liu et al. 2021).
        """
        return re.search(self.decayed, path) is not None


class Entry(NamedTuple):
    """A registered network.

    Attributes:
        name: `model.name` in config files.
        config: its class, a `NetworkConfig`.
        network: called as network(config, rngs=rngs), it makes the module.
        torch_names: a `torch_names.NameTable`; None if no PyTorch weights are known.
        tiny: keyword arguments of the smallest config that is worth testing.
    """

    name: str
    config: type[NetworkConfig]
    network: Callable
    torch_names: Any
    tiny: Mapping


_entries: dict[str, Entry] = {}


def register(
    name: str,
    config: type[NetworkConfig],
    network: Callable,
    *,
    torch_names: Any = None,
    tiny: Mapping | None = None,
) -> None:
    """Make a network known by name; see `Entry`.

    Raises:
        ValueError: for a name that another network has, and for a config that is not a
            `NetworkConfig` with a `total_stride`.
    """
    known = _entries.get(name)
    if known is not None and known.config.__qualname__ != config.__qualname__:
        raise ValueError(f"the name {name!r} is taken by {known.config.__qualname__}")
    plain = getattr(config, "total_stride", None) is NetworkConfig.total_stride
    if plain or not issubclass(config, NetworkConfig):
        raise ValueError(f"{config} must be a NetworkConfig and have a total_stride")
    _entries[name] = Entry(name, config, network, torch_names, tiny or {})


def names() -> tuple[str, ...]:
    """Return the names of all networks."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return tuple(_entries)


def entry(name: str) -> Entry:
    """Return the network of a name; `UserError` for one that is not known."""
    if name not in _entries:
        checks.one_of("model.name", name, names())
    return _entries[name]


def config_class(name: str) -> type[NetworkConfig]:
    """Return the class of the config of a name; `UserError` for one unknown."""
    return entry(name).config


def entry_of(config: NetworkConfig) -> Entry:
    """Return the network of a config; `UserError` for what is not one's config."""
    found = [e for e in _entries.values() if e.config is type(config)]
    checks.require(
        len(found) > 0,
        f"config is a {type(config).__name__}, but must be the config of a registered "
        f"network: {', '.join(e.config.__name__ for e in map(entry, names()))}.",
    )
    return found[0]


def broadcast_to_tuple(config: NetworkConfig, name: str, length: int) -> None:
    """Repeat a `checks.OneOrEach` of a single number, and require `length` entries.

    A single entry counts as a single number: the flag --config.model.img_size=64 makes
    one of a tuple in the config file.

    Raises:
        UserError: for another number of entries.
    """
    value = checks.each(getattr(config, name))
    value = value * length if len(value) == 1 else value
    checks.entries(length)(f"model.{name}", value)
    object.__setattr__(config, name, value)
