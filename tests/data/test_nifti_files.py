"""NIfTI files of nibabel's own tests, and files that claim too much or change."""

import gzip
from pathlib import Path

import nibabel as nib
import nibabel.tests
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.data import nifti, nifti_file
from swinsmt_jax.runtime import host_memory

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


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr"])
@pytest.mark.parametrize("size", [2**31 - 16, 2**25])
def test_an_extension_gets_no_memory_for_what_it_claims(tmp_path, name, size):
    kind = nib.Nifti1Image if ".nii" in name else nib.Nifti1Pair
    image = kind(np.zeros((3, 4, 5), np.int16), np.eye(4))
    extension = nib.nifti1.Nifti1Extension(6, b"a comment")
    image.header.extensions.append(extension)
    nib.save(image, tmp_path / name)
    assert nifti.load_ct(tmp_path / name).array.shape == (3, 4, 5)
    open_ = gzip.open if name.endswith("gz") else open
    with open_(tmp_path / name, "rb") as file:
        content = file.read()
    at = content.index(b"a comment") - 8
    with open_(tmp_path / name, "wb") as file:
        file.write(content[:at] + size.to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(UserError, match="its header claims more than 16777216 bytes"):
        nifti.load_ct(tmp_path / name)


def test_voxels_are_read_and_not_mapped(tmp_path, rng):
    """So that a file that is cut short while it is used does not end the process."""
    hu = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / "a.nii")
    volume = nifti.load_ct(tmp_path / "a.nii")
    (tmp_path / "a.nii").write_bytes(b"")
    np.testing.assert_array_equal(volume.array, hu)
    base = volume.array
    while base is not None:
        assert not isinstance(base, np.memmap)
        base = getattr(base, "base", None)


def test_a_scan_beyond_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9)), np.eye(4)), tmp_path / "a.nii.gz")
    monkeypatch.setattr(host_memory, "available", lambda: 8000)
    monkeypatch.setattr(nifti_file, "voxels", None)  # nobody asks for them
    with pytest.raises(UserError, match="a.nii.gz needs at least .* of memory, but"):
        nifti.load_ct(tmp_path / "a.nii.gz")


def test_the_memory_is_that_of_the_host_or_its_container(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(host_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    assert host_memory.available() is None
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    assert host_memory.available() == 512_000
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\ninactive_file 100000\n")
    for limit, free in (("max", 512_000), ("400000", 200_000), ("9999999", 512_000)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert host_memory.available() == free
