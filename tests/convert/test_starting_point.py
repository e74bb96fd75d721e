import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import convert, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import SwinUNETRConfig


@pytest.fixture(scope="module")
def make():
    def model(*, classes=3, seed=0):
        config = SwinUNETRConfig(1, classes, 12, depths=(1, 1, 1, 1), window_size=4)
        return models.create(config, rngs=nnx.Rngs(seed))

    return model


@pytest.fixture(scope="module")
def other(make):
    """The weights of a network with other classes."""
    return convert.to_torch(make(classes=5, seed=1))


def test_a_head_of_other_classes_stays_new_and_is_named(make, other):
    model = make()
    before = convert.to_torch(model)
    report = convert.load_what_fits(model, other)
    after = convert.to_torch(model)
    heads = {"out.conv.conv.weight", "out.conv.conv.bias"}
    assert set(report.other_shape) == heads and not report.missing and not report.unused
    for name, array in after.items():
        expected = before if name in heads else other
        np.testing.assert_array_equal(array, expected[name])
    words = "2 of another shape, so newly initialised: .*out.conv.conv.weight .5, 12"
    assert "newly initialised" in str(report)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(str(report))


def test_a_self_supervised_encoder_is_understood(make, other):
    encoder = {
        "module." + name.removeprefix("swinViT.").replace("linear", "fc"): array
        for name, array in other.items()
        if name.startswith("swinViT.")
    }
    encoder["module.rotation_head.weight"] = np.zeros((4, 4), np.float32)
    model = make()
    report = convert.load_what_fits(model, encoder)
    after = convert.to_torch(model)
    assert len(report.loaded) == len(encoder) - 1
    assert report.unused == ("swinViT.rotation_head.weight",)
    assert all(not name.startswith("swinViT.") for name in report.missing)
    for name in report.loaded:
        np.testing.assert_array_equal(after[name], other[name])


def test_weights_of_which_nothing_fits_are_refused(make):
    with pytest.raises(UserError, match="none of the 1 weights fits.*like w,"):
        convert.load_what_fits(make(), {"w": np.zeros(3)})
