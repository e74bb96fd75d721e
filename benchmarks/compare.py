"""Train several networks on the same phantoms with the same budget; compare Dice.

    python -m benchmarks.compare --models=swin_smt,swin_unetr --budget=200 \
        [--budget_in=steps] [--learning_rates=4e-3,8e-3] [--seeds=0,1] [--json=FILE]
    python -m benchmarks.compare --quick

The networks are the small forms of `benchmarks.small_networks`; phantoms are made in
--root if they are missing. All networks see the same crops in the same order. The
budget is of optimiser steps, or, with --budget_in=tflop, of forward operations (see
`trials.step_gflop`), so that a cheaper network takes more steps. Of several learning
rates each network has the one with the best Dice on the validation phantoms, with the
first seed. A name may be followed by changes, such as swin_smt+num_experts=8; see
`benchmarks.trials`.

Printed are Dice by group on the test phantoms, in per cent, with 95 % bootstrap
intervals over cases (and seeds, where there are several), and the difference of each
network to the first, resampled in pairs, with the p-value of Wilcoxon's signed-rank
test over cases (mean Dice over seeds), corrected by Holm's method over the networks.

The runs are kept in --workdir, and the same command continues them. Commands with other
--models may share it, at the same time too.

--quick trains two tiny networks for two steps, to see that it works; flags that are
given beside it hold.

A study of small networks and short runs on synthetic bodies shows a tendency, not a
published result.
"""

from absl import flags

from benchmarks import markdown_table, run, small_networks
from benchmarks.trials import define_flags, save_rows, set_quick, study
from swinsmt_jax.evaluation.compare import holm
from swinsmt_jax.runtime import startup

MODELS = ["nnunet_plain", "unetr"]  # of --quick


def markdown(rows: list[dict]) -> str:
    """Return the tables of Dice and of the differences."""

    def cells(row, what, where, sign=""):
        return [
            f"{row[what][g]:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
            for g, (low, high) in row[where].items()
        ]

    groups = list(rows[0]["dice"])
    header = ("parameters", "steps", "GFLOP a step", "learning rate", "training, s")
    header += ("scan, s",)
    table = [
        [
            row["name"],
            f"{row['parameters']:,}",
            str(row["steps"]),
            f"{row['step_gflop']:.1f}",
            f"{row['learning_rate']:g}",
            "–" if row["train_s"] is None else f"{row['train_s']:.0f}",
            f"{row['scan_s']:.2f}",
            *cells(row, "dice", "interval"),
        ]
        for row in rows
    ]
    text = markdown_table(["network", *header, *groups], table)
    table = [
        [
            f"{row['name']} – {rows[0]['name']}",
            *cells(row, "difference", "difference_interval", "+"),
            f"{p:.2g}",
        ]
        for row, p in zip(rows[1:], holm([r["p"] for r in rows[1:]]), strict=True)
    ]
    header = ["difference", *groups, "p"]
    return text + "\n" + markdown_table(header, table) * bool(table)


def main(options):
    startup.start()
    if options.quick:
        set_quick(options, models=MODELS)
    rows = list(study(options.models, options))
    print(markdown(rows))
    save_rows(rows)


if __name__ == "__main__":
    names = ", ".join(small_networks.MODELS)
    flags.DEFINE_list("models", ["swin_unetr", "swin_smt"], f"of {names}")
    define_flags(workdir="runs/compare")
    run(main, quick="two tiny networks, two steps")
