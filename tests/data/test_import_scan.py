import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks
from swinsmt_jax.data import dicom, import_scan, nifti
from swinsmt_jax.data.case import load_case
from swinsmt_jax.data.layouts import totalsegmentator

ROOT = Path(__file__).parents[2]


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


IMPORT = """
import sys
from swinsmt_jax.data.import_scan import import_scan
ct, labels, root, name = sys.argv[1:]
for i in range(4):
    import_scan(ct, labels, root=root, case=f"{name}{i}", splits=["train"])
"""


def test_several_processes_import_into_one_dataset(tmp_path, root):
    files = [root / "s0002" / f"{name}.nii.gz" for name in ("ct", "segmentations")]
    command = [sys.executable, "-c", IMPORT, *files, tmp_path / "mine"]
    running = [subprocess.Popen([*command, name], cwd=ROOT) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    names = {f"{name}{i}" for name in "abc" for i in range(4)}
    cases = totalsegmentator.find_cases(tmp_path / "mine", split="train")
    assert {case.name for case in cases} == names
    assert {p.name for p in (tmp_path / "mine").iterdir()} == names | {"meta.csv"}


def test_a_kill_leaves_the_scan_that_was_there(tmp_path, root, monkeypatch):
    files = [root / "s0002" / f"{name}.nii.gz" for name in ("ct", "segmentations")]
    mine = tmp_path / "mine"
    for case in ("s1", "s2"):
        import_scan.import_scan(*files, root=mine, case=case, splits=["train"])
    before = {f: f.read_bytes() for f in mine.rglob("*.*") if f.is_file()}

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_scan.nifti, "save_labels", killed)
    with pytest.raises(KeyboardInterrupt):
        import_scan.import_scan(*files, root=mine, case="s1", splits=["val"])
    assert {f: f.read_bytes() for f in mine.rglob("*.*") if f.is_file()} == before


def test_series_of_a_folder_are_imported_with_their_labels(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    source = Path(pydicom.__file__).parent / "data/test_files/CT_small.dcm"
    for i in (1, 2):
        part = pydicom.dcmread(source)
        part.SeriesInstanceUID, part.SOPInstanceUID = f"1.9.{i}", f"1.9.{i}.1"
        (tmp_path / f"study/{i}").mkdir(parents=True)
        part.save_as(tmp_path / f"study/{i}/IM1")
    study, labels = tmp_path / "study", tmp_path / "labels"
    labels.mkdir()
    scans = dicom.chosen_series(study, "all")
    for i, (uid, scan) in enumerate(scans.items(), start=1):
        volume = dicom.load_series(scan)
        array = np.full(volume.array.shape, i, np.uint8)
        nifti.save_labels(labels / f"{uid}.nii.gz", array, like=volume)
    options = {"root": tmp_path / "mine", "case": "s", "splits": ["train"]}
    names = import_scan.import_scan(study, labels, **options, series="all")
    assert names == ("s_1", "s_2")
    cases = totalsegmentator.find_cases(tmp_path / "mine", split="train")
    assert [int(load_case(case).label.max()) for case in cases] == [1, 2]
    file = labels / "1.9.2.nii.gz"
    options["case"] = "t"
    assert import_scan.import_scan(study, file, **options, series="1.9.2") == ("t",)
    options["case"] = "u"
    assert import_scan.import_scan(study / "2", file, **options) == ("u",)
    with pytest.raises(checks.UserError, match="labels of none of the 2 series"):
        import_scan.import_scan(study, tmp_path, **options, series="all")
