"""Label ids follow the names that a file's header gives them."""

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import checks, class_map
from swinsmt_jax.data import label_table, nifti

CLASSES = class_map.make(["spleen", "kidney_right", "kidney_left"], {}, where="x")
SHAPE = (4, 5, 6)
# As TotalSegmentator 2.18 writes it.
TABLE = """<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>
<Date><![CDATA[2013-07-14T05:45:09]]></Date> <VolumeInformation Index="0"> <LabelTable>
{}</LabelTable> <StudyMetaDataLinkSet> </StudyMetaDataLinkSet>
<VolumeType><![CDATA[Label]]></VolumeType> </VolumeInformation></CaretExtension>"""
LABEL = '<Label Key="{}" Red="1" Green="0" Blue="0" Alpha="1"><![CDATA[{}]]></Label>\n'


def totalsegmentators(names):
    return TABLE.format("".join(LABEL.format(*entry) for entry in names.items()))


def write(path, *texts, ids=(0, 1, 2, 3), kind=np.uint8):
    array = np.resize(np.array(ids), SHAPE).astype(kind)
    image = nib.Nifti1Image(array, np.eye(4))
    for text in texts:
        image.header.extensions.append(nib.nifti1.Nifti1Extension(0, text.encode()))
    nib.save(image, path)
    return array


@pytest.mark.parametrize("table", [label_table.xml, totalsegmentators])
def test_ids_are_mapped_by_the_names_of_the_header(tmp_path, table):
    path = tmp_path / "labels.nii.gz"
    names = {1: "Kidney left", 2: "spleen", 3: "kidney_right", 40: "not in the file"}
    array = write(path, "a remark", table(names))
    found = nifti.load_labels(path, classes=CLASSES).array
    np.testing.assert_array_equal(found, np.array([0, 3, 1, 2])[array])
    names = {200: "spleen", 7: "kidney_left"}
    array = write(path, table(names), ids=(0, 200, 7), kind=np.int16)
    found = nifti.load_labels(path, classes=CLASSES).array
    np.testing.assert_array_equal(found, np.select([array == 200, array == 7], [1, 3]))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({1: "aorta", 2: "spleen", 3: "spleen"}, "id 1 'aorta' .*has 'spleen' there"),
        ({1: "kidney_left", 2: "spleen"}, "id 3, which its header does not name"),
        ({1: "spleen", 2: "kidneys", 3: "kidney_left"}, "Did you mean 'kidney_"),
    ],
)
def test_names_of_no_class_are_refused_with_both_names(tmp_path, names, words):
    write(tmp_path / "labels.nii", label_table.xml(names))
    with pytest.raises(checks.UserError, match=words):
        nifti.load_labels(tmp_path / "labels.nii", classes=CLASSES)


@pytest.mark.parametrize(
    "texts",
    [
        (),
        ("a remark",),
        ("<CaretExtension><Label Key='x'>a</Label></CaretExtension>",),
        (label_table.xml({1: "spleen"}),),
        (totalsegmentators({0: "background", 2: "kidney_right"}),),
    ],
)
def test_headers_without_other_names_change_nothing(tmp_path, texts):
    array = write(tmp_path / "labels.nii", *texts)
    found = nifti.load_labels(tmp_path / "labels.nii", classes=CLASSES).array
    np.testing.assert_array_equal(found, array)


def test_ids_of_the_first_release_become_those_of_the_second(tmp_path):
    """Of its own names: 7 is the aorta, which is 52 in the second."""
    v1, path = class_map.VERSIONS["v1"], tmp_path / "labels.nii"
    names = dict(enumerate(v1.names))
    write(path, totalsegmentators(names), ids=(0, 7))
    found = nifti.load_labels(path).array
    assert set(np.unique(found)) == {0, class_map.V2.names.index("aorta")}
    write(path, totalsegmentators(names), ids=(0, 44))
    with pytest.raises(checks.UserError, match="id 44 'heart_myocardium'"):
        nifti.load_labels(path)


def test_a_sixth_lumbar_vertebra_is_not_taken_for_the_first_sacral(tmp_path):
    v3, path = class_map.VERSIONS["total_v3"], tmp_path / "labels.nii"
    array = write(path, totalsegmentators(dict(enumerate(v3.names))), ids=(0, 26))
    with pytest.raises(checks.UserError, match="id 26 'vertebrae_L6'.*_S1' there"):
        nifti.load_labels(path)
    found = nifti.load_labels(path, classes=v3).array
    np.testing.assert_array_equal(found, array)


def test_ids_that_are_stored_with_a_slope_are_rounded(tmp_path):
    """nibabel writes such for floats that are to be integers on disk."""
    array = np.resize(np.arange(118), (6, 7, 8)).astype(np.float64)
    image = nib.Nifti1Image(array, np.eye(4))
    image.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "labels.nii")
    assert nib.load(tmp_path / "labels.nii").dataobj.slope != 1
    stored = np.asarray(nib.load(tmp_path / "labels.nii").dataobj)
    assert (stored.astype(np.uint8) != array).any()
    found = nifti.load_labels(tmp_path / "labels.nii").array
    np.testing.assert_array_equal(found, array)
    nib.save(nib.Nifti1Image(array + 0.002, np.eye(4)), tmp_path / "off.nii")
    with pytest.raises(checks.UserError, match="not whole numbers"):
        nifti.load_labels(tmp_path / "off.nii")
