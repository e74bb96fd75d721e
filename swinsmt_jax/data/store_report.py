"""What is in a store: report.json, report.html, and a few lines for the terminal."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from swinsmt_jax.data import label_table, meta, nifti, store
from swinsmt_jax.data.store import StoredCase
from swinsmt_jax.runtime import files

SHOWN = 4  # cases drawn
STYLE = """body { font: 14px sans-serif; margin: 2em; max-width: 70em }
td, th { text-align: right; padding: 0 .8em } td:first-child { text-align: left }
img { max-width: 100%; margin: .5em 0 }"""


def write(root: Path) -> str:
    """Write report.json and report.html into a store; return a summary.

    Raises:
        UserError: for a store that cannot be read, or written.
    """
    rows = meta.read(root)
    cases = [
        StoredCase(name, split, root / name)
        for name, split in rows.items()
        if (root / name / store.CASE).is_file()
    ]
    report = _collect(root, cases, store.read_json(root / store.INDEX))
    files.write_json(root / "report.json", report)
    files.write_text(root / "report.html", _page(report, cases))
    return f"{_summary(report)}\n{root / 'report.html'}"


def _summary(report):
    count, run, size = (
        sum(report["cases"].values()),
        report["run"],
        report["bytes"] / 1e6,
    )
    splits = ", ".join(f"{n} {split}" for split, n in report["cases"].items())
    speed = 60 * run["cases"] / max(run["seconds"], 1e-3)
    return (
        f"{count} cases ({splits}), {size:.1f} MB, "
        f"{size / max(1, count):.2f} MB a case, "
        f"{report['bytes_per_voxel']:.2f} bytes a voxel; "
        f"{len(report['failed'])} failed, {len(report['excluded'])} excluded; "
        f"{run['cases']} written now, {speed:.1f} cases/minute"
    )


def _collect(root, cases, index):
    facts = [case.facts for case in cases]
    names = store.read_options(root).classes.names
    counts = np.array([f["counts"] for f in facts], int).reshape(-1, len(names))
    size = sum(f.stat().st_size for case in cases for f in case.folder.rglob("*"))
    voxels = sum(int(np.prod(f["shape"])) for f in facts)
    splits = [case.split for case in cases]
    per_case = {case.name: f for case, f in zip(cases, facts, strict=True)}
    return {
        "cases": {s: splits.count(s) for s in meta.SPLITS},
        "failed": index.get("failed", {}),
        "excluded": index.get("excluded", []),
        "run": index.get("run", {"cases": 0, "seconds": 0.0}),
        "bytes": size,
        "bytes_per_voxel": size / max(1, voxels),
        "shapes": {name: f["shape"] for name, f in per_case.items()},
        "source_spacings": {
            name: [round(x, 4) for x in nifti.ras_spacing(f["source_affine"])]
            for name, f in per_case.items()
        },
        "overlapping_voxels": sum(f["overlapping_voxels"] for f in facts),
        "overlaps": {
            name: f["overlapping_voxels"]
            for name, f in per_case.items()
            if f["overlapping_voxels"]
        },
        "notes": {name: f["notes"] for name, f in per_case.items() if f.get("notes")},
        "classes": {
            name: {
                "voxels": int(counts[:, i].sum()),
                "cases": int((counts[:, i] > 0).sum()),
            }
            for i, name in enumerate(names)
            if i
        },
    }


def _page(report, cases):
    text = html.escape
    rows = "".join(
        f"<tr><td>{text(name)}<td>{c['cases']}<td>{c['voxels']:,}</tr>"
        for name, c in report["classes"].items()
    )
    overlaps = {n: f"{count:,} voxels" for n, count in report["overlaps"].items()}
    notes = {name: " ".join(found) for name, found in report["notes"].items()}
    splits = ", ".join(f"{n} {split}" for split, n in report["cases"].items())
    shown = cases[:: max(1, len(cases) // SHOWN)][:SHOWN]
    pictures = "".join(
        f"<h3>{text(case.name)} ({case.split})</h3>{_image(_slices(case))}"
        for case in shown
    )
    return f"""<!doctype html><meta charset="utf-8"><title>Store</title>
<style>{STYLE}</style><h1>Preprocessed cases</h1>
<p>{splits}; {report["bytes"] / 1e6:,.1f} MB; {len(report["failed"])} failed;
{report["overlapping_voxels"]:,} claims of masks to voxels of another mask.</p>
<h2>Failed</h2>{_list(report["failed"])}
<h2>Excluded by the user</h2>{_list(dict.fromkeys(report["excluded"], "--exclude"))}
<h2>To check</h2>{_list(notes)}
<h2>Claims of masks to voxels of another mask</h2>{_list(overlaps)}
<h2>Spacing and shape</h2>{_image(_histograms(report))}
<h2>Middle planes</h2>{pictures}
<h2>Classes</h2><table><tr><th>class<th>cases<th>voxels</tr>{rows}</table>"""


def _list(entries):
    found = (
        f"<li><b>{html.escape(name)}</b>: {html.escape(what)}</li>"
        for name, what in entries.items()
    )
    return f"<ul>{''.join(found) or '<li>none</li>'}</ul>"


def _image(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="">'


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
        sides = [s for a, s in enumerate(_spacing(case)) if a != axis]
        grey = np.clip((ct[..., None] + 160.0) / 400, 0, 1).repeat(3, -1)
        coloured = np.where(
            label[..., None] > 0, 0.5 * grey + 0.5 * palette[label], grey
        )
        for panel, picture in zip(axes[2 * i :], (grey, coloured), strict=False):
            panel.imshow(picture, aspect=sides[1] / sides[0], interpolation="nearest")
            panel.axis("off")
    return figure


def _spacing(case):
    return np.linalg.norm(case.affine[:3, :3], axis=0)
