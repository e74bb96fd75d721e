"""Do experts help? Swin SMT by experts and Soft MoE stages, trained on phantoms.

    python -m benchmarks.moe_study --points=0,1x3,4x3,16x3 --seeds=0,1,2 \
        [--once=4x1,4x2] [--budget_in=steps] [--json=FILE] [--plot=FILE]
    python -m benchmarks.moe_study --mesh=2,4 --devices=8 ...

A point such as 4x3 is a network with 4 experts in its 3 last stages; 0 is Swin UNETR,
the same network without experts. Each is trained with every seed, and those of --once
with the first seed alone. A point may be followed by changes: 4x3+fused rounds the
routing as a GPU does, 4x3+slots=learned+slots_per_expert=4 learns its slots; see
`benchmarks.trials`. With --mesh=DATA,EXPERT the networks are trained on a mesh of
DATA x EXPERT devices, with the batch in --batch; on a CPU --devices makes virtual ones.

Printed are parameters, operations and seconds of training, Dice by group on the test
phantoms, in per cent, with 95 % bootstrap intervals over cases and seeds, and the
difference to the first point, resampled in pairs. The JSON also has what the experts do
half-way and at the end: their importance and load, and the entropies of routing. The
figure shows Dice and parameters by experts, and how evenly the experts are used.

The runs are kept in --workdir, and the same command continues them; it may be shared
with `benchmarks.compare`. --quick trains two tiny networks for two steps.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks import define_file, run
from benchmarks.compare import markdown
from benchmarks.trials import define_flags, save_rows, set_quick, study
from swinsmt_jax import checks
from swinsmt_jax.runtime import startup

POINTS = ("0", "1x3", "4x3", "16x3")


def name_of(point: str) -> str:
    """Return the name of a point's network, see `benchmarks.trials`.

    Raises:
        UserError: for a point of another form.
    """
    sizes, *changes = point.split("+")
    experts, _, stages = sizes.partition("x")
    if sizes == "0":
        name = "swin_unetr"
    else:
        checks.require(
            experts.isdigit() and stages.isdigit(),
            f"--points has {point!r}, but a point is 0, or experts x stages as in 4x3.",
        )
        name = f"swin_smt+num_experts={experts}+num_moe_stages={stages}"
    return "+".join([name, *changes])


def evenness(experts: Sequence[dict]) -> dict[str, float]:
    """Return by step how evenly experts are used, over seeds and blocks.

    1 where all have the same importance, and 1 / E where one has all of it: the inverse
    of the sum of squared importances, by the number of experts.
    """
    found: dict[str, list[float]] = {}
    for run_ in experts:
        for step, blocks in run_.items():
            for block in blocks.values():
                share = np.array(block["importance"])
                even = 1 / (share**2).sum() / len(share)
                found.setdefault(step, []).append(float(even))
    return {step: float(np.mean(values)) for step, values in found.items()}


def plot(rows: Sequence[dict], path: str) -> None:
    """Draw Dice, parameters and the use of experts against the number of experts."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    dice, parameters, even = figure.subplots(1, 3)
    plain = [row for row in rows if "+" not in row["point"]]
    for row in plain:
        if row["point"] == "0":
            low, high = row["interval"]["overall"]
            dice.axhspan(low, high, color="grey", alpha=0.2)
            dice.axhline(row["dice"]["overall"], color="grey", label="no experts")
    sizes = [(*map(int, r["point"].split("x")), r) for r in plain if "x" in r["point"]]
    for stages in sorted({size[1] for size in sizes}):
        found = sorted((e, r) for e, s, r in sizes if s == stages)
        experts, own = [e for e, _ in found], [r for _, r in found]
        mean = np.array([row["dice"]["overall"] for row in own])
        ends = np.array([row["interval"]["overall"] for row in own]).T
        label = f"{stages} stage{'s' * (stages > 1)}"
        dice.errorbar(
            experts, mean, np.abs(ends - mean), fmt="o-", capsize=3, label=label
        )
        parameters.plot(experts, [row["parameters"] / 1e6 for row in own], "o-")
        even.plot(experts, [[*evenness(r["experts"]).values()][-1] for r in own], "o-")
    dice.set(title="Dice, %", ylim=(0, None))
    parameters.set(title="parameters, millions", ylim=(0, None))
    even.set(title="evenness of importance", ylim=(0, 1.05))
    counts = sorted({size[0] for size in sizes})
    for axes in figure.axes:
        axes.set(xlabel="experts", xscale="log")
        axes.set_xticks(counts, labels=map(str, counts))
        axes.minorticks_off()
    dice.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def main(options):
    startup.start()
    if options.quick:
        set_quick(options, points=["0", "2x1"])
    names = {name_of(point): point for point in [*options.points, *options.once]}
    once = [name_of(point) for point in options.once]
    rows = []
    for row in study(list(names), options, once=once):
        rows.append({"point": names[row["name"]], **row})
        save_rows(rows)
    print(markdown(rows))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    flags.DEFINE_list("points", list(POINTS), "trained with every seed")
    flags.DEFINE_list("once", [], "points trained with the first seed")
    flags.DEFINE_integer("devices", 1, "virtual devices on a CPU", lower_bound=1)
    define_file("plot", "also draw the figure into this file")
    define_flags(workdir="runs/moe_study")
    run(main, quick="two tiny networks, two steps")
