"""How Swin SMT grows with its experts and its Soft MoE stages.

    python -m benchmarks.moe_scaling [--quick] [--side=64] [--json=FILE] [--plot=FILE]

For the paper's network, 118 classes, batch 1, float32: parameters; floating-point
operations of the forward pass, counted in the dense form, whose products the streaming
form repeats; compiled memory (arguments and temporaries) of the loss with its
gradient and the time of it, where --limit_gb lets it run; and, for 1, 2, 4 and 8
devices on the mesh's expert axis, the bytes of parameters and Adam's moments that each
device holds. Where there are several devices, the training step is also compiled for
every mesh of data x expert of them, one patch on each: memory of a device, and the time
of a step where it may run. On a CPU --devices=N makes N virtual ones, which share its
cores: their times show what dividing costs, not what it gains. --quick leaves out what
must be compiled, for all but the first point. `benchmarks.moe_study` trains.
"""

import dataclasses

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks import define_file, memory_limit_gb, programs, run, save, scaling
from swinsmt_jax import models
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import swin_smt_paper
from swinsmt_jax.models import abstract_model
from swinsmt_jax.runtime.operations import forward_operations

EXPERTS = (4, 8, 16, 32, 64, 128)
STAGES = (1, 2, 3, 4)
EXPERT_AXES = (1, 2, 4, 8)
IN_DECADES = ("forward, GFLOP", "gradient, seconds")  # panels of the plot
COPIES = 3  # a parameter and Adam's two moments


def paper_model(num_experts, num_moe_stages, **changes):
    """Return the paper's network with other numbers of experts and stages."""
    config = from_config_dict(swin_smt_paper.get_config()).model
    return dataclasses.replace(
        config,
        num_experts=num_experts,
        num_moe_stages=num_moe_stages,
        dtype="float32",
        remat=(),
        **changes,
    )


def held_bytes(config):
    """Return {devices on the expert axis: bytes of state on each device}."""
    _, params = abstract_model(config)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    parts = {True: 0, False: 0}
    for path, leaf in leaves:
        is_expert = any(getattr(p, "key", None) == "experts" for p in path)
        parts[is_expert] += COPIES * leaf.dtype.itemsize * int(np.prod(leaf.shape))
    divisors = (n for n in EXPERT_AXES if config.num_experts % n == 0)
    return {n: parts[False] + parts[True] // n for n in divisors}


def mesh_rows(config, side, *, limit_gb):
    """Yield memory of a device and time of a training step by mesh of all devices."""
    count = jax.device_count()
    shared = count if jax.default_backend() == "cpu" else 1  # memory of the machine
    for data, expert in scaling.meshes(count) if count > 1 else ():
        if config.num_experts % expert:
            continue
        compiled, abstract_state, mesh = scaling.compile_step(
            config, data, expert, side=side
        )
        gb = programs.gigabytes(compiled)
        row = {"data": data, "expert": expert, "step_gb": gb, "step_seconds": None}
        if shared * gb <= limit_gb:
            row["step_seconds"] = step_seconds(compiled, abstract_state, mesh, side)
        yield row


def step_seconds(compiled, abstract_state, mesh, side):
    """Return the seconds of a training step, after one that is not counted."""
    state = jax.tree.map(
        lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), abstract_state
    )
    batch = programs.random_batch((mesh.size, side, side, side), mesh, classes=1)
    state, _ = compiled(state, batch)  # the state's memory is given away
    return min(programs.seconds_of(compiled, state, batch, repeats=1, warm=0))


