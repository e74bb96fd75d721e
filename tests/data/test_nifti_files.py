"""NIfTI files that nibabel ships for its own tests are read, or refused in a line."""

from pathlib import Path

import nibabel.tests
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.data import nifti

FOLDER = Path(nibabel.tests.__file__).parent / "data"
FILES = sorted(
    file for file in FOLDER.glob("*") if file.name.endswith((".nii", ".nii.gz", ".hdr"))
)


@pytest.mark.slow
def test_nibabels_own_files_are_read_or_refused():
    shapes = {}
    for file in FILES:
        try:
            shapes[file.name] = nifti.load_ct(file).array.shape
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and file.name in str(error)
    assert shapes["anatomical.nii"] == (33, 41, 25)
    assert shapes["standard.nii.gz"] == (4, 5, 7)
    assert not set(shapes) & {"functional.nii", "example4d.nii.gz", "nifti1.hdr"}
