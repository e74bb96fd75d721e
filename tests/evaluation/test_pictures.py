import numpy as np
import pytest
from matplotlib.image import imread

from swinsmt_jax import class_map
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.evaluation import pictures
from swinsmt_jax.evaluation.metrics import DICE
from swinsmt_jax.evaluation.scoring import score
from swinsmt_jax.inference.pictures import colours_of

RIGHT, LEFT, HEAD, FRONT = 1, 2, 3, 4


def body(name="s0001", errors=0, spacing=(2.0, 1.0, 3.0)):
    """A box with labels at its right, left, upper and front ends (RAS)."""
    truth = np.zeros((20, 16, 24), np.uint8)
    truth[16:, 6:10, 10:14] = RIGHT
    truth[:4, 6:10, 10:14] = LEFT
    truth[8:12, 6:10, 20:] = HEAD
    truth[8:12, 12:, 10:14] = FRONT
    prediction = truth.copy()
    prediction[16 : 16 + errors] = 0
    image = np.full(truth.shape, 40, np.int16)
    scan = Sample(image, truth, np.diag([*spacing, 1.0]), name)
    return score(scan, prediction, seconds=1.0, num_classes=5, metrics=[DICE])


def centre(labels, number):
    rows, columns = np.nonzero(labels == number)
    return rows.mean(), columns.mean()


def test_planes_are_shown_as_radiologists_read():
    coronal, axial, _ = pictures.views_of(body()).views
    assert (coronal.plane, axial.plane) == ("coronal", "axial")
    for view in (coronal, axial):
        assert centre(view.truth, RIGHT)[1] < centre(view.truth, LEFT)[1]
    assert centre(coronal.truth, HEAD)[0] < centre(coronal.truth, RIGHT)[0]
    assert centre(axial.truth, FRONT)[0] < centre(axial.truth, RIGHT)[0]


def test_the_sagittal_plane_looks_to_the_left_of_the_page():
    view = pictures.views_of(body()).views[2]
    assert view.plane == "sagittal" and view.extent == (16.0, 72.0)
    assert centre(view.truth, FRONT)[1] < 8 and centre(view.truth, HEAD)[0] < 8


def test_planes_keep_their_size_in_mm():
    coronal, axial, _ = pictures.views_of(body()).views
    assert coronal.truth.shape == (24, 20) and coronal.extent == (40.0, 72.0)
    assert axial.truth.shape == (16, 20) and axial.extent == (40.0, 16.0)


def test_the_planes_with_most_structures_are_cut():
    coronal, axial, _ = pictures.views_of(body()).views
    assert set(np.unique(coronal.truth)) == {0, RIGHT, LEFT, HEAD}
    assert set(np.unique(axial.truth)) == {0, RIGHT, LEFT, FRONT}


def test_a_scan_without_any_label_has_views():
    empty = body()
    empty.scan.label[:] = 0
    assert len(pictures.views_of(empty).views) == 3


def test_best_median_and_worst_are_chosen():
    cases = [pictures.views_of(body(f"s{e}", errors=e)) for e in (2, 0, 4, 1, 3)]
    chosen = pictures.choose(cases)
    names = {rank: case.name for rank, case in chosen.items()}
    assert names == {"best": "s0", "median": "s2", "worst": "s4"}
    assert list(pictures.choose(cases[:1])) == ["best"]
    assert list(pictures.choose(cases[:2])) == ["best", "worst"]


@pytest.mark.parametrize("count", [1, 3])
def test_the_overview_is_a_picture_with_a_row_for_each_case(tmp_path, count):
    names = [f"s{e}_$x^$ {{" for e in range(count)]  # $ begins formulas in matplotlib
    cases = [pictures.views_of(body(name, errors=e)) for e, name in enumerate(names)]
    path = tmp_path / "overview.png"
    pictures.write_overview(path, cases)
    pixels = imread(path)
    assert pixels.shape[0] > 400 * count and pixels.shape[1] > 400
    assert pixels[..., :3].std() > 0.05
    assert list(tmp_path.iterdir()) == [path]


def test_neighbouring_classes_have_different_colours():
    palette = colours_of(118)
    assert palette.shape == (118, 3) and (palette[0] == 0).all()
    assert palette.min() >= 0 and palette.max() <= 1
    distance = np.linalg.norm(palette[1:] - palette[:-1], axis=1)
    ribs = slice(92, 116)
    assert distance[ribs].min() > 0.3
    assert len(np.unique(palette.round(3), axis=0)) == 118


def test_arteries_are_red_and_veins_blue():
    palette = colours_of(118)
    aorta, cava = palette[52], palette[63]
    assert aorta.argmax() == 0 and cava.argmax() == 2


def test_colours_follow_the_names_of_the_dataset():
    names = class_map.VERSIONS["v1"].names
    palette = colours_of(len(names), names)
    first = {name: palette[names.index(name)] for name in names}
    assert first["aorta"].argmax() == 0 and first["inferior_vena_cava"].argmax() == 2
    assert (colours_of(len(names)) != palette).any()  # ids of the releases differ
