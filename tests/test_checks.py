import pytest

from swinsmt_jax import checks


def test_spatial_shape_names_shape_rule_and_next_valid_shape():
    with pytest.raises(checks.UserError) as error:
        checks.spatial_shape("image patch", (96, 100, 96), 32)
    assert str(error.value) == (
        "image patch has shape (96, 100, 96), but every side must be a multiple of 32, "
        "the total stride of the encoder; the next valid shape is (96, 128, 96)."
    )


@pytest.mark.parametrize("shape", [(0, 32, 32), (-32, 32, 32), (31, 32, 32)])
def test_spatial_shape_refuses(shape):
    with pytest.raises(checks.UserError, match=r"next valid shape is \(32, 32, 32\)"):
        checks.spatial_shape("patch", shape, 32)


def test_one_of_names_the_nearest_choice():
    with pytest.raises(checks.UserError, match="Did you mean 'octants'"):
        checks.one_of("patch_merging", "octant", ("legacy", "octants"))
