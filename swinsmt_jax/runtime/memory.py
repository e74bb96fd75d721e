"""What to do when a device's memory is not enough."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig


class TooLargeError(checks.UserError):
    """Something needs more memory than a device has."""


@contextlib.contextmanager
def remedies(config: ExperimentConfig, *, devices: int) -> Iterator[None]:
    """Say what helps where a device runs out of memory, or would.

    Raises:
        UserError: for a `TooLargeError` and what JAX raises on such a device.
    """
    try:
        yield
    except TooLargeError as error:
        raise checks.UserError(
            f"{error} {what_helps(config, devices=devices)}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise checks.UserError(
            f"a device has run out of memory ({reason}). "
            f"{what_helps(config, devices=devices)}"
        ) from error


def what_helps(config: ExperimentConfig, *, devices: int) -> str:
    """Name the flags, ready to be given, that lower the memory of a training step.

    The first ones leave the experiment as it is, so a run may continue with them.
    """
    model, data = config.model, config.data
    same = []
    share = data.batch_size // devices
    more = [n for n in checks.divisors(share) if n > config.training.accumulate]
    if more:
        same.append(f"--config.training.accumulate={more[0]}")
    if set(model.remat) < set(model.remat_parts):
        same.append(f'--config.model.remat="{tuple(model.remat_parts)}"')
    other = []
    if model.dtype != "bfloat16":
        other.append("--config.model.dtype=bfloat16")
    fewer = [n for n in checks.divisors(share) if n < share]
    if fewer:
        other.append(f"--config.data.batch_size={fewer[-1] * devices}")
    if smaller := _smaller_patch(config):
        other.append(f'--config.data.patch_shape="{smaller}"')
    spread = [n for n in checks.divisors(devices) if n > config.mesh.expert]
    spread = [n for n in spread if model.num_experts and model.num_experts % n == 0]
    if spread:
        same.append(f"--config.mesh.data=-1 --config.mesh.expert={spread[0]}")
    lists = []
    if same:
        lists.append(f"What helps: {', or '.join(same)}")
    if other:
        lists.append(
            "Another experiment, for which a run with checkpoints needs a new "
            f"--workdir: {', or '.join(other)}"
        )
    return f"{'. '.join(lists)}{'; or' if lists else 'What helps:'} more devices."


def gigabytes(count: int) -> str:
    """Write bytes as GB."""
    return f"{count / 1e9:.2f} GB"


def _smaller_patch(config):
    """Return the patch with its longest side one stride shorter, if that is allowed."""
    sides, stride = list(config.data.patch_shape), config.model.total_stride
    longest = max(range(3), key=lambda i: sides[i])
    strides = (stride,) * 3 if isinstance(stride, int) else stride
    sides[longest] -= strides[longest]
    try:
        data = dataclasses.replace(config.data, patch_shape=tuple(sides))
        dataclasses.replace(config, data=data)
    except checks.UserError:
        return None
    return tuple(sides)
