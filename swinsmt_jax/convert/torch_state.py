"""Load a PyTorch state dictionary into a model, and write one from it."""

import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.convert import swin_names
from swinsmt_jax.ops import windows


def load_torch(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> None:
    """Replace the parameters of `model` by those of a PyTorch state dictionary.

    Args:
        model: a Swin UNETR or Swin SMT made by `models.create`.
        state_dict: arrays (or CPU tensors) under PyTorch's names, in PyTorch's layouts.
            A prefix "module." of every name and the integer buffers
            `relative_position_index` are passed over.

    Raises:
        UserError: if names are missing or unexpected, or shapes differ; the message
            lists them and the model is unchanged.
    """
    names = list(state_dict)
    prefix = "module." if names and all(n.startswith("module.") for n in names) else ""
    given = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if not re.fullmatch(swin_names.BUFFERS, name)
    }
    parameters = _parameters(model)
    wanted = {path: _torch_names(path, p[...].shape) for path, p in parameters.items()}
    expected = {name for _, names in wanted.values() for name in names}
    _compare_names(expected, set(given))

    arrays, wrong = {}, []
    for path, (rule, names) in wanted.items():
        shape = parameters[path][...].shape
        many = "experts" in path
        part = shape[1:] if many else shape
        parts = []
        for name in names:
            array = np.asarray(given[name])
            expected_shape = rule.to_torch(np.empty(part, np.bool_)).shape
            if array.shape != expected_shape:
                wrong.append(f"{name}: {array.shape}, expected {expected_shape}")
                continue
            parts.append(rule.from_torch(array, part))
        if len(parts) == len(names):
            arrays[path] = np.stack(parts) if many else parts[0]
    checks.require(
        not wrong,
        "the state dictionary is of another configuration, for these shapes differ: "
        f"{_listing(wrong)}. Check feature_size, num_experts, window_size, in_channels "
        "and out_channels.",
    )
    for path, parameter in parameters.items():
        parameter[...] = np.ascontiguousarray(arrays[path], np.float32)


def to_torch(model: nnx.Module, *, buffers: bool = False) -> dict[str, np.ndarray]:
    """Write the parameters under PyTorch's names, in PyTorch's layouts, bit for bit.

    Args:
        model: a Swin UNETR or Swin SMT made by `models.create`.
        buffers: add the `relative_position_index` buffers that PyTorch's
            `load_state_dict(strict=True)` asks for.
    """
    state_dict = {}
    for path, parameter in _parameters(model).items():
        array = np.asarray(parameter[...])
        rule, names = _torch_names(path, array.shape)
        parts = array if "experts" in path else [array]
        for name, part in zip(names, parts, strict=True):
            state_dict[name] = np.ascontiguousarray(rule.to_torch(part))
    if buffers:
        index = windows.relative_position_index(model.config.window_size)
        for name in list(state_dict):
            if name.endswith("relative_position_bias_table"):
                buffer = name.replace("bias_table", "index")
                state_dict[buffer] = index.astype(np.int64)
    return state_dict


def _parameters(model) -> dict[str, nnx.Param]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): parameter for path, parameter in flat}


def _torch_names(path, shape):
    rule, name = swin_names.find_rule(path)
    if "{e}" not in name:
        return rule, [name]
    return rule, [name.format(e=e) for e in range(shape[0])]


def _compare_names(expected, given):
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    checks.require(
        not missing and not unexpected,
        f"the state dictionary does not fit the model: {len(missing)} names are missing"
        f"{_listing(missing)} and {len(unexpected)} are unexpected"
        f"{_listing(unexpected)}. Check num_experts, num_moe_stages, residual_conv, "
        "depths, qkv_bias and patch_norm of the config.",
    )


def _listing(items, most=8):
    if not items:
        return ""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return f" ({', '.join(items[:most])}{more})"
