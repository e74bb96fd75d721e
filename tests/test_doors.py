"""Each door of docs/doors.md refuses what is bad in one line, and writes nothing."""

import functools
import importlib
import json
import shutil
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from absl import flags
from flax import nnx

import swinsmt_jax
from swinsmt_jax import cli, convert, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.commands import inspect
from swinsmt_jax.config import from_config_dict, to_dict
from swinsmt_jax.convert import command, files, starting_point
from swinsmt_jax.data import label_table
from swinsmt_jax.inference import portable
from swinsmt_jax.runtime import distributed, startup
from swinsmt_jax.runtime.files import absolute

PAGE = Path(__file__).parents[1] / "docs" / "doors.md"
SHAPE, AFFINE = (20, 18, 12), np.diag([2.0, 2.0, 3.0, 1.0])
NETWORK = {
    **{"name": "swin_unetr", "in_channels": 1, "out_channels": 118},
    **{"feature_size": 12, "depths": (1, 1, 1, 1), "window_size": 4},
}
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def experiment(root):
    return from_config_dict(
        {
            "model": NETWORK,
            "data": {"root": str(root), "patch_shape": (32,) * 3, "batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
            "mesh": {"data": 1},
        }
    )


@functools.cache
def untrained():
    """The network as it is made."""
    return models.create(experiment("data").model, rngs=nnx.Rngs(0))


def write(path, array, affine=AFFINE, names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    if names:
        content = label_table.xml(names).encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension(0, content))
    nib.save(image, path)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with one of each: good, and bad in each way."""
    root = tmp_path_factory.mktemp("house")
    hu = np.full(SHAPE, -1000, np.int16)
    hu[4:16, 4:14, 2:10] = 40
    labels = (hu > 0).astype(np.uint8)
    write(root / "good.nii.gz", hu)
    write(root / "labels.nii.gz", labels)
    write(root / "nan.nii.gz", np.where(hu > 0, np.nan, hu).astype(np.float32))
    (root / "text.nii.gz").write_text("no scan")
    write(root / "soft.nii.gz", labels + np.float32(0.25))
    write(root / "grid.nii.gz", labels, np.diag([2.5, 2, 3, 1]))
    write(root / "done/good.nii.gz", labels)  # nobody knows of what
    write(root / "names.nii.gz", labels, names={1: "a thing of its own"})
    write(root / "data/s1/ct.nii.gz", hu)
    write(root / "data/s1/segmentations.nii.gz", labels)
    (root / "data/meta.csv").write_text("image_id;split\ns1;test\n")
    for kind in ("nan", "text", "soft", "grid", "names"):
        write(root / f"p_{kind}" / "s1.nii.gz", labels)
        shutil.copy(root / f"{kind}.nii.gz", root / f"p_{kind}" / "s1.nii.gz")
    shutil.copytree(root / "data", root / "p_good")
    shutil.move(root / "p_good/s1/segmentations.nii.gz", root / "p_good/s1.nii.gz")
    shutil.rmtree(root / "p_good/s1")

    config = experiment(root / "data")
    (root / "config.json").write_text(json.dumps(to_dict(config)))
    (root / "text.json").write_text("{")
    (root / "names.json").write_text(json.dumps(to_dict(config) | {"modle": {}}))
    (root / "other.json").write_text(json.dumps({"organs": ["livver"]}))
    weights = convert.to_torch(untrained())
    files.write(root / "weights.safetensors", weights)
    bias = "out.conv.conv.bias"
    files.write(root / "nan.safetensors", weights | {bias: weights[bias] * np.nan})
    files.write(root / "names.safetensors", {"x.weight": np.zeros(3)})
    (root / "text.safetensors").write_text("no weights")
    weights = str(root / "weights.safetensors")
    command.from_torch(
        config,
        weights=weights,
        workdir=str(root / "run"),
        partial=False,
        classes=["v2"],
    )
    return root


@pytest.fixture
def house(pristine, tmp_path, monkeypatch):
    """A copy of the folder, which is the working folder."""
    monkeypatch.setattr(
        distributed, "start", lambda folder: None
    )  # has flags of its own
    monkeypatch.chdir(shutil.copytree(pristine, tmp_path / "house"))
    return Path.cwd()


def call(name, *arguments):
    """Run a command in this process; return its status."""
    module = importlib.import_module(f"swinsmt_jax.{cli.COMMANDS[name][0]}")
    before = flags.FLAGS
    try:
        if not hasattr(module, "define_flags"):
            module.main(arguments)
            return 0
        values = flags.FlagValues()
        module.define_flags(values)
        with startup.exit_on_user_error(name):
            rest = startup.parse([name, *arguments], values)
            flags.FLAGS = values
            module.main(rest)
    except SystemExit as end:
        return end.code
    finally:
        flags.FLAGS = before
    return 0


def network():
    """Return an exported network of two classes."""

    def program(parameters, windows):
        return np.float32(0.5) - windows * np.array([1, -1], np.float32)

    one = jax.ShapeDtypeStruct((1,), np.float32)
    windows = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), np.float32)
    about = {"window": [16] * 3, "window_batch": 1, "spacing": 0, "num_classes": 2}
    about |= {"hu_range": [-1000, 1000], "overlap": 0.5, "blend": "gaussian"}
    exported = jax.export.export(jax.jit(program))([one], windows)
    return portable.Portable(about, exported, [np.zeros(1)])


def segmenter():
    return swinsmt_jax.Segmenter(experiment("data"), None, 0)


def array(path):
    """Return what a bad array is to be, for doors that take no path."""
    kinds = {"nan.nii.gz": np.full(SHAPE, np.nan), "text.nii.gz": np.full(SHAPE, "x")}
    return kinds.get(Path(path).name, np.zeros(SHAPE))


def command_with(*words, **good):
    """Return a function that runs a command with some of its good flags replaced."""

    def run(**given):
        return call(*words, *(f"--{name}={x}" for name, x in (good | given).items()))

    return run


SCAN_IN = {"ct": "good.nii.gz", "labels": "labels.nii.gz", "root": "new"}
imported = command_with("import-scan", **SCAN_IN, case="s1", split="train")
predicted = command_with("predict", workdir="run", input="good.nii.gz", output="new")
by_folder = command_with("predict", input="good.nii.gz", output="new")
evaluated = command_with(
    "evaluate",
    **{"predictions": "p_good", "data_root": "data", "output": "new"},
    **{"workers": 1, "surface_tolerance": 0},
)
preprocessed = command_with("preprocess", source="data", store="new")
trained = command_with("train", config="config.json", workdir="new")
FROM = {"weights": "weights.safetensors", "workdir": "new"}
converted = command_with("convert", "from_torch", config="config.json", **FROM)
written = command_with("convert", "to_torch", workdir="run", output="new.safetensors")
exported = command_with("export", workdir="run", output="new.npz")


# What a door takes: {kind of what is bad: a value}.
READ = {"missing": "gone", "wrong type": "text", "~": "~nobody-here/x"}
SCAN = {"missing": "gone.nii.gz", "NaN": "nan.nii.gz", "wrong type": "text.nii.gz"}
SCAN |= {"~": "~nobody-here/x.nii.gz", "relative": "../gone.nii.gz"}
HEADER = {kind: x for kind, x in SCAN.items() if kind != "NaN"}
LABELS = SCAN | {"wrong type": "soft.nii.gz", "wrong grid": "grid.nii.gz"}
LABELS |= {"other names": "names.nii.gz"}
WEIGHTS = {kind: v.replace("nii.gz", "safetensors") for kind, v in SCAN.items()}
WEIGHTS |= {"other names": "names.safetensors"}
CONFIG = {"missing": "gone.py", "wrong type": "text.json", "other names": "names.json"}
CONFIG |= {"~": "~nobody-here/x.py"}
FOLDER = {"missing": "gone", "wrong type": "good.nii.gz", "~": "~nobody-here"}
NEW = {"unwritable": "good.nii.gz/new", "~": "~nobody-here/new"}
PREDICTIONS = {"missing": "gone", "NaN": "p_nan", "wrong type": "p_soft"}
PREDICTIONS |= {"wrong grid": "p_grid", "other names": "p_names"}
ARRAY = {kind: SCAN[kind] for kind in ("NaN", "wrong type")}
FILE = {"unwritable": "good.nii.gz/new.safetensors", "wrong type": "new.txt"}
ARCHIVE = {"unwritable": "good.nii.gz/new.npz", "~": "~nobody-here/new.npz"}

DOORS = {
    "predict --workdir": (FOLDER, lambda x: predicted(workdir=x)),
    "predict --input": (SCAN, lambda x: predicted(input=x)),
    "predict --output": (
        NEW | {"of another network": "done", "brackets": "good.nii.gz/[new]"},
        lambda x: predicted(output=x),
    ),
    "predict --nnunet": (FOLDER, lambda x: by_folder(nnunet=x)),
    "predict --totalsegmentator": (FOLDER, lambda x: by_folder(totalsegmentator=x)),
    "evaluate --nnunet": (
        FOLDER,
        lambda x: call("evaluate", f"--nnunet={x}", "--data_root=data", "--output=new"),
    ),
    "evaluate --workdir": (
        FOLDER,
        lambda x: call("evaluate", f"--workdir={x}", "--split=test"),
    ),
    "evaluate --predictions": (PREDICTIONS, lambda x: evaluated(predictions=x)),
    "evaluate --data_root": (FOLDER, lambda x: evaluated(data_root=x)),
    "evaluate --groups": (
        {
            "missing": "gone.js",
            "wrong type": "text.json",
            "other names": "other.json",
        },
        lambda x: evaluated(groups=x),
    ),
    "evaluate --output": (NEW, lambda x: evaluated(output=x)),
    "evaluate --compare": (
        FOLDER,
        lambda x: call("evaluate", f"--compare={x},data", "--split=test"),
    ),
    "preprocess --source": (FOLDER, lambda x: preprocessed(source=x)),
    "preprocess --store": (
        NEW | {"of another dataset": "data"},
        lambda x: preprocessed(store=x),
    ),
    "preprocess --description": (CONFIG, lambda x: preprocessed(description=x)),
    "train --config": (CONFIG, lambda x: trained(config=x)),
    "train --workdir": (
        NEW | {"of another config": "run"},
        lambda x: trained(workdir=x),
    ),
    "train --start_from": (
        WEIGHTS,
        lambda x: starting_point.start_from(x)(nnx.clone(untrained())),
    ),
    "convert --config": (CONFIG, lambda x: converted(config=x)),
    "convert --weights": (WEIGHTS, lambda x: converted(weights=x)),
    "convert --workdir": (
        NEW | {"of another network": "run"},
        lambda x: converted(workdir=x),
    ),
    "convert --output": (
        FILE,
        lambda x: written(output=x),
    ),
    "export --workdir": (
        FOLDER,
        lambda x: exported(workdir=x),
    ),
    "export --output": (ARCHIVE, lambda x: exported(output=x)),
    "import-scan --ct": (SCAN, lambda x: imported(ct=x)),
    "import-scan --labels": (LABELS, lambda x: imported(labels=x)),
    "import-scan --root": (NEW, lambda x: imported(root=x)),
    "phantoms --root": (
        NEW,
        lambda x: call("phantoms", f"--root={x}", "--cases=1", "--spacing=40"),
    ),
    "load": (FOLDER, swinsmt_jax.load),
    "load_nnunet": (FOLDER, swinsmt_jax.load_nnunet),
    "load_totalsegmentator": (FOLDER, swinsmt_jax.load_totalsegmentator),
    "inspect": (FOLDER, lambda x: list(inspect.lines_of(absolute(x)))),
    "plan --source": (FOLDER, lambda x: call("plan", f"--source={x}")),
    "Segmenter.segment": (SCAN, lambda x: segmenter().segment(x)),
    "Segmenter.segment_array": (
        ARRAY,
        lambda x: segmenter().segment_array(array(x), AFFINE),
    ),
    "save, like": (
        HEADER,
        lambda x: swinsmt_jax.save("new.nii.gz", np.zeros(SHAPE, bool), like=x),
    ),
    "save, path": (
        NEW | {"wrong type": "new.img"},
        lambda x: swinsmt_jax.save(
            x if "." in Path(x).name else f"{x}/a.nii.gz",
            np.zeros(SHAPE, bool),
            like="good.nii.gz",
        ),
    ),
    "save, labels": (
        ARRAY,
        lambda x: swinsmt_jax.save("new.nii.gz", array(x), like="good.nii.gz"),
    ),
    "portable.load": (
        HEADER,
        portable.load,
    ),
    "Portable.segment": (ARRAY, lambda x: network().segment(array(x))),
}

# Of several scans, a bad one fails alone: status 1, and a summary that says why.
ALONE = {("predict --input", kind) for kind in ("NaN", "wrong type")}
ALONE |= {("evaluate --predictions", k) for k in PREDICTIONS.keys() - {"missing"}}


def content(folder):
    """Return what lies in a folder, but for locks, which hold nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.name != "lock"
    }


