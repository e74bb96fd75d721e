"""Every figure of `python -m benchmarks.parity`, within its tolerance."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import goldens, parity, parity_rows

ROOT = Path(parity.__file__).parents[1]


def check(figures):
    parity.print_table(figures)
    beyond = [f for f in figures if not f.value <= f.tolerance]
    assert figures and not beyond


def test_modules(shared):
    check(parity.module_figures(dict(np.load(shared / "parity" / "modules.npz"))))


def test_loss_and_sliding_window(shared):
    golden = dict(np.load(shared / "parity" / "modules.npz"))
    check(parity.loss_and_window_figures(golden))


def test_one_vs_all_and_the_rules_of_the_prior(shared):
    zoo = shared / "parity" / "zoo"
    repux, universal = (
        dict(np.load(zoo / f"{name}_small.npz"))
        for name in ("repux_net", "universal_model")
    )
    rows = parity_rows.updates_by_rule(goldens.part(repux, "update/"))
    rows += parity_rows.one_vs_all_loss(universal)
    check([parity.Figure("zoo", *row) for row in rows])


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_the_command_finds_all_figures_within_tolerance(shared):
    """Modules and whole networks, compiled as they are for users."""
    folder = f"--goldens={shared / 'parity'}"
    command = [sys.executable, "-m", "benchmarks.parity", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (*goldens.NETWORKS, *goldens.ZOO):
        assert name in done.stdout
