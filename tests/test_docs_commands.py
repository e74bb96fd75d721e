"""The commands and snippets of docs/ run as they stand, on phantoms.

Flags that make networks, patches and runs small are appended; sbatch, srun and gcloud
are stand-ins that start the command here. `TESTED` says which test runs which command.
"""

import fnmatch
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from swinsmt_jax.inference.totalsegmentator import TASKS
from swinsmt_jax.phantoms.dataset import write_dataset
from tests.inference.test_totalsegmentator import scan, write_model
from tests.models.test_universal_model import TORCH, TRANSFORMERS

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
PYRAMID = (
    "--config.model.features_per_stage=(4,6) --config.model.strides=(1,2) "
    "--config.model.n_conv_per_stage=1 --config.model.n_conv_per_stage_decoder=1 "
    "--config.data.patch_shape=(16,16,16)"
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
# The commands of each page that a test here runs, by a pattern that only one has.
# Tests take theirs by `commands_of`, in this order.
TESTED = {
    "test_a_run_from_training_to_comparison": {
        "training.md": (
            "python train.py *swin_smt_paper.py --workdir=runs/x",
            "python train.py *--distributed=auto",
            "python train.py *--start_from=runs/x",
            "python -m swinsmt_jax.convert to_torch *",
            "python -m swinsmt_jax.convert from_torch *",
            "python train.py *--profile=5",
        ),
        "prediction.md": (
            "python predict.py *--input=scan.nii.gz *",
            "python predict.py *--input=scans/,*",
            "python evaluate.py --workdir=*",
            "python evaluate.py --predictions=*",
            "python evaluate.py --compare *",
        ),
    },
    "test_scans_on_workers_of_dask": {
        "cluster.md": ("dask scheduler *", "dask worker *", "python predict.py *"),
    },
    "test_jobs_on_a_cluster": {
        "training.md": ("sbatch *",),
        "multi_node.md": (
            "sbatch *_per_gpu.sh *",
            "sbatch *_per_node.sh *",
            "gcloud *",
            "mpirun *",
            "python train.py *--process_id=0 *",
            "python train.py *--process_id=1 *",
        ),
    },
    "test_stores_and_one_scan": {
        "data.md": (
            "python preprocess.py *",
            "python train.py *swin_smt_paper.py *",
            "python -m swinsmt_jax.data.import_scan *",
            "python train.py *real_scan.py *",
            "python evaluate.py *real_scan *",
        ),
    },
    "test_other_networks": {
        "networks.md": (
            "python train.py *unetr.py *",
            "python evaluate.py *",
            "python train.py *dints.py *",
            "python embed.py *",
            "python train.py *universal_model.py *",
        ),
    },
    "test_models_of_nnunet": {
        "nnunet.md": (
            "swinsmt convert --to=nnunet *",
            "swinsmt predict --nnunet=*",
            "python evaluate.py --nnunet=*",
            "swinsmt predict --totalsegmentator=*",
            "python preprocess.py *--nnunet=*",
            "python train.py *nnunet_finetune.py *",
        ),
    },
}
# Sections whose blocks a test runs one after the other, whatever is in them.
WHOLE = {
    ("data.md", "## Your own data"): "tests/data/test_preprocess_howto.py",
    ("own_data.md", "# Your own data"): "tests/test_own_data.py",
}
# Commands that no test runs as they stand: by what they begin with, and why.
NOT_RUN = {
    "pip install": "takes packages from the network",
    "python -m benchmarks.": "take long; tests/test_docs.py asks for their flags",
    "python launch/dask_slurm.py": "tests/test_manifests.py does, with an sbatch",
}
# Snippets of Python: words of each, and what runs it.
SNIPPETS = {
    "networks.md": {
        "search_code.pth": "tests/reference/test_dints.py",
        "CLIPModel": "tests/models/test_universal_model.py",
    },
    "nnunet.md": {"load_nnunet": "tests/test_docs_commands.py"},
    "training.md": {"ProfileData": "tests/test_docs_commands.py"},
}
LANGUAGES = ("sh", "python", "json", "text", "bibtex")
slow = pytest.mark.slow


def blocks(text, language):
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", "") for block in found]


def page_of(name):
    return (ROOT / "docs" / name).read_text()


def commands(page):
    """The commands of a page, but for the sections in `WHOLE`, without comments."""
    text = f"\n{page_of(page)}"
    for heading in (heading for name, heading in WHOLE if name == page):
        before, after = text.split(f"\n{heading}")
        text = before + "".join(after.partition(f"\n{heading.split()[0]} ")[1:])
    lines = "".join(blocks(text, "sh")).splitlines()
    return [line.split("  #")[0].rstrip() for line in lines if line]


def commands_of(test):
    """The commands that a test runs, in the order of `TESTED`."""
    for page, patterns in TESTED[test].items():
        for pattern in patterns:
            (command,) = fnmatch.filter(commands(page), pattern)
            yield command


def checkout(folder):
    """Make a folder a checkout with data, and stand-ins for what a cluster has."""
    for name in (*SCRIPTS, "launch"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "swinsmt_jax" / "configs", folder / "configs")
    shutil.copy(folder / "configs/swin_smt_paper.py", folder / "configs/my.py")
    data = folder / "data" / "totalsegmentator"
    write_dataset(data, train=2, val=1, test=1, spacing=12, seed=0)
    (folder / "bin").mkdir()
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)


