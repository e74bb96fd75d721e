"""What two processes of a training do at signals, and with others who come."""

import re
import shutil
import signal
import subprocess
import time

import nibabel as nib
import numpy as np
import pytest

from benchmarks import soak_processes as soak
from swinsmt_jax.training.checkpoint_folder import steps_of

pytestmark = pytest.mark.slow
LIMIT = 300  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    soak.make_data(folder)
    return folder


@pytest.fixture
def begin(folder, request):
    """Start two processes in a workdir of the test's name; (workdir, processes)."""
    started = []

    def begin(*flags, **options):
        workdir = folder / re.sub(r"\W", "_", request.node.name)  # no brackets
        started.append(soak.begin(folder, workdir, 2, flags=flags, **options))
        return workdir, started[-1]

    yield begin
    for processes in started:
        processes.wait(0.1)


def until(condition, processes):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert not processes.ended() and time.monotonic() < deadline, said(processes)
        time.sleep(0.05)


def said(processes):
    return [processes.said(i).read_text() for i in range(processes.count)]


def logged(workdir, count, processes):
    until(lambda: len(soak.losses(workdir)) >= count, processes)


@pytest.mark.parametrize(
    "number, to, status",
    [
        (signal.SIGINT, [0, 1], 130),
        (signal.SIGUSR1, [1], 75),
        (signal.SIGTERM, [0], 75),
    ],
)
def test_a_signal_ends_both_after_the_same_step_saved(begin, number, to, status):
    workdir, processes = begin("--config.training.checkpoint_every=60")
    logged(workdir, 2, processes)
    processes.send(number, to)
    statuses, _ = processes.wait(LIMIT)
    assert statuses == [status] * 2, said(processes)
    assert f"{number.name} received: stopped after step" in said(processes)[0]
    (step,) = steps_of(workdir / "checkpoints")
    assert step == max(soak.losses(workdir))
    assert (workdir / "requeue").exists() == (status == 75)


def test_a_signal_in_compilation_ends_both_after_the_first_step(begin):
    workdir, processes = begin()
    until(lambda: "the first one compiles" in said(processes)[0], processes)
    processes.send(signal.SIGINT, [1])
    statuses, _ = processes.wait(LIMIT)
    assert statuses == [130, 130], said(processes)
    (step,) = steps_of(workdir / "checkpoints")
    assert step == max(soak.losses(workdir))


def test_a_second_signal_ends_at_once_in_compilation(begin):
    _, processes = begin()
    until(lambda: "the first one compiles" in said(processes)[0], processes)
    for _ in range(2):
        processes.send(signal.SIGINT, [0, 1])
        time.sleep(0.2)
    statuses, seconds = processes.wait(LIMIT)
    assert statuses == [130, 130] and seconds < 20, said(processes)
    assert "second SIGINT: ended at once" in said(processes)[0]


def test_a_signal_in_validation_ends_both(begin):
    workdir, processes = begin("--config.training.eval_every=2")
    until(lambda: (workdir / "checkpoints" / "2").exists(), processes)
    processes.send(signal.SIGTERM, [1])
    statuses, _ = processes.wait(LIMIT)
    assert statuses == [75, 75], said(processes)
    assert max(steps_of(workdir / "checkpoints")) == max(soak.losses(workdir))


def test_a_second_run_on_the_port_or_in_the_workdir_is_refused(begin, folder):
    workdir, processes = begin("--config.training.num_steps=1000")
    logged(workdir, 2, processes)
    for other in (
        soak.begin(folder, folder / "other", 2, port=processes.port),
        soak.begin(folder, workdir, 2),
    ):
        statuses, _ = other.wait(LIMIT)
        assert statuses == [2, 2], said(other)
    assert not (folder / "other").exists()
    before = len(soak.losses(workdir))
    logged(workdir, before + 2, processes)
    processes.send(signal.SIGTERM, [0])
    assert processes.wait(LIMIT)[0] == [75, 75]


def test_other_validation_cases_in_one_process_are_refused(begin, folder):
    shutil.copytree(folder / "data", folder / "other_data")
    rows = (folder / "data" / "meta.csv").read_text().splitlines()
    (case,) = (row.split(";")[0] for row in rows if row.endswith(";val"))
    file = folder / "other_data" / case / "ct.nii.gz"
    scan = nib.load(file)
    voxels = np.asarray(scan.dataobj).copy()
    voxels[5, 5, 5] += 1
    nib.save(nib.Nifti1Image(voxels, scan.affine, scan.header), file)
    workdir, processes = begin(of_last=[f"--config.data.root={folder}/other_data"])
    statuses, _ = processes.wait(LIMIT)
    assert statuses == [2, 2]
    assert "the fingerprint of the validation cases" in said(processes)[0]
    assert not workdir.exists()


def test_folders_that_are_not_shared_are_named_under_slurm(folder):
    """The launcher says that both belong together, so both are refused at once."""
    slurm = {
        **{"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost"},
        **{"SLURM_NTASKS": "2", "SLURM_LOCALID": "0"},
    }
    processes = [
        subprocess.Popen(
            [*soak.command(folder, folder / f"node{i}"), "--distributed=auto"],
            **{"cwd": soak.ROOT, "stderr": subprocess.PIPE, "text": True},
            env=soak.environment(folder) | slurm | {"SLURM_PROCID": str(i)},
        )
        for i in (0, 1)
    ]
    for process in processes:
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 2
        assert "is not the same folder for all processes" in err.splitlines()[-1]
