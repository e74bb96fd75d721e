"""What a training step sends between devices, and how well it may scale.

    python -m benchmarks.scaling [--quick] [--json=FILE]

Compiles the training step of the paper's Swin SMT, one patch on each device, for 1, 2,
4 and 8 devices (virtual ones off an accelerator: a program is divided in the same way)
and every mesh of data x expert devices, and reads from the program what each device
sends and holds. From that follows the efficiency to be expected on real nodes, for one
patch of 128^3 on each GPU, by this model:

- a GPU computes at --utilisation of its bfloat16 peak;
- parameters' gradients, float32, are added up by rings: within a node each of n GPUs
  that hold the same parameters sends and gets 2 (n - 1) / n of their gradients, n being
  the data axis for experts and 8 for the rest; then, between m nodes, 2 (m - 1) / m of
  its share, which is an eighth of all gradients for every mesh;
- tokens of experts that lie elsewhere (all-to-all) stay within a node, and their bytes
  grow with the voxels. A CPU's program sends them in float32, a GPU's in bfloat16;
- links carry what their data sheets say in one direction. "no overlap" waits for all of
  it; "overlap" hides the gradients' sum behind the backward pass, two thirds of a step.

--quick compiles a small network on 1 and 2 devices.
"""

import dataclasses

import jax
from absl import app, flags

from benchmarks import collectives, define_file, report, write
from configs import swin_smt_paper
from swinsmt_jax import sharding
from swinsmt_jax.config import MeshConfig, from_config_dict
from swinsmt_jax.runtime.cost import PEAK
from swinsmt_jax.runtime.operations import forward_operations

DEVICES = (1, 2, 4, 8)
FULL_SIDE = 128
BFLOAT16_SHARE = 1 / 2  # of the float32 that XLA sends between CPUs for bfloat16


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of 8 GPUs.

    Attributes:
        name: of the GPU, as in `training.cost.PEAK`.
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


def measure(model, data: int, expert: int, *, side: int) -> dict:
    """Compile a step for a mesh; return what a device sends and holds."""
    devices = jax.devices()[: data * expert]
    mesh = sharding.make_mesh(MeshConfig(data, expert), devices=devices)
    compiled, like = collectives.compile_step(
        model, mesh, batch_size=mesh.size, patch=(side,) * 3
    )
    memory = compiled.memory_analysis()
    return {
        "data": data,
        "expert": expert,
        "collectives": collectives.collectives(compiled.as_text()),
        "expert_gradients": collectives.bytes_per_device(
            like.params, pattern="/experts/"
        ),
        "state_gb": collectives.bytes_per_device(like, pattern="") / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
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
    """Return efficiencies, and what each mesh holds, by flat names."""
    found = {
        f"{e['cluster']} {e['data']}x{e['expert']}": e["no_overlap"] for e in estimates
    }
    for row in rows:
        name = f"{row['data']}x{row['expert']}"
        found[f"state_gb_{name}"] = row["state_gb"]
        found[f"temporaries_gb_{name}"] = row["temporaries_gb"]
    return found


def line(row: dict) -> str:
    """Format what a mesh sends."""
    sent = "  ".join(
        f"{kind} {found['bytes'] / 1e6:.0f} MB ({found['count']})"
        for kind, found in row["collectives"].items()
    )
    return (
        f"{row['data']} x {row['expert']}  state {row['state_gb']:5.2f} GB  "
        f"temporaries {row['temporaries_gb']:5.2f} GB  {sent or 'nothing sent'}"
    )


def main(_):
    options = flags.FLAGS
    quick = options.quick
    paper = from_config_dict(swin_smt_paper.get_config()).model
    model = collectives.small_model(8) if quick else paper
    print(f"data x expert devices, one patch of {options.side}^3 on each; per device:")
    rows = []
    for devices in (1, 2) if quick else DEVICES:
        for data, expert in meshes(devices):
            rows.append(measure(model, data, expert, side=options.side))
            print(line(rows[-1]), flush=True)
    operations = 3 * forward_operations(paper, (FULL_SIDE,) * 3)
    estimates = []
    for cluster in () if quick else CLUSTERS:
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
    found = report(
        headline(rows, estimates),
        operations_per_patch=operations,
        utilisation=options.utilisation,
        meshes=rows,
        estimates=estimates,
    )
    write(options.json, found)


def _run(argv):
    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_num_cpu_devices", max(DEVICES))
    main(argv)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "a small network on 1 and 2 devices")
    flags.DEFINE_integer("side", 64, "of the patch that is compiled")
    flags.DEFINE_float("utilisation", 0.3, "share of the peak that a GPU computes at")
    define_file("json", "also write the figures to this file")
    app.run(_run)
