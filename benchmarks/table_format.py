"""The rows of `benchmarks.table` as Markdown and a picture, beside the authors'."""

from matplotlib.figure import Figure

from benchmarks import markdown_table
from swinsmt_jax.evaluation import published_results

# The networks that are the same here, by what the authors call them. Their nnU-Net has
# several times the parameters of ours and is another network.
SAME = {
    "UNETR": "unetr",
    "SwinUNETR-S": "swin_unetr_s",
    "SwinUNETR-B": "swin_unetr_b",
    "SwinUNETR-L": "swin_unetr_l",
    "nnFormer": "nnformer",
    "3D UX-Net": "ux_net",
    "3D RepUX-Net": "repux_net",
    "Universal Model": "universal_model",
    "UNesT": "unest",
    "Swin SMT": "swin_smt_paper",
}
MARKERS = "os^DvPX"


def markdown(rows, titles, *, device):
    """Return the table measured here and, apart from it, the authors'."""
    return f"{ours(rows, titles, device=device)}\n{theirs()}"


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
    return f"{about}\n\n{markdown_table(header, lines)}"


def theirs():
    """Return the table that the authors report."""
    header = ("network", "parameters, millions", "seconds", *published_results.GROUPS)
    lines = [
        (
            row["network"],
            f"{row['parameters_m']:.2f}",
            str(row["seconds"]),
            *(f"{row['dice'][group]:.2f}" for group in published_results.GROUPS),
        )
        for row in published_results.ROWS
    ]
    source = f"{published_results.SOURCE}, on TotalSegmentator-V2"
    about = f"Reported by {source}: Dice in per cent."
    return f"{about}\n\n{markdown_table(header, lines)}"


def picture(rows, titles, *, trained=()):
    """Draw operations and memory, and Dice: the authors' and, if given, measured here.

    A network has one marker in all panels of full size.

    Args:
        rows: of `benchmarks.table`.
        titles: of the networks, by name.
        trained: rows of `benchmarks.compare`: small networks trained on phantoms.
    """
    height = 3 if trained else 2
    figure = Figure(figsize=(11, 4 * height), layout="constrained")
    axes = figure.subplots(height, 2, squeeze=False)
    named = {row["name"]: titles.get(row["name"], row["name"]) for row in rows}
    own_names = [
        SAME.get(row["network"], row["network"]) for row in published_results.ROWS
    ]
    order = list(dict.fromkeys([*titles, *named, *own_names]))

    def point(axis, x, y, *, name, title):
        i = order.index(name)
        style = {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}"}
        axis.plot(x, y, ls="", label=title, **style)

    for axis, key, label in zip(
        axes[0],
        ("forward_gflop", "gradient_gb"),
        ("forward at 128³, GFLOP", "compiled gradient, GB"),
        strict=True,
    ):
        for row in rows:
            if row.get(key) is not None:
                name = row["name"]
                x = row["parameters"] / 1e6
                point(axis, x, row[key], name=name, title=named[name])
        axis.set(xlabel="parameters, millions", ylabel=label, title="full size, here")
    for axis, key, label in zip(
        axes[1],
        ("parameters_m", "seconds"),
        ("parameters, millions", "seconds"),
        strict=True,
    ):
        for row, name in zip(published_results.ROWS, own_names, strict=True):
            y = row["dice"]["overall"]
            point(axis, row[key], y, name=name, title=row["network"])
        title = "TotalSegmentator-V2, reported by the authors"
        axis.set(xlabel=label, ylabel="overall Dice, %", title=title)
    for right in axes[:2, 1]:
        right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis, key, unit, label in zip(
        axes[2] if trained else (),
        ("parameters", "scan_s"),
        (1e6, 1),
        ("parameters, millions", "seconds for a phantom"),
        strict=False,
    ):
        for row in trained:
            mean, (low, high) = row["dice"]["overall"], row["interval"]["overall"]
            error = [[mean - low], [high - mean]]
            style = {"fmt": "o", "capsize": 3, "label": row["name"]}
            axis.errorbar(row[key] / unit, mean, error, **style)
        axis.set(xlabel=label, ylabel="Dice, %", title="small forms, on phantoms")
        axis.legend(frameon=False, loc="lower left")
    for axis in figure.axes:
        axis.set_xlim(0, 1.05 * axis.get_xlim()[1])
        if axis not in axes[1]:  # the authors' Dice are near each other
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    return figure


def _at(sides):
    return f" at {next(iter(sides))}^3" if len(sides) == 1 else ""


def _number(value, digits):
    return "–" if value is None else f"{value:,.{digits}f}"
