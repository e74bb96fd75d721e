"""What a training step sends between devices, for every way to arrange eight of them.

    python -m benchmarks.collectives [--quick] [--devices=8] [--json=FILE]

Compiles the step of a small Swin SMT for meshes of data x expert devices and reads the
collectives and their bytes for each device from the program. Off an accelerator the
devices are virtual ones of the CPU; the program is divided in the same way. --quick
takes two of them and a patch of 32^3.
"""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import define_file, report, write
from swinsmt_jax import SwinSMTConfig, sharding
from swinsmt_jax.config import MeshConfig, OptimizerConfig
from swinsmt_jax.training import losses
from swinsmt_jax.training import state as train_state
from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
from swinsmt_jax.training.step import make_train_step

KINDS = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter")
KINDS += ("collective-permute",)
ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1}
PATCH, QUICK_PATCH = (64, 64, 64), (32, 32, 32)
QUICK_DEVICES = 2
# Groups of one device each, as in {{0},{1}} or [2,1]<=[2]: nothing is sent.
ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\])")


def small_model(num_experts):
    """Return a Swin SMT with the paper's stages and 24 features."""
    return SwinSMTConfig(
        1, 16, 24, num_experts=num_experts, num_moe_stages=3, depths=(1, 1, 1, 1)
    )


def compile_step(model, mesh, *, batch_size, patch=PATCH):
    """Return the compiled training step and the state's shapes and shardings.

    The loss has its form for accelerators: that for CPUs scatters, and what it scatters
    of all devices' voxels would be added up between them.
    """
    config = OptimizerConfig(1e-3)
    schedule = make_schedule(config, num_steps=10)
    optimizer = make_optimizer(config, schedule, network=model)
    graphdef, abstract = train_state.abstract_state(model, optimizer, mesh=mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=losses.make("dice_ce"),
        schedule=schedule,
        seed=0,
        abstract=abstract,
        mesh=mesh,
    )
    place = sharding.batch_sharding(mesh)
    shape = (batch_size, *patch)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, 1), jnp.float32, sharding=place),
        "label": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=place),
    }
    with mock.patch.object(losses, "sums_by_scatter", losses.sums_by_comparison):
        lowered = step.lower(abstract, batch)
    return lowered.compile(), abstract


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


def bytes_per_device(abstract, *, pattern):
    """Return the bytes on each device of the leaves whose name the pattern finds."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        if re.search(pattern, sharding.path_name(path)):
            shape = leaf.sharding.shard_shape(leaf.shape)
            total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


def rows_of(devices, *, num_experts, patch=PATCH):
    """Yield one row for each mesh of data x expert = devices."""
    model = small_model(num_experts)
    for expert in (n for n in range(1, devices + 1) if devices % n == 0):
        if num_experts % expert:
            continue
        mesh = sharding.make_mesh(
            MeshConfig(devices // expert, expert), devices=jax.devices()[:devices]
        )
        compiled, abstract = compile_step(model, mesh, batch_size=devices, patch=patch)
        experts = bytes_per_device(abstract, pattern="/experts/")
        yield {
            "data": devices // expert,
            "expert": expert,
            "collectives": collectives(compiled.as_text()),
            "expert_bytes_per_device": experts,
            "rest_bytes_per_device": bytes_per_device(abstract, pattern="") - experts,
        }


def headline(rows):
    """Return bytes for each device by kind and mesh, and what it holds, flat."""
    found = {}
    for row in rows:
        mesh = f"{row['data']}x{row['expert']}"
        for kind in KINDS:
            sent = row["collectives"].get(kind, {"bytes": 0})
            found[f"{kind.replace('-', '_')}_bytes_{mesh}"] = sent["bytes"]
        found[f"expert_bytes_per_device_{mesh}"] = row["expert_bytes_per_device"]
        found[f"rest_bytes_per_device_{mesh}"] = row["rest_bytes_per_device"]
    return found


def print_row(row):
    sent = "  ".join(
        f"{kind} {c['count']} ({c['bytes'] / 1e6:.1f} MB)"
        for kind, c in row["collectives"].items()
    )
    print(
        f"{row['data']} x {row['expert']}   experts and moments "
        f"{row['expert_bytes_per_device'] / 1e6:7.2f} MB, the rest "
        f"{row['rest_bytes_per_device'] / 1e6:7.2f} MB   {sent}",
        flush=True,
    )


def main(_):
    options = flags.FLAGS
    devices = min(options.devices, jax.device_count())
    patch = QUICK_PATCH if options.quick else PATCH
    if options.quick:
        devices = min(devices, QUICK_DEVICES)
    experts = options.experts
    print(f"data x expert, {experts} experts, batch {devices}, {patch}, per device:")
    rows = []
    for row in rows_of(devices, num_experts=experts, patch=patch):
        print_row(row)
        rows.append(row)
        write(options.json, report(headline(rows), rows=rows, patch=patch))


def _run(argv):
    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_num_cpu_devices", flags.FLAGS.devices)
    main(argv)


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "two devices, a patch of 32^3")
    flags.DEFINE_integer("devices", 8, "at most; virtual ones on a CPU")
    flags.DEFINE_integer("experts", 8, "experts of every Soft MoE")
    define_file("json", "also write the figures to this file")
    app.run(_run)
