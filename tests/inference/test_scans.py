import csv
import gzip
import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from swinsmt_jax.checks import UserError
from swinsmt_jax.commands import predict as script
from swinsmt_jax.config import InferenceConfig, from_config_dict
from swinsmt_jax.data import label_table, nifti
from swinsmt_jax.inference import outputs
from swinsmt_jax.inference import segmenter as prediction
from swinsmt_jax.inference.outputs import KINDS, OutputOptions
from swinsmt_jax.inference.scans import find_scans, segment_scans
from swinsmt_jax.inference.segmenter import Segmenter

CLASSES = 4


@jax.jit
def by_brightness(windows):
    """A network whose label of a voxel is a quarter of its grey level."""
    return -jnp.abs(windows * CLASSES - 0.5 - jnp.arange(CLASSES))


@jax.jit
def by_place(windows):
    """A network that also sees where in the window a voxel lies, but not beyond it."""
    ramp = jnp.linspace(0, 1, windows.shape[1])[:, None, None, None]
    return by_brightness(windows) + ramp * jnp.arange(CLASSES) / CLASSES


def make(
    predict=by_brightness, *, spacing=0.0, patch=(32, 32, 32), accum_dtype="float32"
):
    config = {
        "model": {
            "name": "swin_unetr",
            "in_channels": 1,
            "out_channels": CLASSES,
            "feature_size": 12,
        },
        "data": {
            "root": "nowhere",
            "patch_shape": patch,
            "batch_size": 1,
            "spacing": spacing,
            "hu_range": (0.0, 1000.0),
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {"num_steps": 1},
    }
    return Segmenter(from_config_dict(config), predict, 1, accum_dtype)


def brightness(hu):
    """What `by_brightness` says of Hounsfield units."""
    return np.clip(hu // 250, 0, CLASSES - 1).astype(np.uint8)


@pytest.fixture
def hu(rng):
    """A scan of few voxels whose HU keep away from the borders between labels."""
    return (rng.integers(0, CLASSES, (20, 34, 26)) * 250 + 125).astype(np.int16)


def reoriented(array, affine, orientation):
    start = orientations.io_orientation(affine)
    change = orientations.ornt_transform(start, orientation)
    turned = orientations.apply_orientation(array, change)
    return turned, affine @ orientations.inv_ornt_aff(change, array.shape)


ANISOTROPIC = np.array([[0.9, 0, 0, -7], [0, 0.9, 0, 3], [0, 0, 5, 11], [0, 0, 0, 1]])
SHEARED = np.array([[1.0, 0, 0, 0], [0, 1, 0.4, 0], [0, 0, 5, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("spacing", [0.0, 1.5])
@pytest.mark.parametrize(
    "affine, slices",
    [(ANISOTROPIC, 26), (SHEARED, 26), (ANISOTROPIC, 2)],
    ids=["anisotropic", "gantry tilt", "two slices"],
)
def test_all_48_orientations_get_the_same_labels(hu, affine, slices, spacing):
    """Of a network that sees where in the window a voxel lies, so none can cancel."""
    hu = hu[..., :slices]
    segmenter = make(by_place, spacing=spacing)
    expected = segmenter.segment_array(hu, affine)
    assert set(np.unique(expected)) == set(range(CLASSES))
    own, seen = orientations.io_orientation(affine), set()
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            orientation = np.array(list(zip(axes, signs, strict=True)))
            turned, turned_affine = reoriented(hu, affine, orientation)
            labels = segmenter.segment_array(turned, turned_affine)
            back, _ = reoriented(labels, turned_affine, own)
            np.testing.assert_array_equal(back, expected)
            seen.add(tuple(map(tuple, orientation)))
    assert len(seen) == 48


@pytest.mark.parametrize(
    "shape, affine",
    [
        ((20, 34, 2), np.diag([0.9, 0.9, 5, 1])),
        ((1, 1, 1), np.eye(4)),
        ((20, 34, 26), SHEARED),
        ((70, 33, 40), np.diag([-1.5, -1.5, 1.5, 1])),
    ],
    ids=["two slices", "one voxel", "gantry tilt", "larger than the window"],
)
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_every_voxel_of_any_scan_gets_its_label(rng, shape, affine, kind):
    hu = (rng.integers(0, CLASSES, shape) * 250 + 125).astype(kind)
    labels = make().segment_array(hu, affine)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, brightness(hu))


def test_labels_of_another_spacing_come_back_to_the_scan(rng):
    blocks = rng.integers(0, CLASSES, (5, 6, 4)) * 250 + 125
    hu = blocks.repeat(8, 0).repeat(8, 1).repeat(8, 2).astype(np.int16)
    labels = make(spacing=2.0).segment_array(hu, np.diag([1.0, 1.0, 1.0, 1.0]))
    inner = np.zeros(hu.shape, bool)
    inner[2::8, 2::8, 2::8] = inner[5::8, 5::8, 5::8] = True
    np.testing.assert_array_equal(labels[inner], brightness(hu)[inner])


def test_air_around_the_foreground_is_background():
    hu = np.full((40, 40, 40), -1000, np.int16)
    hu[10:30, 12:25, 5:35] = 400
    labels = make().segment_array(hu, np.eye(4))
    assert (labels[10:30, 12:25, 5:35] == 1).all() and labels.sum() == (hu > 0).sum()


def write(path, hu, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hu, np.eye(4) if affine is None else affine), path)
    return path


def test_scans_are_found_and_named(tmp_path, hu):
    write(tmp_path / "a" / "one.nii", hu)
    write(tmp_path / "a" / "two.nii.gz", hu)
    write(tmp_path / "b" / "ct.nii.gz", hu)
    write(tmp_path / "c" / "ct.nii.gz", hu)
    folders = [tmp_path / name for name in "abc"]
    assert list(find_scans(folders)) == ["one", "two", "b", "c"]
    with pytest.raises(UserError, match="2 inputs would all be written as 'a'"):
        find_scans([tmp_path / "a" / "one.nii", tmp_path / "a" / "one.nii"])
    write(tmp_path / "b" / "segmentations.nii.gz", hu)  # of TotalSegmentator
    (tmp_path / "a" / "._one.nii").write_bytes(b"what macOS leaves")
    assert list(find_scans(folders)) == ["one", "two", "b", "c"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="folder .*empty holds no .nii.gz, .nii, .*or"):
        find_scans([tmp_path / "empty"])
    with pytest.raises(UserError, match="not a scan: its name must end with"):
        find_scans([__file__])
    with pytest.raises(UserError, match="nowhere.nii does not exist"):
        find_scans([tmp_path / "nowhere.nii"])


def test_labels_are_written_on_the_scans_own_grid_with_names(tmp_path, hu):
    affine = np.array([[0, 2.0, 0, 5], [-2, 0, 0, 7], [0, 0, 3, 9], [0, 0, 0, 1]])
    scan = write(tmp_path / "scan.nii", hu, affine)
    segmenter, output = make(), tmp_path / "out"
    summary = segment_scans(segmenter, {"scan": scan}, output, OutputOptions())
    image = nib.load(output / "scan.nii.gz")
    np.testing.assert_array_equal(image.affine, affine)
    np.testing.assert_array_equal(np.asarray(image.dataobj), brightness(hu))
    assert image.get_data_dtype() == np.uint8
    names = label_table.read(image.header.extensions[0].get_content().decode())
    assert names == segmenter.class_names and names[1] == "spleen"
    assert summary["scan"]["structures"] == list(names.values())
    assert json.loads((output / "summary.json").read_text()) == summary
    labels = segmenter.segment(scan)
    prediction.save(tmp_path / "own.nii.gz", labels, like=scan, names=names)
    again = np.asarray(nib.load(tmp_path / "own.nii.gz").dataobj)
    np.testing.assert_array_equal(again, brightness(hu))


def test_what_one_makes_of_labels_is_saved_or_refused_whole(tmp_path, hu):
    ct = write(tmp_path / "ct.nii.gz", hu)
    labels = brightness(hu)
    for kind in (bool, np.int64, np.uint16):
        prediction.save(tmp_path / "x.nii.gz", (labels == 2).astype(kind), like=ct)
        saved = np.asarray(nib.load(tmp_path / "x.nii.gz").dataobj)
        assert saved.dtype == np.uint8
        np.testing.assert_array_equal(saved, labels == 2)
    before = sorted(tmp_path.iterdir())
    for name, array, words in (
        ("y.nii.gz", labels / 2, "type float64, but they must be bool or integers"),
        ("y.nii.gz", labels.astype(int) + 255, "from 255 to 258"),
        ("y.img", labels, "ends with .nii"),
        ("y", labels, "ends with .nii"),
    ):
        with pytest.raises(UserError, match=words):
            prediction.save(tmp_path / name, array, like=ct)
    assert sorted(tmp_path.iterdir()) == before


def test_one_failure_does_not_stop_the_rest_and_what_is_there_stays(tmp_path, hu):
    scans = {
        "bad": write(tmp_path / "bad.nii", np.zeros((4, 4, 4, 2), np.int16)),
        "good": write(tmp_path / "good.nii.gz", hu),
        "rgb": tmp_path / "rgb.nii",
    }
    rgb = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), scans["rgb"])
    output = tmp_path / "out"
    summary = segment_scans(make(), scans, output, OutputOptions())
    assert "must be 3-D" in summary["bad"]["error"]
    assert "RGB and complex" in summary["rgb"]["error"]
    assert summary["good"]["seconds"] >= 0
    assert sorted(p.name for p in output.iterdir()) == ["good.nii.gz", "summary.json"]
    before = (output / "good.nii.gz").stat().st_mtime_ns
    again = segment_scans(make(), scans, output, OutputOptions())
    assert "seconds" not in again["good"]
    assert (output / "good.nii.gz").stat().st_mtime_ns == before
    segment_scans(make(), scans, output, OutputOptions(overwrite=True))
    assert (output / "good.nii.gz").stat().st_mtime_ns > before


def test_an_input_is_never_replaced(tmp_path, hu):
    scan = write(tmp_path / "scans" / "s1.nii.gz", hu)
    ct = write(tmp_path / "data" / "s2" / "ct.nii.gz", hu)
    masks = OutputOptions(masks=True, overwrite=True)
    for scans, folder, options in (
        ({"s1": scan}, "scans", OutputOptions(overwrite=True)),
        ({"s1": scan}, "scans/../scans", OutputOptions()),
        ({"s2": ct}, "data", masks),
    ):
        with pytest.raises(UserError, match="is, or holds, the input .*/s[12]"):
            segment_scans(make(), scans, tmp_path / folder, options)
    with pytest.raises(UserError, match="holds other files, such as .*ct.nii.gz"):
        segment_scans(make(), {"s2": scan}, tmp_path / "data", masks)
    for file in (scan, ct):
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), hu)
        assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_whatever_fails_on_one_scan_does_not_stop_the_rest(tmp_path, hu):
    scans = {
        "large": write(tmp_path / "large.nii", np.tile(hu, (3, 1, 1))),
        "good": write(tmp_path / "good.nii", hu),
    }
    calls = []

    def fails_at_first(windows):
        calls.append(windows)
        if len(calls) == 1:
            raise MemoryError("no room")
        return by_brightness(windows)

    summary = segment_scans(
        make(fails_at_first), scans, tmp_path / "out", OutputOptions()
    )
    assert summary["large"]["error"] == "MemoryError: no room"
    assert (tmp_path / "out" / "good.nii.gz").exists() and "seconds" in summary["good"]


