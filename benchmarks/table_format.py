"""The rows of `benchmarks.table` as Markdown and as a picture, beside the paper's."""

from matplotlib.figure import Figure

GROUPS = ("organs", "vertebrae", "muscles", "ribs", "vessels", "overall")
# What is known here of the paper's table: millions of parameters, seconds for a scan,
# Dice in per cent. Swin UNETR's parameters are not known to be the paper's.
PAPER = {
    "unetr": {"parameters_m": 102.02},
    "ux_net": {"parameters_m": 53.00},
    "nnformer": {"parameters_m": 149.30},
    "swin_smt_paper": {
        "parameters_m": 170.78,
        "seconds": 60,
        "dice": dict(
            zip(GROUPS, (83.70, 83.03, 88.70, 86.60, 77.54, 85.09), strict=True)
        ),
    },
}


MARKERS = "os^DvPX"


def markdown(rows, titles, *, device):
    """Return the table measured here and, apart from it, the paper's."""
    return f"{ours(rows, titles, device=device)}\n{paper(titles)}"


def ours(rows, titles, *, device):
    """Return the table of what was measured."""
    sides = {row["side"] for row in rows} - {0}
    timed = {row["timed_side"] for row in rows} - {0}
    header = (
        "network",
        "parameters",
        "GFLOP",
        f"forward, GB{_at(sides)}",
        f"gradient, GB{_at(sides)}",
        f"forward, patches/s{_at(timed)}",
        f"gradient, patches/s{_at(timed)}",
    )
    lines = [
        (
            titles.get(row["name"], row["name"]),
            f"{row['parameters']:,}",
            f"{row['forward_gflop']:,.0f}",
            _number(row.get("forward_gb"), 2),
            _number(row.get("gradient_gb"), 2),
            _number(row.get("forward_patches_per_s"), 3),
            _number(row.get("gradient_patches_per_s"), 3),
        )
        for row in rows
    ]
    about = f"Measured here, on {device}. GFLOP of a forward pass at 128^3."
    return f"{about}\n\n{_table(header, lines)}"


def paper(titles):
    """Return the table of what the paper reports."""
    header = ("network", "parameters, millions", "seconds", *(f"{g}" for g in GROUPS))
    lines = [
        (
            titles[name],
            f"{row['parameters_m']:.2f}",
            _number(row.get("seconds"), 0),
            *(_number(row.get("dice", {}).get(group), 2) for group in GROUPS),
        )
        for name, row in PAPER.items()
    ]
    about = "Reported by the paper, on TotalSegmentator-V2: Dice in per cent."
    return f"{about}\n\n{_table(header, lines)}"


def plot(rows, titles, path, *, trained=()):
    """Draw operations and memory against parameters; and Dice, where it was measured.

    Args:
        rows: of `benchmarks.table`.
        titles: of the networks, by name.
        path: of the picture.
        trained: rows of `benchmarks.compare`: small networks trained on phantoms.
    """
    figure = Figure(figsize=(11, 4 * (2 if trained else 1)), layout="constrained")
    axes = figure.subplots(2 if trained else 1, 2, squeeze=False)
    for axis, key, label in zip(
        axes[0],
        ("forward_gflop", "gradient_gb"),
        ("forward at 128³, GFLOP", "compiled gradient, GB"),
        strict=True,
    ):
        for i, row in enumerate(rows):
            if row.get(key) is not None:
                style = {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}"}
                title = titles.get(row["name"], row["name"])
                axis.plot(
                    row["parameters"] / 1e6, row[key], ls="", label=title, **style
                )
        axis.set(xlabel="parameters, millions", ylabel=label, title="full size")
    axes[0][1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis, key, unit, label in zip(
        axes[-1] if trained else (),
        ("parameters", "scan_s"),
        (1e6, 1),
        ("parameters, millions", "seconds for a phantom"),
        strict=False,
    ):
        for row in trained:
            mean, (low, high) = row["dice"]["overall"], row["interval"]["overall"]
            error = [[mean - low], [high - mean]]
            point = {"fmt": "o", "capsize": 3, "label": row["name"]}
            axis.errorbar(row[key] / unit, mean, error, **point)
        axis.set(xlabel=label, ylabel="Dice, %", title="small forms, on phantoms")
        axis.legend(frameon=False, loc="lower left")
    for axis in figure.axes:
        axis.set_xlim(0, 1.05 * axis.get_xlim()[1])
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    figure.savefig(path, dpi=110)


def _at(sides):
    return f" at {next(iter(sides))}^3" if len(sides) == 1 else ""


def _number(value, digits):
    return "–" if value is None else f"{value:,.{digits}f}"


def _table(header, lines):
    rule = ("---", *("---:",) * (len(header) - 1))
    rows = (header, rule, *lines)
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
