"""How well each rule of label resampling preserves thin structures.

    python -m benchmarks.label_resampling [--quick] [--json=FILE]

Round vessels and flat plates of several thicknesses, in voxels of 0.75 mm, at random
places and in random directions, are resampled to 1.5 mm. `volume` is that of the result
as a share of the structure's, `kept` the share of the structure's voxels that have the
class in their new voxel or one beside it, `pieces` the number of connected parts.
"""

import itertools

import numpy as np
from absl import flags
from scipy import ndimage

from benchmarks import markdown_table, run, save
from swinsmt_jax.data import resampling

SIDE, FINE, COARSE = 72, 0.75, 1.5  # voxels; mm
THICKNESSES = (1.0, 1.5, 2.0, 3.0, 6.0)  # mm
BESIDE = np.ones((3, 3, 3))


def structure(rng: np.random.Generator, shape: str, thickness: float) -> np.ndarray:
    """Return a line or a plate of this thickness in mm, 40 mm long, as label 1."""
    frame, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    middle = FINE * (SIDE / 2 + rng.uniform(-2, 2, 3))
    grid = FINE * (np.indices((SIDE,) * 3).reshape(3, -1).T + 0.5)
    along, across, up = np.abs((grid - middle) @ frame).T
    if shape == "line":
        inside = (along < 20) & (np.hypot(across, up) < thickness / 2)
    else:
        inside = (along < 20) & (across < 20) & (up < thickness / 2)
    return inside.reshape((SIDE,) * 3).astype(np.uint8)


def measure(label: np.ndarray, rule: str) -> tuple[float, float, int]:
    """Return volume, share kept, and pieces of a structure after a rule."""
    affine = np.diag([FINE] * 3 + [1.0])
    found, _ = resampling.resample(label, affine, spacing=COARSE, order=0, rule=rule)
    volume = found.sum() * COARSE**3 / (label.sum() * FINE**3)
    near = ndimage.binary_dilation(found, BESIDE)
    own = np.floor((np.argwhere(label) + 0.5) * FINE / COARSE).astype(int)
    return volume, near[tuple(own.T)].mean(), ndimage.label(found, BESIDE)[1]


def main(options: flags.FlagValues) -> None:
    """Measure, print the table and write the report."""
    rules, rows, lines = tuple(resampling.LABEL_RULES), [], []
    draws = 2 if options.quick else 12
    for shape, thickness in itertools.product(("line", "plate"), THICKNESSES):
        rng = np.random.default_rng(0)
        labels = [structure(rng, shape, thickness) for _ in range(draws)]
        cells = []
        for rule in rules:
            found = np.mean([measure(label, rule) for label in labels], axis=0).tolist()
            row = dict(zip(("volume", "kept", "pieces"), found, strict=True))
            rows.append({"shape": shape, "mm": thickness, "rule": rule, **row})
            cells.append("{volume:.2f}, {kept:.2f}, {pieces:.1f}".format(**row))
        lines.append((f"{shape} of {thickness:g} mm", *cells))
    print(markdown_table(("", *(f"`{rule}`" for rule in rules)), lines))
    first = {row["rule"]: row["kept"] for row in rows[: len(rules)]}
    save({f"line_of_1_mm_{k}": v for k, v in first.items()}, rows=rows)


if __name__ == "__main__":
    run(main, quick="2 structures of each kind instead of 12")
