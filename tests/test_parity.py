"""Every figure of `python -m benchmarks.parity`, within its tolerance."""

import numpy as np
import pytest

from benchmarks import parity


def check(figures):
    parity.print_table(figures)
    beyond = [f for f in figures if not f.value <= f.tolerance]
    assert figures and not beyond


@pytest.mark.slow
@pytest.mark.parametrize("name", parity.NETWORKS)
def test_network(shared, name):
    golden = dict(np.load(shared / "parity" / f"{name}.npz"))
    check(parity.network_figures(golden, parity.NETWORKS[name], name=name))


@pytest.mark.slow
@pytest.mark.parametrize("name", parity.ZOO)
def test_compared_network(shared, name):
    golden = dict(np.load(shared / "parity" / f"{name}.npz"))
    check(parity.zoo_figures(golden, name=name))


def test_modules(shared):
    check(parity.module_figures(dict(np.load(shared / "parity" / "modules.npz"))))


def test_loss_and_sliding_window(shared):
    golden = dict(np.load(shared / "parity" / "modules.npz"))
    check(parity.loss_and_window_figures(golden))
