import numpy as np
import pytest

from swinsmt_jax import checks, class_map, labels


def test_the_first_release_has_104_classes_in_its_order():
    v1 = class_map.VERSIONS["v1"]
    assert v1.num_classes == 105
    known = {1: "spleen", 7: "aorta", 18: "vertebrae_L5", 44: "heart_myocardium"}
    known |= {
        49: "pulmonary_artery",
        58: "rib_left_1",
        93: "face",
        104: "urinary_bladder",
    }
    assert {i: v1.names[i] for i in known} == known
    assert all(v1.names[i].startswith("rib_") for i in v1.groups["ribs"])
    assert class_map.VERSIONS[labels.VERSION].names == labels.CLASS_NAMES


def test_total_v3_has_a_sixth_lumbar_vertebra():
    v3 = class_map.VERSIONS["total_v3"]
    other = [i for i in range(118) if v3.names[i] != class_map.V2.names[i]]
    assert other == [26] and v3.names[26] == "vertebrae_L6"
    assert v3.num_classes == 118 and v3.groups == class_map.V2.groups


def test_a_subset_keeps_order_and_groups():
    found = class_map.V2.subset(["liver", "spleen", "rib_left_1"])
    assert found.names == ("background", "spleen", "liver", "rib_left_1")
    assert found.groups == {"organs": (1, 2), "ribs": (3,)}
    with pytest.raises(checks.UserError, match="Did you mean 'liver'"):
        class_map.V2.subset(["livver"])
    with pytest.raises(checks.UserError, match="'liver' more than once"):
        class_map.V2.subset(["liver", "liver"])


def test_sides_are_exchanged_by_name():
    own = class_map.make(["ear_left", "nose", "ear_right"], {}, where="x")
    np.testing.assert_array_equal(own.left_right_swap()[:5], [0, 3, 2, 1, 4])
    table = class_map.V2.left_right_swap()
    ids = labels.CLASS_IDS
    assert table[ids["lung_middle_lobe_right"]] == ids["lung_middle_lobe_right"]
    np.testing.assert_array_equal(table[table], np.arange(256))


@pytest.mark.parametrize(
    "pair",
    [
        ("left kidney", "right kidney"),
        ("Kidney_Left", "Kidney_Right"),
        ("kidney-left", "kidney-right"),
        ("kidney_l", "kidney_r"),
        ("LT kidney", "RT kidney"),
        ("KIDNEY L", "KIDNEY R"),
        ("kidneyLeft", "kidneyRight"),
        ("left-lateral-ventricle", "right-lateral-ventricle"),
        ("lkid", "rkid"),
        ("LKidney", "RKidney"),
        ("KIDNEYL", "KIDNEYR"),
        ("kidneyleft", "kidneyright"),
        ("Eye_AL", "Eye_AR"),
        ("ctx-lh-insula", "ctx-rh-insula"),
        ("hippocampus_lh", "hippocampus_rh"),
        ("rib_left1", "rib_right1"),
        ("Rib_L1", "Rib_R1"),
    ],
)
def test_sides_are_known_however_they_are_written(pair):
    own = class_map.make(["nose", *pair, "vertebrae_L1"], {}, where="x")
    np.testing.assert_array_equal(own.left_right_swap()[:5], [0, 1, 3, 2, 4])


def test_chambers_of_the_heart_are_no_sides():
    v1 = class_map.VERSIONS["v1"]
    kept = {
        n
        for n, other in zip(v1.names, v1.left_right_swap(), strict=False)
        if ("left" in n or "right" in n) and v1.names[other] == n
    }
    chambers = {
        f"heart_{part}_{side}"
        for part in ("atrium", "ventricle")
        for side in ("left", "right")
    }
    assert kept == chambers | {"lung_middle_lobe_right"}
    own = class_map.make(
        ["Left Atrium", "Right Atrium", "left_ventricle"], {}, where=""
    )
    np.testing.assert_array_equal(own.left_right_swap(), np.arange(256))


@pytest.mark.parametrize(
    "names",
    [
        ["kidney_left"],
        ["kidneyleft"],
        ["lkid"],
        ["LKidney"],
        ["kidney_lh"],
        ["kidney_AL"],
        ["kidney_left", "right_kidney"],
        ["kidney_l", "kidney_left", "kidney_right"],
    ],
)
def test_sides_without_one_counterpart_are_not_exchanged(names):
    own = class_map.make([*names, "nose"], {}, where="x")
    with pytest.raises(
        checks.UserError, match="(?i)side of .*kid.* is missing or occurs twice"
    ):
        own.left_right_swap()


def test_letters_that_may_be_sides_are_no_sides_unless_both_are_there():
    own = class_map.make(["lung", "rectum", "vertebrae_L1", "LV", "RV"], {}, where="x")
    np.testing.assert_array_equal(own.left_right_swap(), np.arange(256))
    spine = class_map.make(["L1", "L2", "R1", "nose"], {}, where="x")
    with pytest.raises(checks.UserError, match="other side of L2 is missing"):
        spine.left_right_swap()


def test_classes_without_names_are_not_exchanged():
    unknown = class_map.make(["class_1", "class_2"], {}, where="x")
    with pytest.raises(checks.UserError, match="without known names, such as class_1"):
        unknown.left_right_swap()


@pytest.mark.parametrize(
    ("names", "groups", "words"),
    [
        ("liver", {}, "list of 1 to 254 names"),
        (["a", " / "], {}, "must be a name with letters or digits"),
        (["a", 3], {}, "must be a name with letters or digits"),
        (["a", "a"], {}, "'a' more than once"),
        (["background"], {}, "the background, which is id 0"),
        (["a"], {"g": ["b"]}, "a class of the group 'g' is 'b'"),
        (["a"], {"g": "a"}, "must list names"),
        ([f"c{i}" for i in range(255)], {}, "list of 1 to 254 names"),
    ],
)
def test_bad_classes_are_refused(names, groups, words):
    with pytest.raises(checks.UserError, match=words) as told:
        class_map.make(names, groups, where="file.json")
    assert "file.json" in str(told.value)


def test_names_become_safe_file_names():
    given = ["prostate/uterus", "vein: portal, splenic", ".hidden", "C:\\x", "L5 {a}"]
    own = class_map.make(given, {"g": given[:2]}, where="x")
    wanted = ("prostate_uterus", "vein_portal_splenic", "hidden", "C_x", "L5_a_")
    assert own.names[1:] == wanted and own.groups == {"g": (1, 2)}
    twins = class_map.make(["a/b", "a_b", "a:b"], {}, where="x")
    assert twins.names[1:] == ("a_b_1", "a_b", "a_b_3")
    assert own.subset(given[:1]).names[1:] == wanted[:1]
    assert class_map.from_json(class_map.to_json(own), where="x") == own


def test_a_map_survives_json():
    own = class_map.make(["a", "b"], {"g": ["b"]}, where="x")
    for known in (own, *class_map.VERSIONS.values()):
        assert class_map.from_json(class_map.to_json(known), where="x") == known


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "a/../b", "..a", "\x9bx"])
def test_every_name_that_a_map_takes_is_a_plain_file_name(name):
    found = class_map.make([name], {}, where="here").names[1]
    checks.file_name("name", found)


def test_a_name_too_long_for_a_file_is_refused():
    with pytest.raises(checks.UserError, match="here: .* at most 200 bytes"):
        class_map.make(["x" * 201], {}, where="here")
