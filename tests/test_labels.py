import json

import pytest

from swinsmt_jax import checks, labels


def test_class_map_has_117_distinct_structures_after_background():
    assert labels.NUM_CLASSES == len(set(labels.CLASS_NAMES)) == 118
    assert labels.CLASS_NAMES[0] == "background"
    assert labels.CLASS_NAMES[5] == "liver"
    assert labels.CLASS_NAMES[117] == "costal_cartilages"
    assert labels.CLASS_IDS["vertebrae_S1"] == 26


def test_groups_partition_the_structures_in_the_papers_order():
    assert list(labels.GROUPS) == ["organs", "vertebrae", "muscles", "ribs", "vessels"]
    ids = sorted(i for group in labels.GROUPS.values() for i in group)
    assert ids == list(range(1, 118))
    assert [len(g) for g in labels.GROUPS.values()] == [24, 26, 23, 26, 18]


def test_class_map_is_that_of_the_dataset(shared):
    names = json.loads((shared / "data/classes_v2.json").read_text())
    assert {int(i): n for i, n in names.items()} == dict(
        enumerate(labels.CLASS_NAMES[1:], start=1)
    )
    assert labels.load_groups(shared / "data/groups.json") == labels.GROUPS


def test_groups_are_read_by_name_and_id(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text('{"pair": ["kidney_right", 3]}')
    assert labels.load_groups(path) == {"pair": (2, 3)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ["livr"]}', "'livr'.*Did you mean 'liver'"),
        ('{"a": [118]}', "118.*from 1 to 117"),
        ('{"a": [true]}', "True.*whole number"),
        ('{"a": ["background"]}', "none of the 117"),
        ('{"a": [5, "liver"]}', "liver more than once"),
        ('{"a": []}', "at least one class"),
        ('{"a": 5}', "list of at least one"),
        ("{}", "at least one group"),
        ("[1]", "holds list"),
        ("{", "is not JSON"),
    ],
)
def test_bad_groups_are_refused(tmp_path, text, words):
    path = tmp_path / "groups.json"
    path.write_text(text)
    with pytest.raises(checks.UserError, match=words):
        labels.load_groups(path)


def test_missing_groups_file_is_refused(tmp_path):
    with pytest.raises(checks.UserError, match="does not exist"):
        labels.load_groups(tmp_path / "none.json")


def test_names_of_classes_beyond_the_class_map():
    assert labels.class_name(1) == "spleen"
    assert labels.class_name(200) == "class_200"
