"""Reading crops and writing checkpoints use tensorstore at once, for long."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from swinsmt_jax.config import DataConfig
from swinsmt_jax.data import pipeline, preprocess
from swinsmt_jax.phantoms import dataset as phantom

STEPS, EVERY = 300, 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    source = tmp_path_factory.mktemp("raw") / "data"
    phantom.write_dataset(source, train=4, val=0, test=0, spacing=8.0, seed=0)
    root = tmp_path_factory.mktemp("store")
    assert preprocess.preprocess(source, root) == {}
    return root


def checksums(config, *, save=None):
    """Sums of each batch of the stream; `save(step)` is called among them."""
    cases = pipeline.find_cases(config, split="train")
    batches, found = pipeline.training_batches(config, cases, seed=0), []
    try:
        for step in range(STEPS):
            batch = next(batches)
            sums = (batch["image"].sum(dtype=np.float64), batch["label"].sum())
            found.append(tuple(map(float, sums)))
            if save and step % EVERY == 0:
                save(step)
    finally:
        batches.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_stay_the_same_while_checkpoints_are_written(root, tmp_path, workers):
    config = DataConfig(
        str(root), patch_shape=(32, 32, 32), batch_size=2, num_workers=workers
    )
    expected = checksums(config)
    state = {"a": jnp.arange(2.0**20), "b": jnp.ones((512, 1024))}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path / "checkpoints", options=options) as manager:

        def save(step):
            manager.save(step, args=ocp.args.StandardSave(state), force=True)

        assert checksums(config, save=save) == expected
        manager.wait_until_finished()
        last = manager.latest_step()
        assert last == (STEPS - 1) // EVERY * EVERY
        restored = manager.restore(last, args=ocp.args.StandardRestore(state))
    np.testing.assert_array_equal(restored["a"], state["a"])