def test_what_is_missing_is_written_and_what_is_there_stays(tmp_path, hu):
    scan, output = write(tmp_path / "s.nii.gz", hu), tmp_path / "out"
    segment_scans(make(), {"s": scan}, output, OutputOptions())
    labels = output / "s.nii.gz"
    before = labels.stat().st_mtime_ns

    def unused(windows):
        raise AssertionError("the labels are there")

    options = OutputOptions(statistics=True, preview=True)
    found = segment_scans(make(unused), {"s": scan}, output, options)["s"]
    assert "error" not in found and "seconds" not in found and found["structures"]
    with (output / "s_statistics.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert int(rows["spleen"]["voxels"]) == (brightness(hu) == 1).sum()
    assert (output / "s_preview.png").exists()
    segment_scans(make(), {"s": scan}, output, OutputOptions(masks=True))
    assert {p.name for p in (output / "s").iterdir()} >= {"spleen.nii.gz"}
    for options in (
        OutputOptions(roi=("spleen",)),
        OutputOptions(roi=("spleen",), masks=True),
    ):
        with pytest.raises(
            UserError, match="with 3 classes instead of the 1 requested"
        ):
            segment_scans(make(), {"s": scan}, output, options)
    assert labels.stat().st_mtime_ns == before
    segment_scans(
        make(), {"s": scan}, output, OutputOptions(roi=("spleen",), overwrite=True)
    )
    assert set(np.unique(nib.load(labels).dataobj)) == {0, 1}
    assert not (output / "s_statistics.csv").exists()  # it was of other labels


def test_every_kind_of_output_is_made_of_cleaned_labels(tmp_path, hu):
    scan = write(tmp_path / "s.nii.gz", hu, np.diag([2.0, 2.0, 2.5, 1]))
    kinds = {
        name: kind.choices[-1] if kind.choices else True for name, kind in KINDS.items()
    } | {"probabilities": ("spleen",)}
    del kinds["seg"]  # of DICOM series
    out, plain = tmp_path / "out", tmp_path / "plain"
    options = OutputOptions(**kinds, clean=True)
    found = segment_scans(make(), {"s": scan}, out, options)["s"]
    before = segment_scans(make(), {"s": scan}, plain, OutputOptions())["s"]
    names = {f"s{KINDS[kind].ending}" for kind in kinds} | {"s.nii.gz", "summary.json"}
    assert {path.name for path in out.iterdir()} == names
    assert found["voxels_removed"]["spleen"] > 0
    labels, whole = (np.asarray(nib.load(p / "s.nii.gz").dataobj) for p in (out, plain))
    removed = np.count_nonzero(whole) - np.count_nonzero(labels)
    assert removed == sum(found["voxels_removed"].values())
    quality = json.loads((out / "s_quality.json").read_text())
    assert found["warnings"] == [w["reason"] for w in quality["warnings"]]
    assert {p.stem for p in (out / "s_mesh").iterdir()} == set(found["structures"])
    with pytest.raises(UserError, match=r"clean \(True, not None\)"):
        segment_scans(make(), {"s": scan}, out, OutputOptions())
    assert not any(
        "seconds" in s
        for s in segment_scans(make(), {"s": scan}, out, options).values()
    )
    segment_scans(make(), {"s": scan}, out, OutputOptions(overwrite=True))
    assert {path.name for path in out.iterdir()} == {"s.nii.gz", "summary.json"}
    assert before["structures"]


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_labels_are_written_in_the_format_of_the_scan(tmp_path, hu, suffix):
    save = pytest.importorskip("SimpleITK").WriteImage
    image = pytest.importorskip("SimpleITK").GetImageFromArray(np.int16(hu).T)
    image.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))  # RAS
    save(image, str(tmp_path / f"s{suffix}"))
    out, scans = tmp_path / "out", find_scans([tmp_path / f"s{suffix}"])
    for _ in range(2):  # the second time all is there
        segment_scans(make(), scans, out, OutputOptions(statistics=True))
    labels = nifti.load_labels(out / f"s{suffix}", on=nifti.load_ct(scans["s"]))
    np.testing.assert_array_equal(labels.array, brightness(hu))
    segment_scans(make(), scans, out, OutputOptions(format="nii.gz"))
    same = nifti.load_labels(out / "s.nii.gz", on=nifti.load_ct(scans["s"]))
    np.testing.assert_array_equal(same.array, labels.array)
    content = (out / f"s{suffix}").read_bytes()
    (out / f"s{suffix}").write_bytes(content[: len(content) // 2])
    assert "seconds" in segment_scans(make(), scans, out, OutputOptions())["s"]


def test_a_killed_overwrite_leaves_no_old_results_beside_new_labels(
    tmp_path, hu, monkeypatch
):
    scan, output = {"s": write(tmp_path / "s.nii.gz", hu)}, tmp_path / "out"
    wanted = OutputOptions(statistics=True, preview=True)
    segment_scans(make(), scan, output, wanted)
    other = replace(make(lambda windows: by_brightness(1 - windows)), network="other")

    def killed(*_, **__):
        raise KeyboardInterrupt

    for fails, there in (("save_labels", True), ("write_preview", True)):
        module = outputs.nifti if fails == "save_labels" else outputs.pictures
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, fails, killed)
            segment_scans(other, scan, output, replace(wanted, overwrite=True))
        names = {path.name for path in output.iterdir()}
        assert "s_preview.png" not in names and ("s.nii.gz" in names) == there
        with pytest.raises(UserError, match="no summary.json says what made it"):
            segment_scans(make(), scan, output, wanted)  # whose labels these are
    segment_scans(other, scan, output, replace(wanted, overwrite=True))
    new = nib.load(output / "s.nii.gz").get_fdata()
    with (output / "s_statistics.csv").open() as file:
        rows = {row["class"]: int(row["voxels"]) for row in csv.DictReader(file)}
    assert rows["spleen"] == (new == 1).sum()


def test_labels_of_another_scan_or_network_are_never_taken(tmp_path, hu):
    ours, theirs = (
        write(tmp_path / p / "ct1.nii.gz", hu + i) for i, p in enumerate("ab")
    )
    output, network = tmp_path / "out", make()
    segment_scans(network, find_scans([ours]), output, OutputOptions())
    moved = write(tmp_path / "c" / "ct1.nii.gz", hu)
    moved.write_bytes(ours.read_bytes())
    statistics = OutputOptions(statistics=True)
    found = segment_scans(network, find_scans([moved]), output, statistics)["ct1"]
    assert "error" not in found and "seconds" not in found
    windows = replace(network.config, inference=InferenceConfig(overlap=0.25))
    before = {file: file.read_bytes() for file in output.iterdir()}
    for other, scan, words in (
        (
            network,
            theirs,
            r"c.ct1.nii.gz; for .*b.ct1.nii.gz these differ: scan \(",
        ),
        (replace(network, network="x"), ours, r"differ: network \(, not x\)"),
        (replace(network, step=7), ours, r"differ: step \(1, not 7\)"),
        (replace(network, config=windows), ours, r"overlap \(0.5, not 0.25\)"),
        (replace(network, mirror=True), ours, r"mirror \(False, not True\)"),
    ):
        with pytest.raises(UserError, match=words):
            segment_scans(other, find_scans([scan]), output, statistics)
    alone = find_scans([write(tmp_path / "b" / "ct2.nii.gz", hu)])
    words = "ct1.nii.gz beside the results was made by another network"
    with pytest.raises(UserError, match=words):
        segment_scans(replace(network, network="x"), alone, output, statistics)
    assert before == {file: file.read_bytes() for file in output.iterdir()}
    (output / "summary.json").unlink()
    with pytest.raises(UserError, match="no summary.json says what made it"):
        segment_scans(network, find_scans([ours]), output, statistics)
    again = replace(statistics, overwrite=True)
    assert (
        "seconds" in segment_scans(network, find_scans([theirs]), output, again)["ct1"]
    )


def test_results_are_named_after_where_a_path_leads(tmp_path, hu, monkeypatch):
    write(tmp_path / "patient" / "ct.nii.gz", hu)
    (tmp_path / "patient" / "scripts").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, given in (
        ("patient/scripts", "../ct.nii.gz"),
        ("patient/scripts", ".."),
        ("patient", "ct.nii.gz"),
        ("patient", "."),
        (".", "~/patient/ct.nii.gz"),
    ):
        monkeypatch.chdir(tmp_path / folder)
        assert find_scans([given]) == {"patient": tmp_path / "patient/ct.nii.gz"}
    segment_scans(make(), find_scans(["patient"]), "~/out", OutputOptions())
    assert (tmp_path / "out" / "patient.nii.gz").exists()
    assert not list(tmp_path.rglob("~"))


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path, hu):
    def unused(windows):
        raise AssertionError("nothing is segmented")

    scan = write(tmp_path / "s.nii.gz", hu)
    with pytest.raises(UserError, match="/proc cannot be written"):
        segment_scans(make(unused), {"s": scan}, "/proc", OutputOptions())


