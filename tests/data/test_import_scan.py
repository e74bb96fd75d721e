import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks
from swinsmt_jax.data import import_scan
from swinsmt_jax.data.case import load_case
from swinsmt_jax.data.layouts import totalsegmentator


def test_imported_scan_is_found_and_equal(tmp_path, root, volumes):
    mine = tmp_path / "mine"
    arguments = [
        f"--ct={root / 's0002/ct.nii.gz'}",
        f"--labels={root / 's0002/segmentations.nii.gz'}",
        f"--root={mine}",
        "--case=s0007",
    ]
    for _ in range(2):  # a second time replaces the case
        with pytest.raises(SystemExit, match="0"):
            import_scan.main([*arguments, "--split=train,test"])
    for split in ("train", "test"):
        (case,) = totalsegmentator.find_cases(mine, split=split)
        assert case.name == f"s0007_{split}"
        sample = load_case(case)
        np.testing.assert_array_equal(sample.image, volumes[0])
        np.testing.assert_array_equal(sample.label, volumes[1])
    with pytest.raises(SystemExit, match="0"):
        import_scan.main([*arguments, "--split=val"])
    (case,) = totalsegmentator.find_cases(mine, split="val")
    assert case.name == "s0007"


def test_scan_keeps_its_orientation(tmp_path, root):
    image = nib.load(root / "s0002/ct.nii.gz")
    lps = image.as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
    nib.save(nib.Nifti1Image(np.asarray(lps.dataobj), lps.affine), tmp_path / "c.nii")
    import_scan.import_scan(
        tmp_path / "c.nii",
        root / "s0002/segmentations.nii.gz",
        root=tmp_path / "mine",
        case="s0001",
        splits=["train"],
    )
    for name in ("ct", "segmentations"):
        written = nib.load(tmp_path / f"mine/s0001/{name}.nii.gz")
        assert nib.aff2axcodes(written.affine) == ("L", "P", "S")


@pytest.mark.parametrize(
    ("case", "split", "words"),
    [("../x", "train", "plain name"), ("s1", "all", "'all'"), ("s1", "", "''")],
)
def test_bad_arguments_are_refused_before_writing(tmp_path, root, case, split, words):
    with pytest.raises(checks.UserError, match=words):
        import_scan.import_scan(
            root / "s0002/ct.nii.gz",
            root / "s0002/segmentations.nii.gz",
            root=tmp_path / "mine",
            case=case,
            splits=split.split(","),
        )
    assert not (tmp_path / "mine").exists()


def test_real_scan_enters_the_layout(tmp_path, shared):
    folder = shared / "data/totalsegmentator_example"
    import_scan.import_scan(
        folder / "example_ct.nii.gz",
        folder / "example_seg.nii.gz",
        root=tmp_path,
        case="s0001",
        splits=["train"],
    )
    (case,) = totalsegmentator.find_cases(tmp_path, split="train")
    sample = load_case(case)
    assert sample.image.shape == sample.label.shape == (122, 101, 112)
    liver = sample.image[sample.label == 5]
    assert 20 < liver.mean() < 80
