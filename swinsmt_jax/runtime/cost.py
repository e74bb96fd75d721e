"""What a training step costs: memory as compiled, operations of the network."""

import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from swinsmt_jax.config import DataConfig
from swinsmt_jax.models.registry import NetworkConfig
from swinsmt_jax.runtime.memory import TooLargeError, gigabytes
from swinsmt_jax.runtime.operations import forward_operations

# Dense bfloat16 operations per second by the start of `device_kind`; the longest start
# that fits holds. NVIDIA's data sheets give most figures with sparsity: half of them.
PEAK = {
    "NVIDIA V100": 125e12,  # float16; V100 data sheet
    "Tesla V100": 125e12,
    "NVIDIA A100": 312e12,  # A100 data sheet: SXM and PCIe alike
    "NVIDIA L40S": 362e12,  # L40S data sheet
    "NVIDIA H100": 989e12,  # H100 data sheet, SXM: 1,979 with sparsity
    "NVIDIA H100 PCIe": 756e12,  # H100 PCIe product brief: 1,513 with sparsity
    "NVIDIA H100 NVL": 835e12,  # H100 data sheet, NVL: 1,671 with sparsity
    "NVIDIA H200": 989e12,  # H200 data sheet, SXM: 1,979 with sparsity
    "NVIDIA H200 NVL": 835e12,  # H200 data sheet, NVL: 1,671 with sparsity
    "NVIDIA GH200": 989e12,  # GH200 data sheet: 1,979 with sparsity
    "NVIDIA B200": 2250e12,  # HGX B200 data sheet: 36 PFLOPS of 8, with sparsity
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4, and so on: a chip's peak
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_of(device_kind: str) -> float | None:
    """Return a device's operations per second in bfloat16; None if they are unknown.

    So they are for a part of a GPU (MIG).
    """
    names = [name for name in PEAK if device_kind.startswith(name)]
    return PEAK[max(names, key=len)] if names and "MIG" not in device_kind else None


@dataclass(frozen=True)
class Cost:
    """Of one training step.

    Attributes:
        operations: floating-point operations of the network for the whole batch,
            forward and backward, without what rematerialisation and streaming repeat.
        arguments: bytes of the state and the batch on one device.
        temporaries: bytes of everything in between on one device.
        limit: bytes that one device has; None if unknown.
        peak: operations per second of all devices in bfloat16; None if unknown.
    """

    operations: float
    arguments: int
    temporaries: int
    limit: int | None
    peak: float | None

    @property
    def needed(self) -> int:
        """Bytes on one device."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether a device has as much memory, as far as that is known."""
        return self.limit is None or self.needed <= self.limit

    def __str__(self) -> str:
        """Say what a step takes."""
        return (
            f"a step takes {self.operations / 1e12:.4g} TFLOP, and on each device "
            f"{gigabytes(self.arguments)} for state and batch and "
            f"{gigabytes(self.temporaries)} to compute with"
        )

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """Return `tflops_per_second` and, where the peak is known, `utilisation`."""
        rate = self.operations * steps_per_second
        known = {"utilisation": rate / self.peak} if self.peak else {}
        return {"tflops_per_second": rate / 1e12, **known}


def measure(
    compiled: jax.stages.Compiled, *, model: NetworkConfig, data: DataConfig, mesh: Mesh
) -> Cost:
    """Read the cost of a compiled training step of a network on crops, on a mesh."""
    memory: Any = compiled.memory_analysis()
    forward = forward_operations(model, data.patch_shape)
    device = mesh.devices.flat[0]
    peak = peak_of(device.device_kind)
    return Cost(
        operations=3 * data.batch_size * forward,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        limit=device_memory(mesh),
        peak=peak * mesh.size if peak else None,
    )


def device_memory(mesh: Mesh) -> int | None:
    """Return the bytes one device can use; CPU devices share the machine's memory."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def require_fit(cost: Cost) -> None:
    """Raise `TooLargeError` where a step needs more memory than its device has."""
    if cost.fits:
        return
    assert cost.limit is not None
    raise TooLargeError(
        f"a training step needs {gigabytes(cost.needed)} on each device "
        f"({gigabytes(cost.arguments)} for state and batch and "
        f"{gigabytes(cost.temporaries)} to compute with), but a device has "
        f"{gigabytes(cost.limit)}."
    )
