"""The commands and snippets of docs/ run as they stand, on phantoms.

Flags that make networks, patches and runs small are appended; sbatch, srun and gcloud
are stand-ins that start the command here. Benchmarks have tests of their own; those of
docs/data.md and docs/extending.md are in tests/data and tests/test_extending.py.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from swinsmt_jax.phantoms.dataset import write_dataset

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("preprocess.py", "train.py", "evaluate.py", "predict.py")
RUN = (
    "--config.data.root=data/totalsegmentator --config.data.spacing=0 "
    "--config.data.batch_size=1 --config.optimizer.warmup_steps=1 "
    "--config.training.num_steps={steps} --config.model.remat=()"
)
SWIN = (
    "--config.model.feature_size=12 --config.model.num_experts=2 "
    "--config.model.window_size=(4,4,4) --config.data.patch_shape=(32,32,32)"
)
UNETR = (
    "--config.model.img_size=32 --config.model.hidden_size=24 "
    "--config.model.mlp_dim=24 --config.model.num_heads=2 "
    "--config.data.patch_shape=(32,32,32)"
)
STAND_INS = {
    "sbatch": 'shift; exec bash "$@"',  # --nodes=2
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@" $SMALL',
    "gcloud": 'eval "${!##--command=} $(printf "%q " $SMALL)"',
    "mpirun": """
shift 2  # -n 2; the variables are those of Open MPI 5.0.11
export OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2
export PMIX_NAMESPACE=prterun-localhost-$$@1
for rank in 0 1; do
    OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank "$@" $SMALL &
