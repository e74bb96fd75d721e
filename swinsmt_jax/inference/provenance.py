"""The origin of a result: scan, network, step and options, recorded beside it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.data.dicom_files import dicom_files, is_dicom

if TYPE_CHECKING:
    from swinsmt_jax.inference.outputs import Targets

KEY = "made_by"  # of a scan in the summary: {name of labels: what made them}


def digest_of_scan(path: Path) -> str:
    """Return a hash of a file, or of the files of a DICOM series; "" if unreadable."""
    files = dicom_files(path) if is_dicom(path) else [path]
    try:
        parts = []
        for file in files:
            with file.open("rb") as stream:
                parts.append(hashlib.file_digest(stream, "sha256").hexdigest())
    except OSError:
        return ""
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:16]


def digest_of_network(parameters: object) -> str:
    """Return a hash of the parameters, a pytree of arrays."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()[:16]


def require_same(
    targets: "Targets",
    scans: Mapping[str, Path],
    made_by: Mapping[str, object],
    record: Mapping[str, Mapping],
) -> None:
    """Raise `UserError` if existing labels belong to other scans or options.

    Labels of other scans from another network are refused too.

    Args:
        targets: what would be written; existing labels would be kept.
        scans: the inputs.
        made_by: identifies the segmenter.
        record: of earlier calls, with what made each scan's labels under `KEY`.
    """
    for name, entry in record.items():
        for labels, before in entry.get(KEY, {}).items() if name not in scans else ():
            wanted, found = made_by.get("network"), before.get("network")
            checks.require(
                found == wanted or not Path(entry.get("labels", "")).exists(),
                f"{labels} beside the results was made by another network ({found} of "
                f"{entry.get('run')}, not {wanted}); choose another --output, or give "
                "--overwrite.",
            )
    for name, file in scans.items():
        labels = targets[name]["labels"]
        if not labels.exists():
            continue
        entry = record.get(name, {})
        before = entry.get(KEY, {}).get(labels.name)
        checks.require(
            before is not None,
            f"{labels} exists, and no summary.json says what made it; give "
            "--overwrite or another --output.",
        )
        now = {"scan": digest_of_scan(file), **made_by}
        other = [
            f"{key} ({before.get(key)}, not {now.get(key)})"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        checks.require(
            not other,
            f"{labels} exists, made of {entry.get('file')}; for {file} these differ: "
            f"{', '.join(other)}. Give --overwrite or another --output.",
        )
