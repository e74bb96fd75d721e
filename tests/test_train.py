import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from swinsmt_jax.checks import UserError
from swinsmt_jax.commands import train
from swinsmt_jax.config import from_config_dict, to_dict
from swinsmt_jax.runtime import memory, startup

ROOT = Path(__file__).parents[1]
# of ml_collections, when it loads a config file
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line; config_flags finds the overrides in sys.argv."""

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        values = flags.FlagValues()
        train.define_flags(values)
        startup.parse(sys.argv, values)
        return values

    return parse


def test_flags_set_keys_of_groups_that_the_config_file_lacks(parse, tmp_path):
    file = tmp_path / "short.py"
    file.write_text(
        "from swinsmt_jax.configs import demo\n"
        "def get_config():\n"
        "    config = demo.get_config()\n"
        "    del config.mesh, config.data.augmentations\n"
        "    return config\n"
    )
    flags = [f"--config={file}", "--workdir=x", "--config.mesh.expert=2"]
    flags += ["--config.data.augmentations.noise.probability=0.2"]
    flags += ["--config.data.zoom_range=(1.1, 1.2)", "--config.data.noise_most=0.3"]
    config = from_config_dict(parse(*flags).config)
    assert config.mesh.expert == 2
    noise = config.data.augmentations.noise
    assert (noise.probability, noise.std_max) == (0.2, 0.3)
    assert config.data.augmentations.zoom.factor == (1.1, 1.2)
    with pytest.raises(UserError, match="config group 'nois'.*Did you mean 'noise'"):
        parse(*flags, "--config.data.augmentations.nois.probability=0.2")


def test_the_config_of_a_run_is_one_that_can_be_changed(parse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    python = from_config_dict(parse("--config=configs/demo.py", "--workdir=x").config)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(python)))
    flags = ["--config=~/config.json", "--workdir=x"]
    assert from_config_dict(parse(*flags).config) == python
    flags += ["--config.data.patch_shape=(32, 32, 64)", "--config.data.root=~/data"]
    changed = from_config_dict(parse(*flags).config).data
    assert changed.patch_shape == (32, 32, 64)
    assert changed.root == str(tmp_path / "data")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config"):
        parse(*flags)


def test_the_command_line_changes_the_config(parse, tmp_path):
    values = parse(
        f"--config={ROOT}/configs/swin_smt_e4.py",
        f"--workdir={tmp_path}",
        "--config.optimizer.learning_rate=3e-4",
        "--config.data.patch_shape=(96, 96, 64)",
    )
    assert values.config.optimizer.learning_rate == 3e-4
    assert values.config.data.patch_shape == (96, 96, 64)
    assert values.config.model.num_experts == 4
    assert values.workdir == str(tmp_path)


def test_the_command_line_sets_what_the_file_leaves_out(parse):
    values = parse(
        f"--config={ROOT}/configs/swin_smt_e4.py",
        "--workdir=x",
        "--config.training.ema_decay=0.99",
        "--config.optimizer.freeze=('^swinViT/',)",
        "--config.model.routing=dense",
    )
    config = from_config_dict(values.config)
    assert config.training.ema_decay == 0.99
    assert config.optimizer.freeze == ("^swinViT/",)
    assert config.model.routing == "dense"


def test_a_key_that_no_config_has_is_refused(parse):
    values = parse(
        f"--config={ROOT}/configs/demo.py",
        "--workdir=x",
        "--config.optimizer.learnin_rate=1",
    )
    with pytest.raises(UserError, match="optimizer.learnin_rate.*'learning_rate'"):
        from_config_dict(values.config)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.optimzer.b1=1", "group 'optimzer'; the groups are model, data,"),
        ("--config.optimzer.b1=1", "Did you mean 'optimizer'?"),
        ("--config.optimizer.b1=abc", "could not convert string to float: 'abc'"),
        ("--config.data.batch_size=2.5", "invalid literal for int"),
        ("--config=configs/nothing.py", "no config of that name; it has demo, "),
        ("--config=dmo", "Did you mean 'demo'?"),
        ("--config=mine/demo.py", "mine/demo.py"),
        ("--wokdir=x", "Unknown command line flag 'wokdir'"),
    ],
)
def test_what_the_command_line_cannot_mean_is_refused(parse, argument, words):
    with pytest.raises(UserError) as error:
        parse(f"--config={ROOT}/configs/demo.py", "--workdir=x", argument)
    assert words in str(error.value)


def test_of_a_flag_given_twice_the_last_one_counts(parse):
    """Of tuples too, which ml_collections would join."""
    config = parse(
        *(f"--config={ROOT}/configs/demo.py", "--workdir=x"),
        *("--config.optimizer.freeze=('head',)", "--config.data.patch_shape=(64,)"),
        *("--config.training.num_steps=7", "--config.training.num_steps", "9"),
        *("--config.data.patch_shape", "(32, 64, 32)", "--config.data.cache=false"),
        "--config.optimizer.freeze=('decoder',)",
    ).config
    assert config.optimizer.freeze == ("decoder",)
    assert config.data.patch_shape == (32, 64, 32)
    assert config.training.num_steps == 9 and not config.data.cache


@pytest.mark.parametrize("name", ["demo", "configs/demo.py"])
def test_a_config_of_the_package_is_found_by_its_name(parse, name, tmp_path):
    with contextlib.chdir(tmp_path):
        config = parse(f"--config={name}", "--workdir=x").config
    assert from_config_dict(config).training.num_steps == 1300


@pytest.mark.parametrize("flag", ["--config=configs/demo.py", "--workdir=x"])
def test_both_flags_are_required(parse, flag):
    with pytest.raises(UserError, match="must have a value"):
        parse(flag)


def test_a_group_of_augmentations_is_named_by_its_whole_path(parse):
    given = f"--config={ROOT}/configs/demo.py", "--workdir=x"
    with pytest.raises(UserError, match="Did you mean 'data.augmentations.zoom'"):
        parse(*given, "--config.zoom.probability=0.2")


@pytest.mark.parametrize("base", ["demo", "real_scan", "nnunet_plain", "file"])
@pytest.mark.parametrize(
    ("given", "sides"),
    [("1.5,1.5,3", (1.5, 1.5, 3.0)), ("(2, 2.0, 4)", (2.0, 2.0, 4.0)), ("2", 2.0)],
)
def test_a_voxel_has_one_side_or_three(parse, tmp_path, base, given, sides):
    where = f"configs/{base}.py"
    if base == "file":
        where = tmp_path / "mine.py"
        text = (ROOT / "swinsmt_jax/configs/swin_smt_paper.py").read_text()
        assert "config_dict.FieldReference(1.5, object)" in text
        where.write_text(text.replace("config_dict.FieldReference(1.5, object)", "1.5"))
    flags = parse(f"--config={where}", "--workdir=x", f"--config.data.spacing={given}")
    assert from_config_dict(flags.config).data.spacing == sides


@pytest.mark.parametrize("devices", [1, 2])
def test_what_helps_against_lack_of_memory_can_be_given(parse, devices):
    given = [f"--config={ROOT}/configs/demo.py", "--workdir=x"]
    given.append("--config.data.batch_size=4")
    given.append("--config.data.patch_shape=(32, 64, 32)")  # can be smaller
    config = from_config_dict(parse(*given).config)
    said = memory.what_helps(
        config.model, config.data, accumulate=1, devices=devices, expert=1
    )
    found = [word.rstrip(",.;") for word in shlex.split(said) if "--config" in word]
    assert len(found) == 5 + 2 * (devices == 2)
    for flag in found:
        changed = from_config_dict(parse(*given, flag).config)
        assert changed != config or flag == "--config.mesh.data=-1"
        if "accumulate" in flag:
            assert changed.training.accumulate == 2


def test_help_lists_all_flags():
    said = run("--help").stdout
    names = ("config", "workdir", "start_from", "profile", "distributed")
    names += ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    assert all(f"--{name}:" in said or f"--[no]{name}:" in said for name in names), said


def run(*arguments):
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_user_errors_end_the_script_in_one_line(tmp_path):
    missing = tmp_path / "missing"
    done = run(
        "--config=configs/demo.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.root={missing}",
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"train.py: data folder {missing} does not exist")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_processes_that_nobody_started_are_a_user_error(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    workdir = f"--workdir={tmp_path}"
    done = run("--config=configs/demo.py", workdir, "--distributed=auto")
    assert done.returncode == 2, done.stderr
    waiting, error = done.stderr.splitlines()
    assert "waiting for the other processes as JAX finds them" in waiting
    assert error.startswith("train.py: --distributed=auto found no cluster")


@pytest.mark.slow
def test_the_demo_trains_continues_and_is_evaluated(tmp_path):
    """The real network through both scripts, on phantoms, in few steps."""
    subprocess.run(
        [
            *(sys.executable, "-m", "swinsmt_jax.phantoms"),
            f"--root={tmp_path / 'data'}",
            *"--cases=4 --val=1 --test=1 --spacing=12 --seed=0".split(),
        ],
        check=True,
        cwd=ROOT,
    )
    workdir = tmp_path / "run"
    for steps in (2, 3):
        done = run(
            "--config=configs/demo.py",
            f"--workdir={workdir}",
            f"--config.data.root={tmp_path / 'data'}",
            "--config.data.patch_shape=(32, 32, 32)",
            f"--config.training.num_steps={steps}",
            "--config.optimizer.warmup_steps=1",
        )
        assert done.returncode == 0, done.stderr
    assert "continuing after step 2 of 3" in done.stderr
    assert (workdir / "metrics.jsonl").read_text().count("val_dice/ribs") == 2
    done = subprocess.run(
        [sys.executable, "evaluate.py", f"--workdir={workdir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Dice (%)" in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_a_real_scan_is_learnt_through_the_whole_chain(shared, tmp_path):
    """The README's commands for one scan of one's own, evaluated on its own voxels."""
    scan = shared / "data" / "totalsegmentator_example"
    root, workdir = tmp_path / "one_scan", tmp_path / "run"
    commands = (
        [
            *("-m", "swinsmt_jax.data.import_scan"),
            f"--ct={scan / 'example_ct.nii.gz'}",
            f"--labels={scan / 'example_seg.nii.gz'}",
            *(f"--root={root}", "--case=s0001", "--split=train,val,test"),
        ],
        [
            *("train.py", "--config=configs/real_scan.py"),
            *(f"--workdir={workdir}", f"--config.data.root={root}"),
        ],
        ["evaluate.py", f"--workdir={workdir}", "--split=test"],
    )
    for command in commands:
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    result = json.loads((workdir / "eval_test" / "results.json").read_text())
    (case,) = result["cases"].values()
    dice = {name: value for name, value in case["dice"].items() if value is not None}
    assert len(dice) == 61
    assert sum(dice.values()) / len(dice) >= 0.7
