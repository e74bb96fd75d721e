import dataclasses
from pathlib import Path

import numpy as np
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


def test_an_empty_batch_is_refused():
    with pytest.raises(checks.UserError, match="with at least one sample"):
        checks.image_batch((0, 32, 32, 32, 1), channels=1)


def test_typed_fields_settles_what_is_right():
    @dataclasses.dataclass(frozen=True)
    class Sizes:
        ratio: float
        sides: int | tuple[int, ...]
        names: tuple[str, ...]
        file: str

    sizes = Sizes(2, np.array([1, 2]), iter(["a"]), Path("/x"))
    checks.typed_fields("sizes", sizes)
    assert sizes == Sizes(2.0, (1, 2), ("a",), "/x")
    assert type(sizes.ratio) is float and type(sizes.sides[0]) is int


def test_one_of_names_the_nearest_choice():
    with pytest.raises(checks.UserError, match="Did you mean 'octants'"):
        checks.one_of("patch_merging", "octant", ("legacy", "octants"))
