"""Load a PyTorch state dictionary into a model, and write one from it."""

import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.models.registry import entry_of
from swinsmt_jax.models.torch_names import NameTable


def load_torch(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> None:
    """Replace the parameters of `model` by those of a PyTorch state dictionary.

    Args:
        model: a network made by `models.create`.
        state_dict: arrays (or CPU tensors) under PyTorch's names, in PyTorch's layouts.
            A prefix "module." of every name and the integer buffers
            `relative_position_index` are passed over. Of tensors that PyTorch writes
            under several names, the further ones may be missing.

    Raises:
        UserError: if names are missing or unexpected, shapes differ, numbers are not
            finite, or two names of one tensor hold different values; the message lists
            them all and the model is unchanged.
    """
    table = _table(model)
    names = list(state_dict)
    prefix = "module." if names and all(n.startswith("module.") for n in names) else ""
    given = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if not re.fullmatch(table.buffers, name)
    }
    parameters = _parameters(model)
    wanted = {
        path: _torch_names(table, path, p[...].shape) for path, p in parameters.items()
    }
    expected = {name for names in wanted.values() for name in names}
    _drop_aliases(table, expected, given)
    _compare_names(expected, set(given))

    arrays, wrong = {}, []
    for path, names in wanted.items():
        shape = parameters[path][...].shape
        many = "experts" in path
        part = shape[1:] if many else shape
        layout = table.layout(path, len(part))
        parts = []
        for name in names:
            array = np.asarray(given[name])
            expected_shape = layout.to_torch(np.empty(part, np.bool_)).shape
            if array.shape != expected_shape:
                wrong.append(f"{name}: {array.shape}, expected {expected_shape}")
                continue
            parts.append(layout.from_torch(array, part))
        if len(parts) == len(names):
            arrays[path] = np.stack(parts) if many else parts[0]
    checks.require(
        not wrong,
        "the state dictionary is of another configuration, for these shapes differ. "
        "Check the config's channels, and what else decides sizes, such as num_experts "
        f"and window_size.{_lines(wrong)}",
    )
    broken = sorted(n for n in expected if not np.isfinite(np.asarray(given[n])).all())
    checks.require(
        not broken,
        f"{len(broken)} arrays of the state dictionary hold NaN or infinite numbers; "
        f"take the weights of before the training diverged.{_lines(broken)}",
    )
    for path, parameter in parameters.items():
        parameter[...] = np.array(arrays[path], np.float32, order="C")


def to_torch(model: nnx.Module, *, buffers: bool = False) -> dict[str, np.ndarray]:
    """Write the parameters under PyTorch's names, in PyTorch's layouts, bit for bit.

    Args:
        model: a network made by `models.create`.
        buffers: add the `relative_position_index` buffers that PyTorch's
            `load_state_dict(strict=True)` asks for.
    """
    table, state_dict = _table(model), {}
    for path, parameter in _parameters(model).items():
        array = np.asarray(parameter[...])
        parts = array if "experts" in path else [array]
        for name, part in zip(
            _torch_names(table, path, array.shape), parts, strict=True
        ):
            layout = table.layout(path, part.ndim)
            tensor = np.array(layout.to_torch(part), order="C")
            state_dict |= dict.fromkeys(table.all_names(name), tensor)
    if buffers:
        for path in _parameters(model):
            if path.endswith("/relative_position_bias_table"):
                name = table.name(path).replace("bias_table", "index")
                index = _parent(model, path).relative_position_index()
                state_dict[name] = index.astype(np.int64)
    return state_dict


def _parent(model, path):
    """Return the module that holds the parameter of a path."""
    for part in path.split("/")[:-1]:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _parameters(model) -> dict[str, nnx.Param]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): parameter for path, parameter in flat}


def _table(model) -> NameTable:
    found = entry_of(model.config)
    checks.require(
        found.torch_names is not None,
        f"the network {found.name} has no PyTorch names; give its `register` a "
        "`torch_names.NameTable`.",
    )
    return found.torch_names


def _torch_names(table, path, shape):
    name = table.name(path)
    if "{e}" not in name:
        return [name]
    return [name.format(e=e) for e in range(shape[0])]


def _drop_aliases(table, expected, given):
    """Remove the further names of one tensor, which must hold the same values."""
    unequal = []
    for name in expected:
        for alias in table.all_names(name)[1:]:
            if alias in given and name in given:
                if not np.array_equal(
                    np.asarray(given[name]), np.asarray(given[alias])
                ):
                    unequal.append(f"{name} and {alias}")
                del given[alias]
    checks.require(
        not unequal,
        "the state dictionary holds different values under two names of one tensor; "
        f"write it anew from the PyTorch network.{_lines(sorted(unequal))}",
    )


def _compare_names(expected, given):
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    checks.require(
        not missing and not unexpected,
        f"the state dictionary does not fit the model: {len(missing)} names are missing"
        f" and {len(unexpected)} are unexpected. Check the fields of the config that "
        "decide which parts there are, such as num_moe_stages, residual_conv and "
        f"depths.{_lines(missing, 'missing: ')}{_lines(unexpected, 'unexpected: ')}",
    )


def _lines(items, before=""):
    """All items, each on a line of its own."""
    return "".join(f"\n  {before}{item}" for item in items)
