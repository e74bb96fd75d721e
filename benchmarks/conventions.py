"""Compare what tools of this field compute from the same masks, volumes and windows.

    python -m benchmarks.conventions [--quick] [--docs=docs/numbers.md] [--json=FILE]

Prints three tables: metrics of six pairs of masks, one volume through many resamplers,
and windows. Tools that are not installed are left out; with --quick, so is everything
but this package. --docs writes the tables into a page, each between two marks.
"""

import logging
import re
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import define_file, grids, markdown_table, masks, run, save
from swinsmt_jax import checks
from swinsmt_jax.evaluation import conventions, metrics, overlap

COLUMNS = {  # heading: (pair, metric)
    "slab, HD95": ("slab", "hd95"),
    "missed, HD95": ("missed", "hd95"),
    "full, HD95": ("full", "hd95"),
    "plate, ASSD": ("plate", "assd"),
    "line, surface Dice": ("line", "surface_dice"),
    "both empty, Dice": ("both empty", "dice"),
}
LINE = 0.9  # mm, the tolerance of surface Dice
TOOLS = {  # of `masks`: title and package
    "monai": ("MONAI", "monai"),
    "nnunet": ("nnU-Net", "nnunetv2"),
    "totalseg": ("TotalSegmentator's script, surface-distance", "surface-distance"),
    "surface-distance": ("surface-distance", "surface-distance"),
    "medpy": ("MedPy", "medpy"),
    "panoptica": ("panoptica", "panoptica"),
    "seg-metrics": ("seg-metrics", "seg-metrics"),
    "SimpleITK": ("SimpleITK", "SimpleITK"),
    "torchmetrics": ("torchmetrics", "torchmetrics"),
}


def version(package: str) -> str | None:
    """Return a package's version; "" for this one, None if it is not installed."""
    try:
        return package and metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def by_protocol(protocol: str | None):
    """Return what measures a pair of masks here, as `masks.TOOLS` do."""

    def measure(prediction, truth, *, spacing, tolerance):
        name = protocol or ""
        if conventions.convention(name).tolerance:
            tolerance = None  # the tool's own
        rule = conventions.surface_rule(name, tolerance=tolerance)
        pair = [x.astype(np.uint8) for x in (prediction, truth)]
        counts = overlap.overlap_counts(*pair, num_classes=2)
        found = metrics.measured(
            overlap.Pair(*pair, counts, spacing),
            metrics.chosen_metrics(surface_rule=rule, protocol=name),
            surface_rule=rule,
        )
        return {name: scores[1] for name, scores in found.items()}

    return measure


def mask_row(measure) -> list[str]:
    """Return the cells of `COLUMNS`, empty for what a tool does not have."""
    cells, pairs = [], masks.known_pairs()
    for pair, name in COLUMNS.values():
        found = measure(*pairs[pair], spacing=(1.0, 1.0, 1.0), tolerance=LINE)
        cells.append(_cell(found[name]) if name in found else "")
    return cells


def _cell(value):
    if value is None:
        return "refused"
    return f"{value:.4g}".replace("nan", "none")


def mask_rows(own_only: bool) -> list[list[str]]:
    """Return rows of this package and of all tools that are installed."""
    rows = [["swinsmt_jax", *mask_row(by_protocol(None))]]
    tools = {} if own_only else {**masks.TOOLS, **masks.OTHERS}
    for name, tool in tools.items():
        title, package = TOOLS[name]
        if (found := version(package)) is not None:
            rows.append([f"{title} {found}", *mask_row(tool)])
    return rows


def tables(*, own_only: bool) -> dict[str, str]:
    """Return the tables by name, in Markdown."""
    grid_rows = [
        [f"{title} {version(package)}".strip(), *grids.row(resampler)]
        for title, (resampler, package) in grids.RESAMPLERS.items()
        if version(package) is not None and not (own_only and package)
    ]
    windows = {
        f"{title} {version(package)}".strip(): function
        for title, (function, package) in grids.WINDOWS.items()
        if version(package) is not None and not (own_only and package)
    }
    window_rows = [
        [", ".join(map(str, case)), *(grids.starts(f, case) for f in windows.values())]
        for case in grids.CASES
    ]
    grid_header = ["", "length", "first, last value", "off its affine", "label slices"]
    return {
        "masks": markdown_table(["", *COLUMNS], mask_rows(own_only)),
        "resamplers": markdown_table(grid_header, grid_rows),
        "windows": markdown_table(["image, patch, overlap", *windows], window_rows),
    }


def write(path: Path, found: dict[str, str]) -> None:
    """Replace the tables of a page."""
    text = path.read_text()
    for name, table in found.items():
        marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marks.subn(lambda m, t=table: m[1] + t + m[2], text)
        checks.require(count == 1, f"{path} has {count} places for {name!r}, not one.")
    path.write_text(text)


def main(options):
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tables(own_only=options.quick)
    for name, table in found.items():
        print(f"\n{name}\n\n{table}")
    if options.docs:
        write(Path(options.docs), found)
    save({}, tables=found)


if __name__ == "__main__":
    define_file("docs", "page whose tables are replaced", flag_values=flags.FLAGS)
    run(main, quick="this package alone, a few seconds")
