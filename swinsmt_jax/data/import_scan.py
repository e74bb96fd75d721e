"""Put one CT and its multi-label segmentation into the TotalSegmentator-V2 layout.

    python -m swinsmt_jax.data.import_scan --ct=scan.nii.gz --labels=labels.nii.gz \
        --root=data/mine --case=s0001 --split=train

With several splits (`--split=train,val,test`) the scan enters each one, as cases
s0001_train, s0001_val and s0001_test. This shows whether a model can fit one scan; it
never measures a model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from swinsmt_jax import checks
from swinsmt_jax.data import dicom, meta, nifti
from swinsmt_jax.data.dicom_files import is_dicom
from swinsmt_jax.runtime import files

LOCK = ".lock"  # held while the dataset is changed


def import_scan(
    ct: str | Path,
    labels: str | Path,
    *,
    root: str | Path,
    case: str,
    splits: Sequence[str],
    series: str = "",
) -> tuple[str, ...]:
    """Copy a scan into `root` and list it in `meta.csv`; return the new ids.

    An existing case is replaced completely. Several processes may import into one root.
    The scan keeps its orientation; its HU are rounded to int16.

    Args:
        ct: a NIfTI file, or a folder with a DICOM series.
        labels: on its grid; with `series="all"` a folder with <UID>.nii.gz, as written
            by `predict.py --series=all`; series without labels are left out.
        root: of the dataset.
        case: id; with `series="all"` followed by a number, from 1 on.
        splits: for the scan.
        series: UID of a series somewhere in the folder `ct`, or "all".

    Raises:
        UserError: for an unknown split, an id that is not a plain folder name, bad
            files, and labels off the CT's grid.
    """
    root = files.absolute(root)
    checks.require(len(splits) > 0, "--split names no split; take train, val or test.")
    for split in splits:
        checks.one_of("split", split, meta.SPLITS)
    meta.require_id("case", case)
    found = _pairs(files.absolute(ct), files.absolute(labels), series)
    many = len(found) > 1
    return tuple(
        name
        for number, pair in enumerate(found, start=1)
        for name in _import(pair, root, f"{case}_{number}" if many else case, splits)
    )


def _pairs(ct, labels, series):
    """Return (scan, labels) of each scan to import."""
    if not series:
        return [(ct, labels)]
    scans = dicom.chosen_series(ct, series)
    if series != "all":
        return [(scan, labels) for scan in scans.values()]
    found = [(scan, labels / f"{uid}.nii.gz") for uid, scan in scans.items()]
    found = [(scan, file) for scan, file in found if file.is_file()]
    checks.require(
        bool(found),
        f"{labels} holds labels of none of the {len(scans)} series in {ct}; with "
        f"--series=all it is a folder with {next(iter(scans))}.nii.gz and so on.",
    )
    return found


def _import(pair, root, case, splits):
    """Import one scan and its labels; return its ids."""
    ct, labels = pair
    read = dicom.load_series if is_dicom(ct) else nifti.load_ct
    image = read(ct)
    label = nifti.noted(nifti.load_labels(labels, on=image))
    names = [case] if len(splits) == 1 else [f"{case}_{split}" for split in splits]
    root.mkdir(parents=True, exist_ok=True)
    with files.claimed(root / LOCK, wait=True):
        files.remove_partial(root)
        if (root / meta.META).exists():
            meta.read(root)  # refuse before anything is written
        for name in names:
            with files.replacing(root / name) as folder:
                nifti.save(folder / "ct.nii.gz", image.array, like=image)
                target = folder / "segmentations.nii.gz"
                nifti.save_labels(target, label.array, like=image)
        meta.add(root, dict(zip(names, splits, strict=True)))
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Import one scan from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help = "CT, NIfTI or a folder with a DICOM series"
    parser.add_argument("--ct", required=True, help=help)
    help = "of a folder --ct with many series, in folders in it too: a UID, or all"
    parser.add_argument("--series", default="", help=help)
    parser.add_argument("--labels", required=True, help="label ids 0 to 117, NIfTI")
    parser.add_argument("--root", required=True, help="dataset folder, made if absent")
    parser.add_argument("--case", required=True, help="id of the case, such as s0001")
    parser.add_argument("--split", required=True, help="train, val, test; or several")
    a = parser.parse_args(argv)
    try:
        names = import_scan(
            *(a.ct, a.labels),
            **{"root": a.root, "case": a.case, "series": a.series},
            splits=a.split.split(","),
        )
    except checks.UserError as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:
        parser.exit(2, f"error: {a.root} cannot be written: {error}\n")
    parser.exit(0, f"wrote {', '.join(names)} to {a.root}\n")


if __name__ == "__main__":
    main()
