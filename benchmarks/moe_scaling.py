"""How Swin SMT grows with its experts and its Soft MoE stages.

    python -m benchmarks.moe_scaling [--quick] [--side=64] [--json=FILE] [--plot=FILE]
    python -m benchmarks.moe_scaling --train --root=data/phantoms --steps=400

For the paper's network, 118 classes, batch 1, float32: parameters; floating-point
operations of the forward pass, counted in the dense form, whose products the streaming
form repeats; compiled memory (arguments and temporaries) of the loss with its
gradient and the time of it, where --limit_gb lets it run; and, for 1, 2, 4 and 8
devices on the mesh's expert axis, the bytes of parameters and Adam's moments that each
device holds. --quick leaves out what must be compiled, for all but the first point.

--train trains a small network of every point for --steps on a dataset and adds its Dice
by group on the test split. Small networks and short runs on phantoms: a study of the
tendency, not of the paper's result.
"""

import dataclasses
import json
import platform
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from matplotlib.figure import Figure

from benchmarks import command_line, define_file
from configs import demo, swin_smt_paper
from swinsmt_jax import losses, models
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.data.totalsegmentator import find_cases
from swinsmt_jax.evaluation import run
from swinsmt_jax.training import loop
from swinsmt_jax.training.checkpoint import load_model
from swinsmt_jax.training.operations import forward_operations
from swinsmt_jax.training.state import abstract_model

EXPERTS = (4, 8, 16, 32, 64, 128)
STAGES = (1, 2, 3, 4)
EXPERT_AXES = (1, 2, 4, 8)
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


def gradient_cost(config, side, *, limit_gb):
    """Return compiled GB of the loss with its gradient, and seconds if it may run."""
    graphdef, params = abstract_model(config)
    x = jax.ShapeDtypeStruct((1, side, side, side, 1), jnp.float32)
    y = jax.ShapeDtypeStruct(x.shape[:-1], jnp.uint8)

    def loss(params, x, y):
        return losses.dice_cross_entropy(nnx.merge(graphdef, params)(x), y)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, x, y).compile()
    memory = compiled.memory_analysis()
    gb = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9
    if gb + memory.output_size_in_bytes / 1e9 > limit_gb:
        return gb, None
    arguments = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (params, x, y))
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return gb, time.perf_counter() - start


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
    }
    if compiled:
        gb, seconds = gradient_cost(config, side, limit_gb=limit_gb)
        row |= {"gradient_gb": gb, "gradient_seconds": seconds}
    return row


def trained_dice(num_experts, num_moe_stages, *, root, steps):
    """Train the demo's network with these experts; return Dice by group on test."""
    values = demo.get_config()
    values.model.update({"num_experts": num_experts, "num_moe_stages": num_moe_stages})
    values.data.root = root
    values.training.update({"num_steps": steps, "checkpoint_every": steps})
    config = from_config_dict(values)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(config, workdir=folder)
        config, model, _ = load_model(Path(folder))
        scores = run.validate(
            run.predict_fn(model), config, find_cases(root, split="test")
        )
    return {"overall": scores["dice"], **scores["groups"]}


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
    if "dice" in row:
        text += "  Dice " + " ".join(f"{n} {d:.3f}" for n, d in row["dice"].items())
    return text


def plot(rows, path):
    """Draw parameters, operations, memory, time and Dice against the experts.

    Points of a larger patch, which many experts need, are hollow and stand alone.
    """
    side = min(row["side"] for row in rows)
    panels = [
        ("parameters, millions", lambda r: r["parameters"] / 1e6),
        ("forward, GFLOP", lambda r: r["forward_flops"] / 1e9),
        ("gradient, GB", lambda r: r["gradient_gb"]),
        ("gradient, seconds", lambda r: r["gradient_seconds"]),
        ("Dice", lambda r: r.get("dice", {}).get("overall")),
    ]
    panels = [(n, f) for n, f in panels if any(f(r) is not None for r in rows)]
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    for axis, (name, value) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        for stages in sorted({r["moe_stages"] for r in rows}):
            found = [r for r in rows if r["moe_stages"] == stages and value(r)]
            same = [(r["experts"], value(r)) for r in found if r["side"] == side]
            (line,) = axis.plot(
                *(zip(*same, strict=True) if same else ([], [])),
                "o-",
                label=f"{stages} stages",
            )
            for row in (r for r in found if r["side"] != side):
                axis.plot(
                    row["experts"], value(row), "o", mfc="none", c=line.get_color()
                )
        axis.set(xlabel="experts", title=name, xscale="log")
        axis.set_xticks(EXPERTS, labels=map(str, EXPERTS))
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(_):
    options = flags.FLAGS
    rows = []
    for stages in map(int, options.stages):
        for experts in map(int, options.experts):
            row = point(
                experts,
                stages,
                side=options.side,
                compiled=not (options.quick and rows),
                limit_gb=options.limit_gb,
            )
            if options.train:
                row["dice"] = trained_dice(
                    experts, stages, root=options.root, steps=options.steps
                )
            print(line(row), flush=True)
            rows.append(row)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        report = {
            "headline": {
                f"parameters_{r['experts']}_{r['moe_stages']}": r["parameters"]
                for r in rows
            },
            "rows": rows,
            "machine": f"{platform.machine()} {jax.devices()[0].device_kind}",
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "command": command_line(),
        }
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "compile the first point alone")
    flags.DEFINE_list("experts", list(map(str, EXPERTS)), "numbers of experts")
    flags.DEFINE_list("stages", list(map(str, STAGES)), "numbers of Soft MoE stages")
    flags.DEFINE_integer("side", 64, "side of the patch; larger where experts need it")
    flags.DEFINE_float("limit_gb", 10.0, "run what needs no more memory")
    define_file("json", "also write the figures to this file")
    define_file("plot", "also draw the figures into this file")
    flags.DEFINE_bool("train", False, "train every point and add its Dice")
    flags.DEFINE_string("root", "data/phantoms", "dataset of --train")
    flags.DEFINE_integer("steps", 400, "training steps of --train")
    app.run(main)
