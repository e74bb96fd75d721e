"""Dice against MONAI's."""

import numpy as np
import pytest

from swinsmt_jax.evaluation import metrics

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
monai_metrics = pytest.importorskip("monai.metrics")


def test_dice_is_that_of_monai(rng):
    prediction, truth = rng.integers(0, 7, (2, 9, 10, 11))
    truth[truth == 3] = 0  # absent
    prediction[prediction == 4] = 0  # missed
    counts = metrics.overlap_counts(prediction, truth, num_classes=7)

    def one_hot(label):
        return torch.from_numpy(np.moveaxis(np.eye(7)[label], -1, 0)[None])

    expected = monai_metrics.compute_dice(one_hot(prediction), one_hot(truth))
    found = metrics.dice(counts)
    np.testing.assert_allclose(found, expected.numpy()[0], rtol=1e-6)
    assert np.isnan(found[3]) and found[4] == 0
