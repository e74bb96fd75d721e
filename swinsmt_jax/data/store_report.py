"""The content of a store: report.json, report.html, and a few lines of summary."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from swinsmt_jax.class_map import V2
from swinsmt_jax.data import known_bad_cases, label_table, meta, store
from swinsmt_jax.data.store import StoredCase
from swinsmt_jax.data.volume import ras_spacing, spacing_of
from swinsmt_jax.runtime import files, html

SHOWN = 4  # cases drawn
RULES = {"order": "the later class wins", "smaller": "the smaller mask wins"}
CUT = "made before grids covered scans, it ends before its scan; preprocess it again."


def write(root: Path) -> str:
    """Write report.json and report.html into a store; return a summary.

    Raises:
        UserError: for a store that cannot be read or written.
    """
    rows, index = meta.read(root), store.read_json(root / store.INDEX)
    cases = [
        StoredCase(name, split, root / name)
        for name, split in rows.items()
        if (root / name / store.CASE).is_file() and name not in index["failed"]
    ]
    report = _collect(root, cases, index)
    files.write_json(root / "report.json", report)
    files.write_text(root / "report.html", _page(report, cases))
    return f"{_summary(report)}\n{root / 'report.html'}"


def _summary(report):
    count, run = sum(report["cases"].values()), report["run"]
    size = report["bytes"] / 1e6
    speed = 60 * run["cases"] / max(run["seconds"], 1e-3)
    claimed, rule = report["overlapping_voxels"], RULES[report["overlaps_rule"]]
    cut, lost = len(report["ends_before_scan"]), len(report["lost"])
    return (
        f"{count} cases ({_splits(report)}), {size:.1f} MB, "
        f"{size / max(1, count):.2f} MB a case, "
        f"{report['bytes_per_voxel']:.2f} bytes a voxel; "
        f"{len(report['failed'])} failed, {len(report['excluded'])} excluded; "
        f"{run['cases']} written now, {speed:.1f} cases/minute"
        + (f"; {cut} end before their scan" if cut else "")
        + (f"; {lost} lack classes that their files have" if lost else "")
        + (f"; {claimed:,} voxels claimed by several masks, {rule}" if claimed else "")
    )


def _collect(root, cases, index):
    facts = [case.facts for case in cases]
    names = store.read_options(root).classes.names
    ids = list(range(len(names)))
    known = [number for f in facts for number in f.get("annotated", ids)]
    partial = any("annotated" in f for f in facts)
    counts = np.array([f["counts"] for f in facts], int).reshape(-1, len(names))
    size = sum(f.stat().st_size for case in cases for f in case.folder.rglob("*"))
    voxels = sum(int(np.prod(f["shape"])) for f in facts)
    splits = [case.split for case in cases]

    def each(value):  # of every case that has one
        found = {case.name: value(f) for case, f in zip(cases, facts, strict=True)}
        return {name: own for name, own in found.items() if own}

    def spacing(f):
        return [round(x, 4) for x in ras_spacing(f["source_affine"])]

    return {
        "cases": {s: splits.count(s) for s in meta.SPLITS},
        "failed": index.get("failed", {}),
        "excluded": index.get("excluded", []),
        "run": index.get("run", {"cases": 0, "seconds": 0.0}),
        "bytes": size,
        "bytes_per_voxel": size / max(1, voxels),
        "shapes": each(lambda f: f["shape"]),
        "source_spacings": each(spacing),
        "overlaps_rule": store.read_options(root).overlaps,
        "overlapping_voxels": sum(f["overlapping_voxels"] for f in facts),
        "overlaps": each(lambda f: f["overlapping_voxels"]),
        "notes": each(lambda f: f.get("notes")),
        "lost": each(lambda f: f.get("lost")),
        "ends_before_scan": [case.name for case in cases if case.lacks_end],
        "classes": {
            name: {
                "voxels": int(own.sum()),
                "cases": int((own > 0).sum()),
                **({"annotated_in": known.count(number)} if partial else {}),
            }
            for number, name, own in list(zip(ids, names, counts.T, strict=True))[1:]
        },
    }


def _page(report, cases):
    shown = cases[:: max(1, len(cases) // SHOWN)][:SHOWN]
    notes = {name: " ".join(found) for name, found in report["notes"].items()}
    for name in report["ends_before_scan"]:
        notes[name] = f"{notes.get(name, '')} {CUT}".strip()
    return html.render(
        "store.html",
        title="Preprocessed cases",
        report=report,
        splits=_splits(report),
        excluded={
            name: known_bad_cases.reasons().get(name, "--exclude")
            if len(report["classes"]) == len(V2.names) - 1
            else "--exclude"
            for name in report["excluded"]
        },
        rule=RULES[report["overlaps_rule"]],
        notes=notes,
        lost={
            n: ", ".join(f"{name} ({count:,} voxels)" for name, count in own.items())
            for n, own in report["lost"].items()
        },
        overlaps={n: f"{count:,} voxels" for n, count in report["overlaps"].items()},
        histograms=html.png(_histograms(report), dpi=90),
        pictures=[(case, html.png(_slices(case), dpi=90)) for case in shown],
    )


def _splits(report):
    return ", ".join(f"{n} {split}" for split, n in report["cases"].items())


def _histograms(report):
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    spacing, shape = figure.subplots(1, 2)
    for axis, values, name in (
        (spacing, report["source_spacings"], "spacing of the source, mm"),
        (shape, report["shapes"], "voxels along an axis of the store"),
    ):
        table = np.array(list(values.values())).reshape(-1, 3)
        axis.hist(list(table.T), bins=20, label=["right", "front", "head"])
        axis.set(xlabel=name, ylabel="cases")
    spacing.legend(frameon=False)
    return figure


def _slices(case):
    """Draw the middle coronal and axial planes with their labels."""
    sample = case.read()
    figure = Figure(figsize=(9, 4), layout="constrained")
    palette = np.array([label_table.colour(i) for i in range(256)])
    axes = figure.subplots(1, 4)
    for i, axis in enumerate((1, 2)):
        middle = sample.image.shape[axis] // 2
        ct, label = (
            a.take(middle, axis)[::-1, ::-1].T for a in (sample.image, sample.label)
        )
        sides = np.delete(spacing_of(case.affine), axis)
        grey = np.clip((ct[..., None] + 160.0) / 400, 0, 1).repeat(3, -1)
        coloured = np.where(
            label[..., None] > 0, 0.5 * grey + 0.5 * palette[label], grey
        )
        for panel, picture in zip(axes[2 * i :], (grey, coloured), strict=False):
            panel.imshow(picture, aspect=sides[1] / sides[0], interpolation="nearest")
            panel.axis("off")
    return figure