def point(num_experts, num_moe_stages, *, side, compiled, limit_gb):
    """Measure one network."""
    config = paper_model(num_experts, num_moe_stages)
    if (side // 16) ** 3 < num_experts:
        side = 16 * int(np.ceil(num_experts ** (1 / 3)))
        side += -side % config.total_stride
    row = {
        "experts": num_experts,
        "moe_stages": num_moe_stages,
        "side": side,
        "parameters": models.count_parameters(config),
        "forward_flops": forward_operations(config, (side,) * 3),
        "held_bytes": held_bytes(config),
        "gradient_gb": None,
        "gradient_seconds": None,
        "meshes": [],
    }
    if compiled:
        lowered = programs.lower(config, side, what="gradient")
        gradient, seconds = programs.seconds_within(lowered, limit_gb=limit_gb)
        row["gradient_gb"] = programs.gigabytes(gradient)
        row["gradient_seconds"] = seconds
        row["meshes"] = list(mesh_rows(config, side, limit_gb=limit_gb))
    return row


def headline(rows):
    """Return the figures of every point, and those of the largest, by flat names."""
    found = {}
    for row in rows:
        name = f"{row['experts']}_{row['moe_stages']}"
        found |= {f"{key}_{name}": value for key, value in _figures(row).items()}
        for mesh in row["meshes"]:
            of_mesh = f"{name}_{mesh['data']}x{mesh['expert']}"
            found[f"step_gb_{of_mesh}"] = mesh["step_gb"]
            found[f"step_s_{of_mesh}"] = mesh["step_seconds"]
    if rows:
        largest = max(rows, key=lambda row: row["parameters"])
        found |= {f"largest_{k}": v for k, v in _figures(largest).items()}
    return found


def _figures(row):
    found = {
        "parameters": row["parameters"],
        "forward_gflop": row["forward_flops"] / 1e9,
        "held_gb": row["held_bytes"][1] / 1e9,
        "gradient_gb": row["gradient_gb"],
        "gradient_s": row["gradient_seconds"],
    }
    return {name: value for name, value in found.items() if value is not None}


def line(row):
    """Format a row of the table."""
    held = "/".join(f"{b / 1e9:.2f}" for b in row["held_bytes"].values())
    text = (
        f"{row['experts']:4} experts {row['moe_stages']} stages "
        f"{row['parameters']:13,} parameters  {row['side']:3}^3 "
        f"{row['forward_flops'] / 1e9:8.0f} GFLOP  held {held} GB"
    )
    if row["gradient_gb"] is not None:
        seconds = row["gradient_seconds"]
        ran = "not run" if seconds is None else f"{seconds:.2f} s"
        text += f"  gradient {row['gradient_gb']:.2f} GB {ran}"
    for mesh in row["meshes"]:
        seconds = mesh["step_seconds"]
        ran = "not run" if seconds is None else f"{seconds:.2f} s"
        text += f"  {mesh['data']}x{mesh['expert']} {mesh['step_gb']:.2f} GB {ran}"
    return text


def plot(rows, path):
    """Draw parameters, operations, memory and time against the experts.

    Points of a larger patch, which many experts need, are hollow and stand alone.
    """
    side = min(row["side"] for row in rows)
    panels = [
        ("parameters, millions", lambda r: r["parameters"] / 1e6),
        ("forward, GFLOP", lambda r: r["forward_flops"] / 1e9),
        ("gradient, GB", lambda r: r["gradient_gb"]),
        ("gradient, seconds", lambda r: r["gradient_seconds"]),
    ]
    panels = [(n, f) for n, f in panels if any(f(r) is not None for r in rows)]
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, value) in zip(axes, panels, strict=True):
        for stages in sorted({r["moe_stages"] for r in rows}):
            found = [r for r in rows if r["moe_stages"] == stages]
            found = [r for r in found if value(r) is not None]
            same = [(r["experts"], value(r)) for r in found if r["side"] == side]
            (line,) = axis.plot(
                *(zip(*same, strict=True) if same else ([], [])),
                "o-",
                label=f"{stages} stage{'s' * (stages > 1)}",
            )
            for row in (r for r in found if r["side"] != side):
                axis.plot(
                    row["experts"], value(row), "o", mfc="none", c=line.get_color()
                )
        axis.set(xlabel="experts", title=name, xscale="log")
        axis.set_xticks(EXPERTS, labels=map(str, EXPERTS))
        axis.minorticks_off()
        if name in IN_DECADES:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(options):
    points = [(int(e), int(s)) for s in options.stages for e in options.experts]
    limit = memory_limit_gb(options.limit_gb)
    rows = []
    for experts, stages in points:
        row = point(
            experts,
            stages,
            side=options.side,
            compiled=not (options.quick and rows),
            limit_gb=limit,
        )
        print(line(row), flush=True)
        rows.append(row)
        save(headline(rows), rows=rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    flags.DEFINE_list("experts", list(map(str, EXPERTS)), "numbers of experts")
    flags.DEFINE_list("stages", list(map(str, STAGES)), "numbers of Soft MoE stages")
    flags.DEFINE_integer("side", 64, "side of the patch; larger where experts need it")
    flags.DEFINE_integer("devices", 1, "virtual devices on a CPU", lower_bound=1)
    flags.DEFINE_float("limit_gb", 10.0, "run what needs no more memory")
    define_file("plot", "also draw the figures into this file")
    run(main, quick="compile the first point alone")
