"""What a training step sends between devices, and how well it may scale.

    python -m benchmarks.scaling [--quick] [--json=FILE]
    python -m benchmarks.scaling --small [--devices=8] [--experts=8] [--json=FILE]

Compiles the training step of the paper's Swin SMT, one patch on each device, for 1, 2,
4 and 8 devices (virtual ones off an accelerator: a program is divided in the same way)
and every mesh of data x expert devices, and reads from the program the collectives and
their bytes for each device, and what it holds. --small takes a network of 24 features
and all the devices alone. From what 8 devices send follows the efficiency to be
expected on real nodes, for one patch of 128^3 on each GPU, by this model:

- a GPU computes at --utilisation of its bfloat16 peak;
- parameters' gradients, float32, are added up by rings: within a node each of n GPUs
  that hold the same parameters sends and gets 2 (n - 1) / n of their gradients, n being
  the data axis for experts and 8 for the rest; then, between m nodes, 2 (m - 1) / m of
  its share, which is an eighth of all gradients for every mesh;
- tokens of experts that lie elsewhere (all-to-all) stay within a node, and their bytes
  grow with the voxels. A CPU's program sends them in float32, a GPU's in bfloat16;
- links carry what their data sheets say in one direction. "no overlap" waits for all of
  it; "overlap" hides the gradients' sum behind the backward pass, two thirds of a step.

--quick compiles the small network on 1 and 2 devices, and estimates nothing.
"""

import dataclasses
import re
from unittest import mock

import jax
import numpy as np
from absl import flags

from benchmarks import programs, run, save
from swinsmt_jax import SwinSMTConfig, sharding
from swinsmt_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    from_config_dict,
)
from swinsmt_jax.configs import swin_smt_paper
from swinsmt_jax.models.registry import NetworkConfig
from swinsmt_jax.runtime.cost import PEAK
from swinsmt_jax.runtime.operations import forward_operations
from swinsmt_jax.training import losses

DEVICES = (1, 2, 4, 8)
FULL_SIDE = 128
BFLOAT16_SHARE = 1 / 2  # of the float32 that XLA sends between CPUs for bfloat16
KINDS = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter")
KINDS += ("collective-permute",)
ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1}
# Groups of one device each, as in {{0},{1}} or [2,1]<=[2]: nothing is sent.
ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\])")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of 8 GPUs.

    Attributes:
        name: of the GPU, as in `runtime.cost.PEAK`.
        nodes: how many.
        within: bytes per second that a GPU sends to others of its node.
        between: bytes per second that a GPU sends to other nodes.
    """

    name: str
    nodes: int
    within: float
    between: float


# NVLink 3 and 4: 600 and 900 GB/s in both directions together (NVIDIA's data sheets of
# A100 and H100); InfiniBand HDR and NDR, one port for each GPU: 200 and 400 Gb/s.
CLUSTERS = (
    Cluster("NVIDIA A100", 1, 300e9, 25e9),
    Cluster("NVIDIA A100", 8, 300e9, 25e9),
    Cluster("NVIDIA H100", 1, 450e9, 50e9),
    Cluster("NVIDIA H100", 8, 450e9, 50e9),
)


def meshes(devices: int) -> list[tuple[int, int]]:
    """Return every (data, expert) whose product is `devices`."""
    return [(devices // n, n) for n in range(1, devices + 1) if devices % n == 0]


def small_model(num_experts: int) -> SwinSMTConfig:
    """Return a Swin SMT with the paper's stages and 24 features."""
    return SwinSMTConfig(
        1, 16, 24, num_experts=num_experts, num_moe_stages=3, depths=(1, 1, 1, 1)
    )


def compile_step(model: NetworkConfig, data: int, expert: int, *, side: int):
    """Return the compiled training step, the state's shapes, and the mesh.

    The loss has its form for accelerators: that for CPUs scatters, and what it scatters
    of all devices' voxels would be added up between them.
    """
    mesh = sharding.make_mesh(
        MeshConfig(data, expert), devices=jax.devices()[: data * expert]
    )
    shape = (mesh.size, side, side, side)
    config = ExperimentConfig(
        model=model,
        data=DataConfig(root="", patch_shape=shape[1:], batch_size=mesh.size),
        optimizer=OptimizerConfig(1e-3),
        training=TrainingConfig(num_steps=10),
    )
    step, abstract_state, _ = programs.training_step(config, mesh)
    with mock.patch.object(losses, "sums_by_scatter", losses.sums_by_comparison):
        lowered = step.lower(abstract_state, programs.abstract_batch(shape, mesh))
    return lowered.compile(), abstract_state, mesh


