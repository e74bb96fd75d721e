"""Where arrays live: the device mesh, batches, and parameters by rules on their names.

The mesh has the axes "data" and "expert". Batches are divided over both, expert weights
over "expert", and everything else is replicated.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from swinsmt_jax import checks
from swinsmt_jax.config import MeshConfig
from swinsmt_jax.layers.experts import BATCH, DATA, EXPERT
from swinsmt_jax.models.registry import NetworkConfig

Rules = tuple[tuple[str, PartitionSpec], ...]
EXPERT_RULES: Rules = ((r"/experts/", PartitionSpec(EXPERT)),)


def make_mesh(
    config: MeshConfig, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arrange devices as `config.data` x `config.expert`; the first ones if too many.

    Args:
        config: sizes of the axes; `data = -1` takes all devices that are left.
        devices: of all processes; by default all there are.

    Raises:
        UserError: for a mesh larger than the devices, an expert axis that does not
            divide them, or, with several processes, devices left over.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, data = len(devices), config.data
    checks.require(
        config.expert <= count and (data != -1 or count % config.expert == 0),
        f"mesh.expert is {config.expert}, but must divide the number of devices, "
        f"{count}: take one of {checks.listed(checks.divisors(count))}.",
    )
    if data == -1:
        data = count // config.expert
    size = data * config.expert
    checks.require(
        size <= count,
        f"the mesh asks for mesh.data x mesh.expert = {data} x {config.expert} = "
        f"{size} devices, but there are {count}; mesh.data=-1 uses all.",
    )
    checks.require(
        size == count or jax.process_count() == 1,
        f"the mesh takes {size} of {count} devices, but with several processes it must "
        "use all; mesh.data=-1 does.",
    )
    return jax.make_mesh(
        (data, config.expert),
        (DATA, EXPERT),
        axis_types=(AxisType.Auto,) * 2,  # the default, Explicit, refuses Soft MoE
        devices=devices[:size],
    )


def within(mesh: Mesh) -> AbstractContextManager:
    """Return the context in which a traced network divides its experts over `mesh`."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def require_divisible(mesh: Mesh, *, batch_size: int, accumulate: int = 1) -> None:
    """Raise `UserError` unless devices and parts divide the batch evenly."""
    share, rest = divmod(batch_size, mesh.size)
    checks.require(
        rest == 0,
        f"data.batch_size is {batch_size}, but must be a multiple of the {mesh.size} "
        f"devices of the mesh (data {mesh.shape[DATA]} x expert {mesh.shape[EXPERT]}); "
        f"the next valid size is {(share + 1) * mesh.size}. mesh.data can use fewer "
        "devices; data.batch_per_device counts by device instead.",
    )
    checks.require(
        share % accumulate == 0,
        f"training.accumulate is {accumulate}, but must divide the {share} samples "
        f"that each of the {mesh.size} devices has of data.batch_size = {batch_size}: "
        f"take one of {checks.listed(checks.divisors(share))}.",
    )


def local_mesh(mesh: Mesh) -> Mesh:
    """Return this process's part of a mesh, along "data"; of one process, the mesh."""
    if jax.process_count() == 1:
        return mesh
    devices = mesh.local_devices
    config = MeshConfig(data=len(devices), expert=1)
    return make_mesh(config, devices=devices)


def copy_to_local(tree: Any, *, mesh: Mesh) -> Any:
    """Return a tree of global arrays as a whole copy on each device of a local mesh.

    The copy can be used without the other processes, but all of them must make it.
    A process that is alone gets the tree itself.
    """
    if jax.process_count() == 1:
        return tree

    def copy(leaf):
        whole = jax.device_put(leaf, replicated(leaf.sharding.mesh))
        parts = {shard.device: shard.data for shard in whole.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            leaf.shape, replicated(mesh), [parts[d] for d in mesh.devices.flat]
        )

    return jax.tree.map(copy, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its leading axis over all devices."""
    return NamedSharding(mesh, BATCH)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays of this process's part of a batch, divided over the mesh.

    On a CPU they share the memory of a batch that begins at a multiple of 64 bytes, and
    are read when a step runs: nobody may write to a batch that was placed.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def parameter_rules(config: NetworkConfig) -> Rules:
    """Return the rules for a network's parameters; what none matches is replicated."""
    return EXPERT_RULES if config.num_experts else ()


def path_name(path: Sequence) -> str:
    """Join the dictionary keys of a leaf's path: swinViT/layers2/blocks/0/norm1/scale.

    Other parts of the path (fields, positions) are left out, so that an optimiser's
    moments have the names of their parameters.
    """
    keys = (part.key for part in path if isinstance(part, jax.tree_util.DictKey))
    return "/".join(str(key) for key in keys)


def tree_shardings(tree: Any, *, mesh: Mesh, rules: Rules) -> Any:
    """Return the sharding of every leaf: that of the first rule its name matches.

    Args:
        tree: of arrays or `jax.ShapeDtypeStruct`; parameters, or a state with moments.
        mesh: with the axes that the rules name.
        rules: (regular expression, PartitionSpec) in order, searched in `path_name`.

    Raises:
        UserError: for a rule that matches no leaf, and a side that its axis does not
            divide.
    """
    unused = dict(rules)

    def sharding_of(path, leaf):
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                unused.pop(pattern, None)
                _require_fit(name, leaf.shape, spec, mesh)
                return NamedSharding(mesh, spec)
        return replicated(mesh)

    shardings = jax.tree_util.tree_map_with_path(sharding_of, tree)
    checks.require(
        not unused,
        f"sharding rule {next(iter(unused), '')!r} matches no parameter; fix its "
        "pattern or remove it.",
    )
    return shardings


def _require_fit(name, shape, spec, mesh):
    for side, axis in zip(shape, spec, strict=False):
        parts = 1 if axis is None else mesh.shape[axis]
        checks.require(
            side % parts == 0,
            f"parameter {name} has shape {shape}, but its side {side} must be a "
            f"multiple of {parts}, the size of the mesh axis {axis!r}.",
        )
