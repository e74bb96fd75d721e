from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.data.sample import Sample
from swinsmt_jax.evaluation import averages, validation
from swinsmt_jax.inference.segmenter import batch_sharding
from swinsmt_jax.runtime import processes

CLASSES = 4


def config(**inference):
    return from_config_dict(
        {
            "model": {
                "name": "swin_unetr",
                "in_channels": 1,
                "out_channels": CLASSES,
                "feature_size": 12,
            },
            "data": {"root": "nowhere", "patch_shape": (32, 32, 32), "batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
            "inference": inference,
        }
    )


@jax.jit
def reads_the_image(windows):
    """A perfect network for images whose value is label / 10."""
    classes = jnp.arange(CLASSES)
    return -jnp.abs(windows * 10 - classes)


class InMemory(Sample):
    """A case that is its own scan."""

    def read(self):
        return self


@pytest.fixture
def cases(rng):
    """Three cases in memory: one with all classes, one without 3, one without 1."""
    truths = [rng.integers(0, CLASSES, (34, 40, 20)).astype(np.uint8) for _ in range(3)]
    truths[1][truths[1] == 3] = 0
    truths[2][truths[2] == 1] = 0
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    return [
        InMemory(truth * np.float32(204.8) - 1024, truth, affine, str(i))
        for i, truth in enumerate(truths)
    ]


def settings(**inference):
    own = config(**inference)
    return {"data": own.data, "inference": own.inference, "num_classes": CLASSES}


def segmented(cases):
    return [
        validation.segment_case(reads_the_image, case, **settings()) for case in cases
    ]


def test_a_perfect_network_scores_one(cases):
    result = validation.validate(reads_the_image, cases, **settings())
    assert result["dice"] == 1 and result["groups"] == {"organs": 1.0}
    assert result["false_positives"] == 0 and result["pictures"] == {}


def test_what_is_absent_and_predicted_is_counted_but_not_averaged(cases):
    def always_3(windows):
        return jnp.zeros((*windows.shape[:-1], CLASSES)).at[..., 3].set(1)

    result = validation.validate(jax.jit(always_3), cases, **settings())
    assert result["false_positives"] == 1  # in the case without class 3
    share = np.array([2 * (c.label == 3).mean() for c in cases if 3 in c.label])
    last = (share / (1 + share / 2)).mean()
    assert result["dice"] == pytest.approx(last / 3)  # classes 1 and 2 were missed
    assert result["groups"] == {"organs": result["dice"]}


def test_segmented_cases_carry_what_pictures_need(cases):
    for case, source in zip(segmented(cases), cases, strict=True):
        assert case.result.name == source.name and case.result.seconds > 0
        assert case.scan is source
        np.testing.assert_array_equal(case.prediction, source.label)
        assert case.prediction.dtype == np.uint8


@pytest.mark.parametrize("window_batch, batch", [(1, 8), (8, 8), (11, 16)])
def test_every_device_has_windows_of_a_batch(cases, window_batch, batch):
    seen = []

    def watched(windows):
        seen.append((len(windows), windows.sharding.num_devices))
        return reads_the_image(windows)

    sharding = batch_sharding()
    own = settings(window_batch=window_batch)
    result = validation.validate(watched, cases, sharding=sharding, **own)
    assert result["dice"] == 1.0 and set(seen) == {(batch, 8)}


def test_refuses_labels_that_the_network_lacks(cases):
    cases[1].label[0, 0, 0] = 9
    words = r"case '1' holds label 9.*out_channels is 4.*classes of the training"
    with pytest.raises(UserError, match=words):
        validation.validate(reads_the_image, cases, **settings())


def test_refuses_no_cases():
    with pytest.raises(UserError, match="at least one case"):
        validation.validate(reads_the_image, [], **settings())


def test_known_groups_drop_what_the_network_lacks():
    groups = {"a": (1, 2, 9), "b": (8, 9)}
    assert averages.known_groups(groups, 4) == {"a": (1, 2)}


def test_outside_the_foreground_is_background(cases):
    inside = np.zeros(cases[0].label.shape, bool)
    inside[2:30, :, 3:] = True
    cases[0].image[~inside] = -1024
    (case,) = segmented(cases[:1])
    assert case.scan.label[~inside].any()
    np.testing.assert_array_equal(case.prediction, np.where(inside, case.scan.label, 0))


def test_a_case_whose_logits_are_not_finite_is_named(cases):
    data, inference = config().data, config().inference
    with pytest.raises(UserError, match="case '0': the network's logits are NaN or"):
        validation.segment_case(
            jax.jit(lambda windows: windows * jnp.full(CLASSES, jnp.inf)),
            cases[0],
            data=data,
            inference=inference,
            num_classes=CLASSES,
        )


def test_pictures_are_of_the_first_cases_whichever_process_has_them(cases, monkeypatch):
    """Of two processes this is the second, and the first one's share is kept."""
    two = [replace(case, name=f"{i}{case.name}") for i in (0, 1) for case in cases]
    parts = []

    def validate(index):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        draw = lambda case, names: case.scan.name  # noqa: E731
        return validation.validate(reads_the_image, two, draw=draw, **settings())

    monkeypatch.setattr(processes, "run_on_all", lambda function: function())
    monkeypatch.setattr(processes, "gather", lambda own: parts.append(own) or [own] * 2)
    validate(0)
    monkeypatch.setattr(processes, "gather", lambda own: [parts[0], own])
    found = validate(1)["pictures"]
    names = [case.name for case in two[: validation.PICTURES]]
    assert found == {f"validation/{name}": name for name in names}
