"""Load a PyTorch state dictionary into a model, and write one from it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from absl import logging
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.convert.prefixes import renamed
from swinsmt_jax.models import abstract_model
from swinsmt_jax.models.registry import NetworkConfig, entry_of
from swinsmt_jax.models.torch_names import Layout, NameTable

SHOWN = 8  # names of a kind in a message


def load_torch(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> None:
    """Replace the parameters of `model` by those of a PyTorch state dictionary.

    Args:
        model: a network made by `models.create`.
        state_dict: arrays (or CPU tensors) under PyTorch's names, in PyTorch's layouts.
            One prefix of the names, such as `module.` or `net.`, and what the network's
            `NameTable` calls unneeded are skipped. Of tensors that PyTorch writes
            under several names, one will do.

    Raises:
        UserError: if names are missing or unexpected, shapes differ, numbers are not
            finite, or two names of one tensor hold different values; the message names
            the first of them, and the model is unchanged.
    """
    table, targets = _table(model), _targets(model)
    expected = {name for target in targets.values() for name in target.names}
    given, words = renamed(state_dict, expected)
    if words:
        logging.info("%s", words)
    for name in given.keys() - expected:
        if re.fullmatch(table.unneeded, name):
            del given[name]
    _require_buffers(targets, given)
    _drop_aliases(table, expected, given)
    _compare_names(expected, set(given))
    given = {name: np.asarray(given[name]) for name in expected}
    wrong = [
        f"{name}: {given[name].shape}, expected {target.torch_shape()}"
        for target in targets.values()
        for name in target.names
        if given[name].shape != target.torch_shape()
    ]
    checks.require(
        not wrong,
        "the state dictionary is of another configuration, for these shapes differ. "
        "Check the config's channels, and what else decides sizes, such as num_experts "
        f"and window_size: {some(wrong)}.",
    )
    broken = sorted(name for name in expected if not np.isfinite(given[name]).all())
    checks.require(
        not broken,
        f"{len(broken)} arrays of the state dictionary hold NaN or infinite numbers; "
        f"take weights from before the training diverged: {some(broken)}.",
    )
    for target in targets.values():
        target.read(given)


def to_torch(model: nnx.Module, *, buffers: bool = False) -> dict[str, np.ndarray]:
    """Write the parameters under PyTorch's names, in PyTorch's layouts, bit for bit.

    Args:
        model: a network made by `models.create`.
        buffers: add the integer buffers that PyTorch's `load_state_dict(strict=True)`
            asks for: `relative_position_index`, and `num_batches_tracked`, which is 0.
    """
    table = _table(model)
    state_dict: dict[str, np.ndarray] = {}
    for path, target in _targets(model).items():
        for name, tensor in target.write().items():
            state_dict |= dict.fromkeys(table.all_names(name), tensor)
        if buffers and path.endswith("/relative_position_bias_table"):
            name = table.name(path).replace("bias_table", "index")
            index = _parent(model, path).relative_position_index()
            state_dict[name] = index.astype(np.int64)
        if buffers and path.endswith("/running_mean"):
            name = table.name(path).replace("running_mean", "num_batches_tracked")
            state_dict[name] = np.zeros((), np.int64)
    return state_dict


def class_axes(model: nnx.Module) -> dict[str, int]:
    """Return {PyTorch's name: axis} of tensors that have an entry for each class.

    They are those that another number of output channels makes larger.
    """
    config: NetworkConfig = model.config  # type: ignore[attr-defined]
    wider = replace(config, out_channels=config.out_channels + 1)
    own, other = (
        {
            name: target.torch_shape()
            for target in _targets(nnx.merge(*abstract_model(each))).values()
            for name in target.names
        }
        for each in (config, wider)
    )
    return {
        name: int(np.flatnonzero(np.not_equal(shape, other[name]))[0])
        for name, shape in own.items()
        if shape != other[name]
    }


class _Target(NamedTuple):
    """A parameter or buffer, and the tensors of PyTorch that hold it.

    They are one, or one per expert.

    Attributes:
        parameter: ours.
        names: of the tensors.
        layout: of each tensor.
        shape: of the part of our array that each tensor holds.
    """

    parameter: nnx.Variable
    names: list[str]
    layout: Layout
    shape: tuple[int, ...]

    def torch_shape(self) -> tuple[int, ...]:
        return self.layout.to_torch(np.empty(self.shape, np.bool_)).shape

    def write(self) -> dict[str, np.ndarray]:
        whole = np.asarray(self.parameter[...])
        parts = whole.reshape(len(self.names), *self.shape)
        return {  # copies, for a view may be written with the bytes of its buffer
            name: np.array(self.layout.to_torch(part), order="C")
            for name, part in zip(self.names, parts, strict=True)
        }

    def read(self, given: Mapping[str, np.ndarray]) -> None:
        parts = [self.layout.from_torch(given[name], self.shape) for name in self.names]
        whole = np.ascontiguousarray(np.stack(parts), np.float32)
        self.parameter[...] = whole.reshape(self.parameter[...].shape)


def _targets(model) -> dict[str, _Target]:
    """Return what becomes of each parameter, by its path."""
    table, targets = _table(model), {}
    for parts, parameter in nnx.to_flat_state(nnx.state(model)):
        path, shape = "/".join(map(str, parts)), parameter.shape
        name = table.name(path)
        names = [name]
        if "{e}" in name:
            count, *shape = shape
            names = [name.format(e=e) for e in range(count)]
        layout = table.layout(path, len(shape))
        targets[path] = _Target(parameter, names, layout, tuple(shape))
    return targets


def names_by_path(model: nnx.Module) -> dict[str, set[str]]:
    """Return PyTorch's names of the tensors that make up each parameter."""
    return {path: set(target.names) for path, target in _targets(model).items()}


def _parent(model, path):
    """Return the module that holds the parameter of a path."""
    for part in path.split("/")[:-1]:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _table(model) -> NameTable:
    found = entry_of(model.config)
    checks.require(
        found.torch_names is not None,
        f"the network {found.name} has no PyTorch names; give its `register` a "
        "`torch_names.NameTable`.",
    )
    return found.torch_names


def _drop_aliases(table, expected, given):
    """Keep the first name of each tensor; all names must hold the same values."""
    unequal = []
    for name in expected:
        there = [alias for alias in table.all_names(name) if alias in given]
        arrays = [np.asarray(given.pop(alias)) for alias in there]
        if arrays:
            given[name] = arrays[0]
        unequal += [
            f"{there[0]} and {alias}"
            for alias, array in zip(there[1:], arrays[1:], strict=True)
            if not np.array_equal(arrays[0], array, equal_nan=True)
        ]
    checks.require(
        not unequal,
        "the state dictionary holds different values under two names of one tensor; "
        f"write it again from the PyTorch network: {some(sorted(unequal))}.",
    )


def _require_buffers(targets, given):
    """Refuse weights that lack nothing but buffers, as a list of parameters does."""
    lost = [t for t in targets.values() if not given.keys() >= set(t.names)]
    if lost and not any(isinstance(t.parameter, nnx.Param) for t in lost):
        raise checks.UserError(
            f"the state dictionary has all parameters, but lacks {len(lost)} buffers, "
            f"such as {lost[0].names[0]}, without which the network cannot predict; "
            "save model.state_dict() whole."
        )


def _compare_names(expected, given):
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    checks.require(
        not missing and not unexpected,
        f"the state dictionary does not fit the model: {len(missing)} names are missing"
        f" and {len(unexpected)} are unexpected. Check the fields of the config that "
        "decide which parts there are, such as num_moe_stages, residual_conv and "
        f"depths. Missing: {some(missing) or 'none'}; unexpected: "
        f"{some(unexpected) or 'none'}.",
    )


def some(items: Sequence[object]) -> str:
    """Return the first items in words, and how many more there are."""
    more = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more
