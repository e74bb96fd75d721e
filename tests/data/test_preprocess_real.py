"""The real CT through the whole path: import, preprocess, store."""

import numpy as np
import pytest

from swinsmt_jax.data import import_scan, nifti, preprocess, resampling, store

SPACING = 1.5


@pytest.fixture
def imported(shared, tmp_path):
    folder = shared / "data/totalsegmentator_example"
    ct, labels = folder / "example_ct.nii.gz", folder / "example_seg.nii.gz"
    root = tmp_path / "source"
    import_scan.import_scan(ct, labels, root=root, case="s1", splits=["train"])
    return root, nifti.load_labels(labels)


def stored(source, root, **options):
    assert preprocess.preprocess(source, root, **options) == {}
    (case,) = store.find_cases(root, split="train")
    return case


def test_no_voxel_of_a_real_scan_changes_its_class(imported, tmp_path):
    source, truth = imported
    case = stored(source, tmp_path / "store")
    np.testing.assert_array_equal(case.read().label, truth.array)
    counts = np.bincount(truth.array.ravel(), minlength=118)
    assert case.facts["counts"] == counts.tolist()


def test_real_structures_return_from_another_spacing(imported, tmp_path):
    source, truth = imported
    case = stored(source, tmp_path / "store", spacing=SPACING)
    assert min(case.shape) > 180
    sample, (spacing, *_) = case.read(), truth.spacing
    back, affine = resampling.resample(
        sample.label, sample.affine, spacing=spacing, order=0
    )
    np.testing.assert_allclose(affine, truth.affine, atol=1e-3)
    counts = np.bincount(truth.array.ravel(), minlength=118)
    large = np.flatnonzero(counts > 1000)[1:]
    assert len(large) > 20
    for number in large:
        ours, theirs = back == number, truth.array == number
        dice = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
        assert dice > 0.95, number
