"""What to do when a device's memory is not enough."""

import contextlib
from collections.abc import Iterator

import jax

from swinsmt_jax import checks
from swinsmt_jax.config import DataConfig
from swinsmt_jax.models.registry import NetworkConfig


class TooLargeError(checks.UserError):
    """Something needs more memory than a device has."""


@contextlib.contextmanager
def remedies(what_helps: str) -> Iterator[None]:
    """Add what helps to the error of a device that runs out of memory, or would.

    Raises:
        UserError: for a `TooLargeError` and what JAX raises on such a device.
    """
    try:
        yield
    except TooLargeError as error:
        raise checks.UserError(f"{error} {what_helps}") from error
    except jax.errors.JaxRuntimeError as error:
        if error.error_code_string != "RESOURCE_EXHAUSTED":
            raise
        raise checks.UserError(
            f"a device has run out of memory ({checks.one_line(error)}). {what_helps}"
        ) from error


def what_helps(
    model: NetworkConfig,
    data: DataConfig,
    *,
    accumulate: int,
    devices: int,
    expert: int,
) -> str:
    """Name the flags, ready to be given, that lower the memory of a training step.

    A run may continue with the first ones.

    Args:
        model, data: of the experiment.
        accumulate: parts of a batch, one after the other.
        devices: of the mesh.
        expert: the mesh's side of that name.
    """
    same = []
    share = data.batch_size // devices
    more = [n for n in checks.divisors(share) if n > accumulate]
    if more:
        same.append(f"--config.training.accumulate={more[0]}")
    if set(model.remat) < set(model.remat_parts):
        same.append(f'--config.model.remat="{tuple(model.remat_parts)}"')
    fewer = [n for n in checks.divisors(share) if n < share and n % accumulate == 0]
    if fewer:
        same.append(f"--config.data.batch_size={fewer[-1] * devices}")
    other = []
    if model.dtype != "bfloat16":
        other.append("--config.model.dtype=bfloat16")
    if smaller := _smaller_patch(model, data.patch_shape):
        other.append(f'--config.data.patch_shape="{smaller}"')
    larger = [n for n in checks.divisors(devices) if n > expert]
    larger = [n for n in larger if model.num_experts and model.num_experts % n == 0]
    if larger:
        same.append(f"--config.mesh.data=-1 --config.mesh.expert={larger[0]}")
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


def _smaller_patch(model, shape):
    """Return the patch with its longest side one stride shorter, if that is allowed."""
    sides, stride = list(shape), model.total_stride
    longest = max(range(3), key=lambda i: sides[i])
    strides = (stride,) * 3 if isinstance(stride, int) else stride
    sides[longest] -= strides[longest]
    try:
        model.check_patch("data.patch_shape", tuple(sides))
    except checks.UserError:
        return None
    return tuple(sides)
