"""Grids of other voxels cover their scan, and nothing moves on the way there."""

import itertools
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swinsmt_jax import checks
from swinsmt_jax.class_map import V2
from swinsmt_jax.data import (
    label_files,
    nifti,
    preprocess,
    resampling,
    store,
    store_report,
)
from swinsmt_jax.data.network_view import network_view
from swinsmt_jax.data.sample import voxel_step
from swinsmt_jax.data.volume import spacing_of
from swinsmt_jax.phantoms import dataset as phantom

ORIENTATIONS = [
    np.eye(4)[[*axes, 3]] * (*signs, 1)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]
SIDES = st.one_of(
    st.floats(0.3, 6.0).map(lambda side: float(np.float32(side))),
    st.sampled_from((0.5, 0.6, 0.7, 0.9, 1.0, 1.5, 2.0, 3.0, 5.0)),
)
SHAPES = st.tuples(*[st.integers(1, 120)] * 3)


@st.composite
def grids(draw, sides=SIDES):
    """An affine [4, 4] of any sides, direction of axes and tilt of the gantry."""
    affine = draw(st.sampled_from(ORIENTATIONS)) @ np.diag(
        [draw(sides), draw(sides), draw(sides), 1.0]
    )
    affine[:3] += np.outer((0, 0.2, 0.1), (0, 0, 1, 0)) * draw(st.booleans())
    affine[:3, 3] = draw(st.tuples(*[st.floats(-500, 500)] * 3))
    return affine.astype(np.float32).astype(np.float64)


@settings(max_examples=200, deadline=None)
@given(SHAPES, grids(), SIDES)
@example((31, 25, 103), np.diag([0.7, 1.0, 0.5, 1.0]), 2.0)
@example((103, 27, 26), np.diag([0.5, 1.0, 1.0, 1.0]), 5.0)
@example((120, 10, 30), np.diag([0.6000000238418579, 3.0, 1.0, 1.0]), 3.0)
def test_a_grid_begins_with_the_scan_and_covers_it(shape, affine, spacing):
    new_shape, new = resampling.covering_grid(shape, affine, spacing=spacing)
    edge = new @ (-0.5, -0.5, -0.5, 1)
    np.testing.assert_allclose(edge, affine @ (-0.5, -0.5, -0.5, 1), atol=1e-6)
    behind = np.subtract(
        np.multiply(new_shape, spacing_of(new)),
        np.multiply(shape, spacing_of(affine)),
    )
    assert (behind > -1e-3).all() and (behind < spacing).all()
    places = resampling.positions(shape, affine, on=new)
    for axis, n in zip(places, new_shape, strict=True):
        assert -0.5 < axis[0] and axis[-1] < n - 0.5


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 24)] * 3), grids(), SIDES)
def test_every_voxel_of_a_scan_is_shown_to_the_network(shape, affine, spacing):
    hu = np.full(shape, 40, np.int16)
    view = network_view(hu, affine, spacing=spacing, hu_range=(-1024, 1024))
    assert view.box == tuple(slice(0, n) for n in shape)
    assert np.ptp(view.image) == 0


@settings(max_examples=40, deadline=None)
@given(st.data(), grids(st.floats(0.6, 2.5)), st.floats(0.6, 2.5))
def test_centres_of_boxes_keep_their_place(data, affine, spacing):
    """Each face to half a voxel, also at the end of a scan."""
    sides = np.array(spacing_of(affine))
    shape = data.draw(st.tuples(*[st.integers(16, 36)] * 3))
    box = []
    for n, side in zip(shape, sides, strict=True):
        least = min(n, int(np.ceil(3 * max(spacing, side) / side)))
        first = data.draw(st.integers(0, n - least))
        box.append(slice(first, data.draw(st.integers(first + least, n))))
    label = np.zeros(shape, np.uint8)
    label[tuple(box)] = 7
    new, new_affine = resampling.resample(label, affine, spacing=spacing, order=0)
    step = np.linalg.inv(affine) @ new_affine
    for axis, (side, part) in enumerate(zip(sides, box, strict=True)):
        found = np.unique(np.nonzero(new)[axis])
        ends = (
            np.array([found[0] - 0.5, found[-1] + 0.5]) * step[axis, axis]
            + step[axis, 3]
        )
        ends = ends.clip(-0.5, shape[axis] - 0.5)
        off = (ends - (part.start - 0.5, part.stop - 0.5)) * side
        assert np.abs(off).max() <= 0.51 * spacing