def test_an_overlap_that_would_be_passed_over_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "start", lambda folder: None)
    (tmp_path / "a.nii").touch()
    flags = (f"--input={tmp_path / 'a.nii'}", "--output=x", "--overlap=0.5")
    assert call("predict", *flags, "--totalsegmentator=x") == 2
    assert "overlap as TotalSegmentator's do" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "kind"), [(door, kind) for door in DOORS for kind in DOORS[door][0]]
)
def test_what_is_bad_is_refused_in_a_line_and_nothing_is_written(
    house, capsys, door, kind
):
    values, enter = DOORS[door]
    before = content(house)
    try:
        status = enter(values[kind])
    except UserError as error:
        status, said = 2, [str(error)]
    else:
        said = [x for x in capsys.readouterr().err.splitlines() if x and "| " not in x]
    assert status == (1 if (door, kind) in ALONE else 2), said
    assert len(said) == 1 and len(said[0]) > 30, said
    left = content(house)
    new = {name for name in left.keys() - before.keys() if name[:3] != "new"}
    assert not new and before.items() <= left.items()
    assert (door, kind) in ALONE or left.keys() == before.keys()


@pytest.mark.slow
def test_what_is_good_passes_by_any_path(house, monkeypatch):
    monkeypatch.setenv("HOME", str(house.parent))
    (house / "[a] b").mkdir()
    shutil.copy("good.nii.gz", "[a] b/GOOD.NII.GZ")
    (house / "[a] b/._GOOD.NII.GZ").write_bytes(b"of macOS")
    assert imported(ct="[a] b/../[a] b/GOOD.NII.GZ", root="~/house/[new]/x") == 0
    assert preprocessed(source="~/house/[new]/x", store="../house/[store]") == 0
    assert evaluated(predictions="~/house/p_good", output="[out]") == 0
    assert predicted(input="[a] b", output="~/house/[new]/p") == 0
    assert (house / "[new]/p/GOOD.nii.gz").is_file()
    assert written(workdir="~/house/run", output="[new]/w.safetensors") == 0
    assert exported(workdir="../house/run", output="~/house/[new]/a/net.npz") == 0
    assert converted(weights="~/house/[new]/w.safetensors") == 0


def test_the_page_names_each_door_and_what_it_refuses():
    rows = [line[2:-2].split(" | ") for line in PAGE.read_text().splitlines()]
    rows = {row[0].strip("`"): row[-1] for row in rows if row[0].strip("`") in DOORS}
    assert rows == {door: ", ".join(values) for door, (values, _) in DOORS.items()}
