"""What a run that continues may do otherwise, and how that is told."""

import contextlib
import json

import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax.data import meta, pipeline
from swinsmt_jax.evaluation import validation
from swinsmt_jax.training import loop
from swinsmt_jax.training.checkpoint import load_model
from swinsmt_jax.training.checkpoint_folder import ranked, score_of
from swinsmt_jax.training.logs import read_rows

pytestmark = pytest.mark.usefixtures("tiny", "dataset")


def rates(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return {row["step"]: row["learning_rate"] for row in rows}


def cosine(done, steps):
    return 1e-2 * (1 + np.cos(np.pi * done / steps)) / 2


@pytest.mark.parametrize(
    ("extend", "after"),
    [
        ("stretch", [cosine(4, 8), cosine(7, 8)]),
        ("constant", [0, 0]),
        ("restart", [cosine(0, 4), cosine(3, 4)]),
    ],
)
def test_a_longer_run_has_the_rate_that_was_chosen(
    tmp_path, make_config, caplog, extend, after
):
    run = tmp_path / "run"
    loop.train(make_config(training={"num_steps": 4}), workdir=run)
    optimizer = {"learning_rate": 1e-2, "extend": extend}
    longer = make_config(training={"num_steps": 8}, optimizer=optimizer)
    loop.train(longer, workdir=run)
    found = rates(run)
    expected = [cosine(0, 4), cosine(3, 4), *after]
    np.testing.assert_allclose([found[s] for s in (1, 4, 5, 8)], expected, atol=1e-8)
    assert "num_steps grows from 4 to 8" in caplog.text
    assert f"optimizer.extend={extend}" in caplog.text
    *_, start = json.loads((run / "run.json").read_text())["starts"]
    assert start["changed"]["training.num_steps"] == [4, 8]
    caplog.clear()
    loop.train(longer, workdir=run)  # the same command changes nothing more
    assert "grows" not in caplog.text and "other settings" not in caplog.text


def test_what_may_change_midway_is_told(tmp_path, make_config, caplog):
    run = tmp_path / "run"
    loop.train(make_config(training={"num_steps": 2}), workdir=run)
    changed = make_config(
        training={"num_steps": 4},
        optimizer={"learning_rate": 1e-3},
        data={"augmentations": {"noise": {"probability": 0.5}}},
        inference={"overlap": 0.25},
    )
    loop.train(changed, workdir=run)
    assert rates(run)[3] < 1e-3
    *_, start = json.loads((run / "run.json").read_text())["starts"]
    assert start["changed"]["optimizer.learning_rate"] == [0.01, 0.001]
    assert start["changed"]["data.augmentations.noise.probability"] == [0.0, 0.5]
    assert start["changed"]["inference.overlap"] == [0.5, 0.25]
    assert "optimizer.learning_rate: 0.01 -> 0.001" in caplog.text
    assert "data.augmentations.noise.probability: 0.0 -> 0.5" in caplog.text


def test_a_batch_of_another_size_goes_on_where_the_last_one_ended(
    tmp_path, make_config, monkeypatch, caplog
):
    taken, make = [], pipeline.training_batches

    def recorded(*arguments, **options):
        with contextlib.closing(make(*arguments, **options)) as batches:
            for batch in batches:
                taken.extend(batch["image"])
                yield batch

    data = make_config().data
    cases = pipeline.find_cases(data, split="train")
    with contextlib.closing(make(data, cases, seed=0)) as stream:
        expected = [crop for _ in range(5) for crop in next(stream)["image"]]
    monkeypatch.setattr(pipeline, "training_batches", recorded)
    for steps, batch_size in ((2, 2), (3, 4), (5, 1)):
        config = make_config(
            data={"batch_size": batch_size}, training={"num_steps": steps}
        )
        loop.train(config, workdir=tmp_path / "run")
    np.testing.assert_array_equal(taken, expected)
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["first_crop"] for start in starts] == [1, 5, 9]
    assert starts[1]["changed"]["data.batch_size"] == [2, 4]
    assert "data.batch_size: 2 -> 4" in caplog.text


def test_other_validation_cases_score_anew(tmp_path, make_config, dataset, caplog):
    (dataset / "s9").mkdir()
    air = np.full((34, 33, 32), -1000, np.int16)
    label = np.random.default_rng(0).integers(0, 4, air.shape).astype(np.uint8)
    for file, array in (("ct", air), ("segmentations", label)):
        image = nib.Nifti1Image(array, np.diag([3.0, 3.0, 3.0, 1.0]))
        nib.save(image, dataset / "s9" / f"{file}.nii.gz")
    meta.add(dataset, {"s9": "val"})
    run = tmp_path / "run"

    def train(steps, cases):
        times = {"eval_every": 2, "checkpoint_every": 2}
        config = make_config(
            training={"num_steps": steps, "eval_cases": cases, **times},
            optimizer={"learning_rate": 1e-2, "extend": "constant"},
        )
        loop.train(config, workdir=run, validate=validation.validate)
        root = run / "checkpoints"
        return {step: score_of(root / str(step)) for step in ranked(root)}

    one = train(4, 1)
    both = train(6, 0)
    assert len({cases for _, cases in [*one.values(), *both.values()]}) == 2
    assert len({cases for _, cases in both.values()}) == 1
    assert {4, 6} <= set(both) and both[4][0] != one[4][0]
    for step in one:
        assert f"step {step} was scored on; it is scored again" in caplog.text
    assert load_model(run)[2]["step"] == next(iter(both))