done
wait -n && wait -n""",
}
# What runs the commands of a page; a page with others is not there.
RUN_BY = {
    "cluster.md": "tests/test_docs_commands.py",
    "data.md": "tests/data/test_preprocess_howto.py",
    "multi_node.md": "tests/test_docs_commands.py",
    "networks.md": "tests/test_docs_commands.py",
    "own_data.md": "tests/test_own_data.py",
    "prediction.md": "tests/test_docs_commands.py",
    "training.md": "tests/test_docs_commands.py",
}
# Commands that no test runs as they stand: by what they begin with, and why.
NOT_RUN = {
    "pip install": "takes packages from the network",
    "python -m benchmarks.": "take long; tests/test_docs.py asks for their flags",
    "python launch/dask_slurm.py": "tests/test_manifests.py does, with an sbatch",
    "python embed.py": "needs weights from the network; tests/models/ makes the file",
}
slow = pytest.mark.slow


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text()
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", "") for block in found]


def lines(page, word):
    """The commands of a page that begin with a word, comments left out."""
    commands = "".join(blocks(page, "sh")).splitlines()
    return [c.split("  #")[0].rstrip() for c in commands if c.startswith(word)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout with data, and stand-ins for what a cluster has."""
    folder = tmp_path_factory.mktemp("docs")
    for name in (*SCRIPTS, "launch"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "swinsmt_jax" / "configs", folder / "configs")
    shutil.copy(folder / "configs/swin_smt_paper.py", folder / "configs/my.py")
    data = folder / "data" / "totalsegmentator"
    write_dataset(data, train=2, val=1, test=1, spacing=12, seed=0)
    case = max(path.name for path in data.glob("s*"))  # the last one is for the test
    for path in ("scan.nii.gz", f"scans/{case}.nii.gz", "more/s1.nii.gz"):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copy(data / case / "ct.nii.gz", folder / path)
    (folder / "bin").mkdir()
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "swinsmt_jax").symlink_to(folder)  # as on a TPU's host
    for name in "ab":
        (folder / "runs" / name).parent.mkdir(exist_ok=True)
        (folder / "runs" / name).symlink_to(folder / "runs" / "x")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The function that runs a command with appended flags."""
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    known = {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def run(command, small="", **environment):
        done = subprocess.run(
            ["bash", "-c", f"{command} {shlex.join(small.split())}"],
            cwd=folder,
            env=os.environ | known | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        return done.stdout

    return run


def slurm(small):
    """The environment of a job of one process, for the stand-ins and for JAX."""
    return {
        "SMALL": small,
        "PYTHON": sys.executable,
        **{"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost"},
        **{"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        **{"SLURM_STEP_NUM_TASKS": "1", "SLURM_GPUS_ON_NODE": "1"},
    }


@slow
def test_a_run_from_training_to_comparison(run, folder):
    small = f"{RUN} {SWIN}".format(steps=4)
    training = lines("training.md", "python")
    run(training[0], small)
    first, many = lines("prediction.md", "python predict.py")
    run(first)
    assert "2 segmented" in run(many)
    assert len(list((folder / "out").glob("*_preview.png"))) == 2
    own, files, both = lines("prediction.md", "python evaluate.py")
    for command in (own, files):
        assert "Dice (%)" in run(command)
    run(both)

    assert "--distributed=auto" in training[1]
    run(training[1], small, **slurm(""))  # is done, and says so
    assert "--start_from" in training[2]
    run(training[2], small)
    export, read = (c for c in training if "swinsmt_jax.convert" in c)
    run(export)
    run(read, small)
    assert "--profile=5" in training[-1]
    run(training[-1], f"{RUN} {SWIN}".format(steps=9))
    (snippet,) = blocks("training.md", "python")
    assert "('" in run(f"python -c {shlex.quote(snippet)}")


@pytest.fixture
def start(folder):
    """The function that starts a command, which ends with the test."""
    started = []

    def start(command):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        known = {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=folder, env=os.environ | known
        )
        started.append(process)

    yield start
    for process in reversed(started):
        process.terminate()
        process.wait(timeout=60)


@slow
def test_scans_on_workers_of_dask(run, start, folder):
    run(lines("training.md", "python")[0], f"{RUN} {SWIN}".format(steps=4))
    scheduler, worker = lines("cluster.md", "dask")
    (predict,) = lines("cluster.md", "python predict.py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start(scheduler.replace("8786", port) + " --host=127.0.0.1 --no-dashboard")
    place = {"8786": port, "host:": "127.0.0.1:", "/shared/": f"{folder}/dask_"}
    (folder / "dask_scans").symlink_to(folder / "scans")
    for before, after in place.items():
        worker, predict = (c.replace(before, after) for c in (worker, predict))
    start(worker.replace("--nworkers=4", "--nworkers=1") + " --no-dashboard")
    assert "1 segmented" in run(predict)
    assert len(list((folder / "dask_out").glob("*.nii.gz"))) == 1


@slow
def test_jobs_on_a_cluster(run, folder):
    each = RUN.replace("--config.data.batch_size=1 ", "").format(steps=1)
    small = f"{each} {SWIN} --config.model.depths=(1,1,1,1) --workdir=runs/{{}}"
    (training,) = lines("training.md", "sbatch")
    per_gpu, per_node = lines("multi_node.md", "sbatch")
    assert training == per_gpu
    for number, command in enumerate((per_gpu, per_node)):
        run(command, **slurm(small.format(f"job{number}")))
    (pod,) = lines("multi_node.md", "gcloud")
    run(pod, **slurm(small.format("pod")))
    (mpi,) = lines("multi_node.md", "mpirun")
    run(mpi, SMALL=small.format("mpi"))
    first, second = lines("multi_node.md", "python")
    given = shlex.join(small.format("hosts").split())
    address = f" {given} --coordinator_address=localhost:4712"
    run(f"{first + address} & {second + address} && wait $!")
    for name in ("job0", "job1", "pod", "mpi", "hosts"):
        assert (folder / "runs" / name / "checkpoints" / "1").is_dir(), name


def test_a_test_runs_each_command():
    """Or it is among those that none can, with the reason."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        left = [
            line
            for block in blocks(page.name, "sh")
            for line in block.splitlines()
            if line and not line.startswith(tuple(NOT_RUN))
        ]
        assert not left or page.name in RUN_BY, (page.name, left)
    for test in RUN_BY.values():
        assert "docs" in (ROOT / test).read_text()


@slow
def test_stores_and_one_scan(run, folder):
    raw = folder / "data" / "Totalsegmentator_dataset_v201"
    raw.symlink_to(folder / "data" / "totalsegmentator")
    make, train = lines("data.md", "python")[:2]
    run(make, "--spacing=12 --workers=1")
    size = "--config.data.batch_size=1 --config.training.num_steps=1 "
    size += "--config.optimizer.warmup_steps=1 --config.model.remat=()"
    run(train, f"{size} {SWIN} --config.data.spacing=0 --workdir=runs/of_store")
    case = next((folder / "data" / "totalsegmentator").glob("s*"))
    shutil.copy(case / "ct.nii.gz", folder / "ct.nii.gz")
    shutil.copy(case / "segmentations.nii.gz", folder / "labels.nii.gz")
    (scan,) = lines("data.md", "python -m swinsmt_jax.data.import_scan")
    run(scan)
    train, evaluate = (
        next(c for c in lines("data.md", f"python {name}.py") if "real_scan" in c)
        for name in ("train", "evaluate")
    )
    run(train, f"{size} {SWIN}")
    assert "Dice (%)" in run(evaluate)


@slow
def test_another_network(run):
    train, *_ = lines("networks.md", "python train.py")
    (evaluate,) = lines("networks.md", "python evaluate.py")
    run(train, f"{RUN} {UNETR}".format(steps=1))
    assert "Dice (%)" in run(evaluate)