def collectives(text):
    """Return for each kind count and bytes that a device gets, of a program's text."""
    found = {}
    pattern = rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\((.*)"
    for shapes, kind, rest in re.findall(pattern, text):
        if ALONE.search(rest):
            continue
        total = found.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += 1
        total["bytes"] += _bytes(shapes)
    return found


def _bytes(shapes):
    total = 0
    for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        sizes = [int(side) for side in sides.split(",") if side]
        total += ITEM_BYTES[dtype] * int(np.prod(sizes, dtype=np.int64))
    return total


def bytes_per_device(abstract_state, *, pattern):
    """Return the bytes on each device of the leaves whose name the pattern finds."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state):
        if re.search(pattern, sharding.path_name(path)):
            shape = leaf.sharding.shard_shape(leaf.shape)
            total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


def measure(model: NetworkConfig, data: int, expert: int, *, side: int) -> dict:
    """Compile a step for a mesh; return what a device sends and holds."""
    compiled, abstract_state, _ = compile_step(model, data, expert, side=side)
    experts = bytes_per_device(abstract_state, pattern="/experts/")
    state = bytes_per_device(abstract_state, pattern="")
    return {
        "data": data,
        "expert": expert,
        "collectives": collectives(compiled.as_text()),
        "expert_gradients": bytes_per_device(
            abstract_state.params, pattern="/experts/"
        ),
        "expert_bytes_per_device": experts,
        "rest_bytes_per_device": state - experts,
        "state_gb": state / 1e9,
        "temporaries_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
    }


def expected(cluster: Cluster, row: dict, *, operations, utilisation, voxels) -> dict:
    """Return the efficiency of a cluster whose nodes are divided as `row` says.

    Args:
        cluster: to estimate.
        row: of `measure`, for 8 devices.
        operations: of a step on one GPU.
        utilisation: share of the peak that a GPU computes at.
        voxels: of the full patch over those of the measured one.
    """
    compute = operations / (PEAK[cluster.name] * utilisation)
    sent = {kind: found["bytes"] for kind, found in row["collectives"].items()}
    data, local = row["data"], row["data"] * row["expert"]
    experts = row["expert_gradients"]
    rest = sent.get("all-reduce", 0) - (experts if data > 1 else 0)
    ring = (_ring(local) * rest + _ring(data) * experts) / cluster.within
    share = rest / local + experts / data  # which a GPU has added up within the node
    ring += _ring(cluster.nodes) * share / cluster.between
    tokens = sent.get("all-to-all", 0) * voxels * BFLOAT16_SHARE
    exchange = (row["expert"] - 1) / row["expert"] * tokens / cluster.within
    hidden = max(0.0, ring - 2 / 3 * compute)
    return {
        "cluster": f"{8 * cluster.nodes} x {cluster.name}",
        "data": row["data"],
        "expert": row["expert"],
        "compute_ms": 1e3 * compute,
        "gradients_ms": 1e3 * ring,
        "exchange_ms": 1e3 * exchange,
        "no_overlap": compute / (compute + ring + exchange),
        "overlap": compute / (compute + hidden + exchange),
    }


def _ring(devices):
    """Bytes that each device sends for a byte that all of them add up."""
    return 2 * (devices - 1) / devices


def headline(rows: list[dict], estimates: list[dict]) -> dict:
    """Return efficiencies, and what each mesh sends and holds, by flat names."""
    found = {
        f"{e['cluster']} {e['data']}x{e['expert']}": e["no_overlap"] for e in estimates
    }
    for row in rows:
        mesh = f"{row['data']}x{row['expert']}"
        for kind in KINDS:
            sent = row["collectives"].get(kind, {"bytes": 0})
            found[f"{kind.replace('-', '_')}_bytes_{mesh}"] = sent["bytes"]
        for name in ("state_gb", "temporaries_gb"):
            found[f"{name}_{mesh}"] = row[name]
        for name in ("expert_bytes_per_device", "rest_bytes_per_device"):
            found[f"{name}_{mesh}"] = row[name]
    return found


def line(row: dict) -> str:
    """Format what a mesh holds and sends."""
    sent = "  ".join(
        f"{kind} {found['count']} ({found['bytes'] / 1e6:.1f} MB)"
        for kind, found in row["collectives"].items()
    )
    return (
        f"{row['data']} x {row['expert']}  state {row['state_gb']:5.2f} GB, of it "
        f"experts {row['expert_bytes_per_device'] / 1e6:7.2f} MB  temporaries "
        f"{row['temporaries_gb']:5.2f} GB  {sent or 'nothing sent'}"
    )


def main(options):
    small = options.small or options.quick
    paper = programs.with_all_recomputed(
        from_config_dict(swin_smt_paper.get_config()).model
    )
    model = small_model(options.experts) if small else paper
    counts = (1, 2) if options.quick else DEVICES
    if options.small and not options.quick:
        counts = (min(options.devices, jax.device_count()),)
    print(f"data x expert devices, one patch of {options.side}^3 on each; per device:")
    rows, estimates = [], []
    for count in counts:
        for data, expert in meshes(count):
            if model.num_experts % expert == 0:
                rows.append(measure(model, data, expert, side=options.side))
                print(line(rows[-1]), flush=True)
                save(headline(rows, []), meshes=rows)
    operations = 3 * forward_operations(paper, (FULL_SIDE,) * 3)
    for cluster in () if small else CLUSTERS:
        for row in rows[-len(meshes(8)) :]:
            found = expected(
                cluster,
                row,
                operations=operations,
                utilisation=options.utilisation,
                voxels=(FULL_SIDE / options.side) ** 3,
            )
            estimates.append(found)
            print(
                "{cluster:16}  {data} x {expert}  compute {compute_ms:4.0f} ms  "
                "gradients {gradients_ms:5.1f} ms  experts {exchange_ms:5.1f} ms  "
                "efficiency {no_overlap:.1%}, with overlap {overlap:.1%}".format(
                    **found
                )
            )
    save(
        headline(rows, estimates),
        operations_per_patch=operations,
        utilisation=options.utilisation,
        meshes=rows,
        estimates=estimates,
    )


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "a network of 24 features, all devices alone")
    flags.DEFINE_integer("devices", max(DEVICES), "virtual ones on a CPU")
    flags.DEFINE_integer("experts", 8, "of every Soft MoE of the small network")
    flags.DEFINE_integer("side", 64, "of the patch that is compiled")
    flags.DEFINE_float("utilisation", 0.3, "share of the peak that a GPU computes at")
    run(main, quick="a small network on 1 and 2 devices")