def runner(folder):
    """Return the function that runs a command with appended flags in a checkout."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout whose runs and scans have the names of the pages."""
    folder = tmp_path_factory.mktemp("docs")
    checkout(folder)
    data = folder / "data" / "totalsegmentator"
    case = max(path.name for path in data.glob("s*"))  # the last one is for the test
    for path in ("scan.nii.gz", f"scans/{case}.nii.gz", "more/s1.nii.gz"):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copy(data / case / "ct.nii.gz", folder / path)
    (folder / "swinsmt_jax").symlink_to(folder)  # as on a TPU's host
    for name in "ab":
        (folder / "runs" / name).parent.mkdir(exist_ok=True)
        (folder / "runs" / name).symlink_to(folder / "runs" / "x")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The function that runs a command with appended flags."""
    return runner(folder)


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
    train, again, tune, export, read, profile, *rest = commands_of(
        "test_a_run_from_training_to_comparison"
    )
    first, many, own, files, both = rest
    run(train, small)
    run(first)
    assert "2 segmented" in run(many)
    assert len(list((folder / "out").glob("*_preview.png"))) == 2
    for command in (own, files):
        assert "Dice (%)" in run(command)
    run(both)

    run(again, small, **slurm(""))  # is done, and says so
    run(tune, small)
    run(export)
    run(read, small)
    run(profile, f"{RUN} {SWIN}".format(steps=9))
    (snippet,) = blocks(page_of("training.md"), "python")
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
    train, *_ = commands_of("test_a_run_from_training_to_comparison")
    run(train, f"{RUN} {SWIN}".format(steps=4))
    scheduler, worker, predict = commands_of("test_scans_on_workers_of_dask")
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
    training, *rest = commands_of("test_jobs_on_a_cluster")
    per_gpu, per_node, pod, mpi, first, second = rest
    assert training == per_gpu
    for number, command in enumerate((per_gpu, per_node)):
        run(command, **slurm(small.format(f"job{number}")))
    run(pod, **slurm(small.format("pod")))
    run(mpi, SMALL=small.format("mpi"))
    given = shlex.join(small.format("hosts").split())
    address = f" {given} --coordinator_address=localhost:4712"
    run(f"{first + address} & {second + address} && wait $!")
    for name in ("job0", "job1", "pod", "mpi", "hosts"):
        assert (folder / "runs" / name / "checkpoints" / "1").is_dir(), name


PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_a_test_runs_each_command():
    """Or it is among those that none can, with the reason."""
    patterns = {page: [] for page in PAGES}
    for test, listed in TESTED.items():
        assert callable(globals()[test]) and len(list(commands_of(test)))
        for page, own in listed.items():
            patterns[page] += own
    for page in PAGES:
        left = [c for c in commands(page) if not c.startswith(tuple(NOT_RUN))]
        for command in left:
            matching = [p for p in patterns[page] if fnmatch.fnmatchcase(command, p)]
            assert len(matching) == 1, (page, command, matching)
        assert len(left) == len(patterns[page]), page
    for (page, _), test in WHOLE.items():
        assert page in (ROOT / test).read_text()


def test_a_test_runs_each_snippet():
    tests = "".join(f.read_text() for f in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        if page == "extending.md":  # a recipe in each section
            for section in page_of(page).split("\n## "):
                heading = section.splitlines()[0]
                reading = rf'recipes\.\w+\("{heading}"\)|\^## {heading}\\n'
                assert "```python" not in section or re.search(reading, tests), heading
            continue
        snippets = blocks(page_of(page), "python")
        assert len(snippets) == len(SNIPPETS.get(page, ())), page
        for words, test in SNIPPETS.get(page, {}).items():
            assert sum(words in snippet for snippet in snippets) == 1, words
            assert words in (ROOT / test).read_text()


def test_blocks_have_a_language_that_is_known():
    """So none is passed over by the tests above, or by those of the README."""
    for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        fences = re.findall(r"^[ >]*(?:```|~~~).*$", page.read_text(), re.MULTILINE)
        assert set(fences[1::2]) <= {"```"}, page.name
        opened = {f"```{language}" for language in LANGUAGES}
        assert set(fences[::2]) <= opened, (page.name, set(fences[::2]) - opened)


@slow
def test_stores_and_one_scan(run, folder):
    raw = folder / "data" / "Totalsegmentator_dataset_v201"
    raw.symlink_to(folder / "data" / "totalsegmentator")
    make, train, scan, train_on_scan, evaluate = commands_of("test_stores_and_one_scan")
    run(make, "--spacing=12 --workers=1")
    size = "--config.data.batch_size=1 --config.training.num_steps=1 "
    size += "--config.optimizer.warmup_steps=1 --config.model.remat=()"
    run(train, f"{size} {SWIN} --config.data.spacing=0 --workdir=runs/of_store")
    case = next((folder / "data" / "totalsegmentator").glob("s*"))
    shutil.copy(case / "ct.nii.gz", folder / "ct.nii.gz")
    shutil.copy(case / "segmentations.nii.gz", folder / "labels.nii.gz")
    run(scan)
    run(train_on_scan, f"{size} {SWIN}")
    assert "Dice (%)" in run(evaluate)


@slow
def test_other_networks(run, folder):
    unetr, evaluate, dints, embed, universal = commands_of("test_other_networks")
    run(unetr, f"{RUN} {UNETR}".format(steps=1))
    assert "Dice (%)" in run(evaluate)
    small = f"{RUN} --config.data.patch_shape=(32,32,32)".format(steps=1)
    shutil.copy(ROOT / "tests/models/dints_two_blocks.json", folder / "searched.json")
    run(dints, f"{small} --config.model.channel_mul=0.125")

    clip = folder / "clip"  # stand-ins for the network and its libraries
    clip.mkdir()
    (clip / "torch.py").write_text(TORCH)
    (clip / "transformers.py").write_text(TRANSFORMERS)
    scripts = blocks(page_of("networks.md"), "python")
    (script,) = (script for script in scripts if "CLIPModel" in script)
    (folder / "embed.py").write_text(script)
    run(embed, PYTHONPATH=f"{clip}:{ROOT}")
    size = "--config.model.feature_size=12 --config.model.window_size=(4,4,4)"
    size += " --config.model.groups=4 --config.model.hidden=8"
    run(universal, f"{small} {size}")
    for name in ("dints_own", "universal_text"):
        assert (folder / "runs" / name / "checkpoints" / "1").is_dir(), name


@slow
def test_models_of_nnunet(tmp_path):
    """The page's last command makes the folder that its others use."""
    checkout(tmp_path)
    run = runner(tmp_path)
    convert, predict, evaluate, total, preprocess, tune = commands_of(
        "test_models_of_nnunet"
    )
    small = f"{RUN} {PYRAMID}".format(steps=1)
    train = "python train.py --config=configs/nnunet_plain.py --workdir=runs/x"
    run(train, f"{small} --config.data.spacing=12")
    run(convert)
    scan(tmp_path / "scan.nii.gz", 2.0)
    assert "1 segmented" in run(predict)
    (snippet,) = blocks(page_of("nnunet.md"), "python")
    run(f"python -c {shlex.quote(snippet)}")
    assert (tmp_path / "labels.nii.gz").is_file()
    for name in ("x", "mine"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data" / "totalsegmentator")
    assert "Dice (%)" in run(evaluate)

    weights = tmp_path / "home/.totalsegmentator/nnunet/results"
    weights.mkdir(parents=True)
    for number, classes in TASKS[1.5].items():
        write_model(weights, number, 1.5, classes)
    said = run(total, "--overwrite", HOME=str(tmp_path / "home"))
    assert "1 segmented" in said

    (tmp_path / "FOLDER").symlink_to(tmp_path / "Dataset001_X")
    run(preprocess, "--workers=1")
    steps = "--config.training.num_steps=1 --config.optimizer.warmup_steps=1"
    run(tune, f"{steps} --config.data.batch_size=1")
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "1").is_dir()