def test_the_summary_keeps_earlier_scans(tmp_path, hu):
    scans = {name: write(tmp_path / f"{name}.nii", hu) for name in "ab"}
    output = tmp_path / "out"
    first = segment_scans(make(), {"a": scans["a"]}, output, OutputOptions())
    second = segment_scans(make(), {"b": scans["b"]}, output, OutputOptions())
    again = segment_scans(make(), scans, output, OutputOptions())
    assert not any("seconds" in found for found in again.values())
    assert json.loads((output / "summary.json").read_text()) == first | second


def test_masks_classes_statistics_and_picture(tmp_path, hu):
    scan = write(tmp_path / "s.nii.gz", hu, np.diag([2.0, 2.0, 2.5, 1]))
    roi = ("spleen", "kidney_left")
    options = OutputOptions(
        roi=roi, masks=True, statistics=True, preview=True, overwrite=True
    )
    for _ in range(2):  # the folder of masks is replaced as a whole
        segment_scans(make(), {"s": scan}, tmp_path / "out", options)
    masks = tmp_path / "out" / "s"
    assert {p.name for p in masks.iterdir()} == {f"{name}.nii.gz" for name in roi}
    spleen = np.asarray(nib.load(masks / "spleen.nii.gz").dataobj)
    np.testing.assert_array_equal(spleen, brightness(hu) == 1)
    with (tmp_path / "out" / "s_statistics.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(roi) and float(rows["spleen"]["mean_hu"]) == 375
    volume = (brightness(hu) == 1).sum() * 10 / 1000
    assert float(rows["spleen"]["volume_ml"]) == pytest.approx(volume)
    assert (tmp_path / "out" / "s_preview.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="the option mesh is 'obj', but must be one"):
        OutputOptions(mesh="obj")
    seg = OutputOptions(seg="labelmap")
    with pytest.raises(UserError, match="needs the DICOM series"):
        segment_scans(make(), {"t": scan}, tmp_path / "out", seg)
    assert not (tmp_path / "out" / "t.nii.gz").exists()
    with pytest.raises(UserError, match="roi is 'liverr', but must be one of"):
        segment_scans(
            make(), {"s": scan}, tmp_path / "out", OutputOptions(roi=("liverr",))
        )


def test_two_places_in_one_header_are_told(tmp_path, hu, caplog):
    image = nib.Nifti1Image(hu, np.eye(4))
    image.set_qform(np.diag([-1.0, 1, 1, 1]), code=1)
    image.set_sform(np.eye(4), code=1)
    nib.save(image, tmp_path / "two.nii")
    segment_scans(
        make(), {"two": tmp_path / "two.nii"}, tmp_path / "out", OutputOptions()
    )
    words = "sform and qform disagree by up to 38.0 mm"
    assert caplog.text.count(words) == 1
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert words in summary["two"]["notes"][0]


def test_half_precision_changes_few_labels(hu):
    full = make(by_place).segment_array(hu, np.eye(4))
    half = make(by_place, accum_dtype="float16").segment_array(hu, np.eye(4))
    assert (full != half).mean() < 0.01


def test_the_script_tells_what_failed(tmp_path, hu, monkeypatch, capsys):
    write(tmp_path / "in" / "good.nii.gz", hu)
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"no scan")
    monkeypatch.setattr(prediction, "load", lambda *_, **__: make())
    values = script.flags.FlagValues()
    script.define_flags(values)
    values(
        ["predict.py", "--workdir=x", f"--input={tmp_path / 'in'}"]
        + [f"--output={tmp_path / 'out'}"]
    )
    monkeypatch.setattr(script.flags, "FLAGS", values)
    with pytest.raises(SystemExit) as end:
        script.main([])
    out, err = capsys.readouterr()
    assert end.value.code == 1 and "1 segmented, 0 skipped" in out
    assert "failed: bad: " in err and "bad.nii.gz is" in err


@jax.jit
def constant(windows):
    """A network that says 2 of every voxel."""
    return jnp.broadcast_to(2 == jnp.arange(CLASSES), (*windows.shape[:-1], CLASSES))


def random_scans(rng, count):
    """Shapes, affines of any orientation, and spacings of a network."""
    for _ in range(count):
        affine = np.diag([*rng.choice((0.5, 0.7, 1.0, 2.0, 3.1), 3), 1.0])
        orientation = np.stack([rng.permutation(3), rng.choice((-1, 1), 3)], axis=1)
        shape = rng.integers(1, 45, 3)
        _, affine = reoriented(np.empty(shape, bool), affine, orientation)
        yield tuple(shape), affine, rng.choice((0.9, 1.5, 2.0, 5.0))


def test_a_constant_network_labels_all_of_any_scan(rng):
    for shape, affine, spacing in random_scans(rng, 20):
        hu = np.full(shape, 500, np.int16)
        labels = make(constant, spacing=spacing).segment_array(hu, affine)
        assert (labels == 2).all(), (shape, affine, spacing)


def test_an_ideal_network_errs_only_where_resampling_rounds(rng):
    """Of two halves of a scan, within half a voxel of the border between them."""
    for shape, affine, spacing in random_scans(rng, 20):
        axis = rng.integers(3)
        side = np.linalg.norm(affine[:3, axis])
        half = int(np.ceil(4 * max(spacing, side) / side))
        shape = [
            half + rng.integers(half, 2 * half) if i == axis else n
            for i, n in enumerate(shape)
        ]
        hu = np.full(shape, 375, np.int16)
        hu[(slice(None),) * axis + (slice(half, None),)] = 625
        labels = make(spacing=spacing).segment_array(hu, affine)
        wrong = np.flatnonzero(
            (labels != brightness(hu)).any(axis=tuple(i for i in range(3) if i != axis))
        )
        off = np.abs((wrong + 0.5 - half) * side)
        assert (off <= 0.5 * spacing + 1e-6).all(), (shape, affine, spacing, wrong)


def test_a_scan_whose_logits_are_not_finite_is_named_and_has_no_labels(hu, tmp_path):
    @jax.jit
    def diverged(windows):
        return by_brightness(windows) * jnp.where(windows.max() > 0.9, jnp.nan, 1)

    for name, top in (("good", 600), ("bad", 2000)):
        scan = nib.Nifti1Image(np.minimum(hu * 2, top).astype(np.int16), np.eye(4))
        nib.save(scan, tmp_path / f"{name}.nii.gz")
    segmenter, out = make(diverged), tmp_path / "out"
    summary = segment_scans(segmenter, find_scans([tmp_path]), out, OutputOptions())
    assert "error" not in summary["good"] and (out / "good.nii.gz").exists()
    assert "NaN or infinite in window 1 of" in summary["bad"]["error"]
    assert not (out / "bad.nii.gz").exists()
    with pytest.raises(UserError, match="bad.nii.gz: the network's logits are NaN"):
        segmenter.segment(tmp_path / "bad.nii.gz")


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("kept", [0, 60, -1])
def test_results_that_are_empty_or_cut_short_are_made_anew(hu, tmp_path, masks, kept):
    nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / "a.nii.gz")
    scans, out, options = (
        find_scans([tmp_path]),
        tmp_path / "o",
        OutputOptions(masks=masks),
    )
    segment_scans(make(), scans, out, options)
    file = min((out / "a").iterdir()) if masks else out / "a.nii.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    assert "seconds" in segment_scans(make(), scans, out, options)["a"]
    np.testing.assert_array_equal(
        nib.load(file).get_fdata(),
        nib.Nifti1Image.from_bytes(gzip.decompress(whole)).get_fdata(),
    )
    assert "seconds" not in segment_scans(make(), scans, out, options)["a"]


@pytest.mark.parametrize("name", ["", ".", ".hidden", "summary.json", "../a", "x/a"])
def test_results_stay_in_the_output_and_have_a_place_of_their_own(hu, tmp_path, name):
    nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match="rename the scan"):
        segment_scans(
            make(),
            {name: tmp_path / "a.nii.gz"},
            tmp_path / "o",
            OutputOptions(masks=True),
        )
    assert not (tmp_path / "o").exists()


def test_two_scans_never_write_one_file(hu, tmp_path):
    nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / "a.nii.gz")
    scans = {name: tmp_path / "a.nii.gz" for name in ("a", "a_statistics.csv")}
    options = OutputOptions(masks=True, statistics=True)
    with pytest.raises(UserError, match="the place of other results"):
        segment_scans(make(), scans, tmp_path / "o", options)
