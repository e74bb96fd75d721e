"""The rows of `benchmarks.model` as text and as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

LEGEND = {"torch": "PyTorch", "jax": "ours"}


def label(row: dict) -> str:
    """Name what a row measures."""
    remat = "" if row.get("remat", True) else " no remat"
    return f"{row['network']} {row['side']}³ {row['what']} {row['dtype']}{remat}"


def line(row: dict) -> str:
    """One line of the table."""
    cells = [f"{label(row):44}"]
    for name in ("jax", "torch", "torch.compile"):
        if name in row:
            cells.append(_cell(row[name]))
    if "time_ratio" in row:
        cells.append(f"x{row['time_ratio']:5.2f}  x{row['memory_ratio']:5.2f}")
    return "  ".join(cells)


def _cell(found):
    if "error" in found:
        return f"{found['error'][:20]:>20}"
    return f"{found['seconds']:9.2f} s {found['peak_gb']:6.2f} GB"


def plot(rows: list[dict], path: str | Path) -> None:
    """Draw times and memory side by side."""
    rows = sorted(
        (row for row in rows if "time_ratio" in row),
        key=lambda row: [row[name] for name in ("network", "what", "side")],
    )
    names = [label(row) for row in rows]
    figure = Figure(figsize=(11, 0.5 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    units = {"seconds": "seconds", "peak_gb": "peak memory, GB"}
    for panel, (value, unit) in zip(panels, units.items(), strict=True):
        for shift, name in enumerate(("torch", "jax")):
            heights = [row[name][value] for row in rows]
            places = [i + 0.4 * shift - 0.2 for i in range(len(rows))]
            panel.barh(places, heights, height=0.38, label=LEGEND[name])
        panel.set_xlabel(unit)
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    panels[1].legend()
    figure.savefig(path, dpi=110)