def cut(shape, affine, *, spacing):
    """The grids of before: rounded to the nearest number of voxels."""
    covering, new = COVERING(shape, affine, spacing=spacing)
    sides = np.array(spacing_of(affine))
    return tuple(np.rint(shape * sides / spacing).astype(int).tolist()), new


COVERING = resampling.covering_grid


def test_stores_of_before_are_read_and_said_to_lack_the_end(tmp_path, caplog):
    source = tmp_path / "source"
    phantom.write_dataset(source, train=1, val=1, test=0, spacing=12.0, seed=0)
    for split, name in (("train", "s0001"), ("val", "s0002")):
        for file in (source / name).glob("*.nii.gz"):
            image = nib.load(file)
            length = 25 if split == "train" else 26
            nib.save(image.slicer[:20, :20, :length], file)
    old, new = tmp_path / "old", tmp_path / "new"
    with mock.patch.object(resampling, "covering_grid", cut):
        assert preprocess.preprocess(source, old, spacing=24.0) == {}
    assert preprocess.preprocess(source, new, spacing=24.0) == {}
    for root, lacking in ((old, True), (new, False)):
        caplog.clear()
        (case,) = store.find_cases(root, split="train")
        assert case.shape == ((10, 10, 12) if lacking else (10, 10, 13))
        assert (
            "1 of 1 cases of 'train' lack up to half a voxel" in caplog.text
        ) is lacking
        caplog.clear()
        assert store.find_cases(root, split="val")[0].shape == (10, 10, 13)
        assert not caplog.text
        assert ("1 end before their scan" in store_report.write(root)) is lacking
        page = (root / "report.html").read_text()
        assert ("s0001</b>: made before grids covered scans" in page) is lacking


SCAN = np.array([[1.0, 0, 0, -5], [0, 1, 0, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
NONE = "(+0.00, +0.00, +0.00) mm"


@pytest.mark.parametrize(
    ("planes", "step", "words"),
    [
        (
            10,
            {"offset": (0.5, 0, 0)},
            ["(+0.50, +0.00, +0.00)", "half a voxel", "right"],
        ),
        (10, {"offset": (0, 0, -1)}, ["last one (+0.00, +0.00, -3.00) mm"]),
        (
            10,
            {"offset": (0, 0, 0), "scale": (1, 1, -1)},
            ["-27.00", "head seems to run"],
        ),
        (9, {"offset": (0, 0, 0)}, [f"first voxel lies {NONE}", "-3.00", "9 planes"]),
        (9, {"offset": (0, 0, 1)}, ["+3.00", f"last one {NONE}", "9 planes"]),
    ],
    ids=["half a voxel", "a slice off", "flipped", "last slice", "first slice"],
)
def test_predictions_beside_their_scan_are_refused_with_the_shift(
    tmp_path, planes, step, words
):
    """Whatever the orientation of the file."""
    nib.save(nib.Nifti1Image(np.zeros((6, 8, 10), np.int16), SCAN), tmp_path / "ct.nii")
    scan = nifti.load_ct(tmp_path / "ct.nii")
    affine = SCAN @ voxel_step(**step)
    image = nib.Nifti1Image(np.zeros((6, 8, planes), np.uint8), affine)
    start = nib.io_orientation(affine)
    for axes in ("RAS", "LPS", "SAR"):
        wanted = nib.orientations.axcodes2ornt(axes)
        turn = nib.orientations.ornt_transform(start, wanted)
        nib.save(image.as_reoriented(turn), tmp_path / "labels.nii")
        with pytest.raises(checks.UserError) as found:
            label_files.load_prediction(tmp_path / "labels.nii", classes=V2, like=scan)
        assert all(word in str(found.value) for word in words), found.value
