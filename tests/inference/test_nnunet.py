"""Model folders of nnU-Net v2 against what nnU-Net itself made of them."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from swinsmt_jax import load_nnunet
from swinsmt_jax.checks import UserError
from swinsmt_jax.convert import nnunet_folder
from swinsmt_jax.inference import nnunet
from swinsmt_jax.inference.grid import Decision
from swinsmt_jax.inference.sliding_window import sliding_window

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"A": "Dataset901_PhantomOrgans", "B": "Dataset902_PhantomBones"}
CASES = "t1_ras t2_lps_11mm t3_permuted t4_thick_zeros t5_short_oblique t6_real".split()
MODES = {"fold0_nomirror": (("0",), False), "folds01_mirror": (("0", "1"), True)}
QUICK = [  # one case for each rule
    ("A", "fold0_nomirror", "t4_thick_zeros"),
    ("A", "fold0_nomirror", "t5_short_oblique"),
    ("B", "fold0_nomirror", "t3_permuted"),
    ("A", "folds01_mirror", "t5_short_oblique"),
]
slow = [
    pytest.param(key, mode, case, marks=pytest.mark.slow)
    for key in FOLDERS
    for mode in MODES
    for case in CASES
    if (key, mode, case) not in QUICK
]


@pytest.fixture(scope="session")
def root(shared):
    if not (shared / "nnunet").is_dir():
        pytest.skip(f"needs nnU-Net's model folders in {shared / 'nnunet'}")
    return shared / "nnunet"


def scan_of(root, key, case):
    if case == "t6_real":
        return root.parent / "data/totalsegmentator_example/example_ct.nii.gz"
    return root / f"raw/{FOLDERS[key]}/imagesTs/{case}_0000.nii.gz"


def remembering(predict):
    """The same function, which predicts windows that it has seen once alone."""
    seen = {}

    def remembered(windows):
        key = np.asarray(windows).tobytes()
        if key not in seen:
            seen[key] = predict(windows)
        return seen[key]

    return remembered


def labels_in(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture
def optimised_windows(monkeypatch):
    """Mirrored windows, of which there are many, compile as they do for users."""
    options = {"xla_backend_optimization_level": 1}
    for name in ("_apply", "_apply_flipped"):
        plain = getattr(nnunet, name).__wrapped__
        monkeypatch.setattr(nnunet, name, jax.jit(plain, compiler_options=options))


@pytest.mark.usefixtures("optimised_windows")
@pytest.mark.parametrize(("key", "mode", "case"), [*QUICK, *slow])
def test_it_equals_nnunet(root, key, mode, case):
    folds, mirror = MODES[mode]
    segmenter = load_nnunet(root / FOLDERS[key], folds=folds, mirror=mirror)
    segmenter = dataclasses.replace(segmenter, predict=remembering(segmenter.predict))
    wanted = root / "predictions" / f"{key}_{mode}"
    scan = scan_of(root, key, case)
    labels, theirs = segmenter.segment(scan), labels_in(wanted / f"{case}.nii.gz")
    assert labels.dtype == np.uint8
    foreground = (labels > 0) | (theirs > 0)
    assert np.mean((labels == theirs)[foreground]) >= 0.998
    if (wanted / f"{case}.float32.nii.gz").exists():
        exact = labels_in(wanted / f"{case}.float32.nii.gz")
        assert np.count_nonzero(labels != exact) <= 10
    if not (wanted / f"{case}.npz").exists():
        return
    arrays = np.load(wanted / f"{case}.npz")
    view = segmenter.view(segmenter.read(scan))
    if "preprocessed" in arrays:
        found, given = view.image[..., 0], arrays["preprocessed"][0]
        np.testing.assert_allclose(found, given, rtol=1e-4, atol=1e-5)
    logits = sliding_window(
        segmenter.predict,
        view.image,
        window=segmenter.plan.patch_shape,
        num_classes=segmenter.plan.channels,
        convention="nnunet",
    )
    n = int(arrays["stride"])
    given = np.moveaxis(arrays["logits"], 0, -1)
    np.testing.assert_allclose(logits[::n, ::n, ::n], given, atol=1e-4)


def test_the_plan_of_before_architectures_is_read(root):
    folder = next((root / FOLDERS["A"]).glob("nnU*"))
    new = nnunet_folder.read(folder, folds=["0"])
    values = json.loads((root / "old_plans_format/plans.json").read_text())
    assert "architecture" not in values["configurations"]["3d_fullres"]
    old = nnunet_folder.nnunet_plan._network(values["configurations"]["3d_fullres"])
    assert nnunet_folder.network_of(old, channels=8) == new.network


@pytest.mark.parametrize(
    ("labels", "order", "names", "regions", "channels"),
    [  # list of one: no region; ids with gaps: numbers of channels
        ({"background": 0, "b": [7], "a": 3}, None, ("background", "a", "b"), (), 3),
        ({"background": 0, "a": 1, "ignore": 2}, None, ("background", "a"), (), 2),
        (
            {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
            [1, 2],
            ("background", "whole", "core"),
            (1, 2),
            2,
        ),
        (
            {"background": [0], "core": 2, "whole": [1, 2]},
            [2, 1],
            ("background", "whole", "core"),
            (2, 1),
            2,
        ),
    ],
)
def test_labels_follow_the_keys(labels, order, names, regions, channels):
    found = nnunet_folder.nnunet_plan.labels_of(
        {"labels": labels, "regions_class_order": order}, where="dataset.json"
    )
    assert found == (names, regions, channels)


def test_regions_are_written_in_order_where_the_sigmoid_is_above_half():
    logits = np.float32([[3, 1], [1, -1], [-1, 2], [-1, 0], [6e-8, -1], [1e-7, -1]])
    found = Decision("logits", (2, 1)).labels(np, logits)
    assert found.tolist() == [1, 2, 1, 0, 0, 2]


@pytest.fixture
def copied(root, tmp_path):
    """A copy of folder A with one fold, and a function that changes its JSON files."""
    source = next((root / FOLDERS["A"]).glob("nnU*"))
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        target = tmp_path / "model" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)

    def change(name, *keys, **values):
        file = tmp_path / "model" / name
        content = part = json.loads(file.read_text())
        for key in keys:
            part = part[key]
        part.update(values)
        file.write_text(json.dumps(content))

    return tmp_path / "model", change


FULL = ("plans.json", "configurations", "3d_fullres")
ARCHITECTURE = (*FULL, "architecture")
REFUSED = {
    "unknown key": (FULL, {"pathc": 1}, "a key of the configuration .* is 'pathc'"),
    "2-D": (FULL, {"patch_size": [8, 8], "spacing": [1, 1]}, "only networks of 3-D"),
    "cascade": (FULL, {"previous_stage": "3d_lowres"}, "previous_stage .*'3d_lowres'"),
    "resampling": (FULL, {"resampling_fn_data": "resample_torch"}, "resample_torch"),
    "scheme": (FULL, {"normalization_schemes": ["RGBTo01"]}, "RGBTo01"),
    "window": (FULL, {"patch_size": [30, 32, 48]}, "multiple of 8"),
    "network": (ARCHITECTURE, {"network_class_name": "x.UMamba"}, "'UMamba'"),
    "norm": ((*ARCHITECTURE, "arch_kwargs"), {"norm_op": "B"}, "norm_op .*'B'"),
    "argument": ((*ARCHITECTURE, "arch_kwargs"), {"gates": 1}, "is 'gates'"),
    "slope": (
        (*ARCHITECTURE, "arch_kwargs"),
        {"nonlin_kwargs": {"negative_slope": 0.2}},
        "negative_slope .* is 0.2",
    ),
    "other features": (
        (*ARCHITECTURE, "arch_kwargs"),
        {"features_per_stage": [8, 16, 32, 48]},
        "checkpoint_final.pth does not fit the network of plans.json",
    ),
    "channels": (
        ("dataset.json",),
        {"channel_names": {"0": "T1", "1": "T2"}},
        "T1, T2",
    ),
    "no background": (("dataset.json",), {"labels": {"a": 1}}, "without the backgr"),
    "no labels": (("dataset.json",), {"labels": 3}, "cannot be read as those"),
    "reader": (("plans.json",), {"image_reader_writer": "Tiff3DIO"}, "Tiff3DIO"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_in_one_line(copied, name):
    folder, change = copied
    where, values, words = REFUSED[name]
    change(*where, **values)
    with pytest.raises(UserError, match=words) as error:
        load_nnunet(folder)
    assert "\n" not in str(error.value)


class _Command:
    def __reduce__(self):
        return print, ("run",)


def rewritten(folder, change):
    """Write the checkpoint anew with another pickle."""
    file = folder / "fold_0/checkpoint_final.pth"
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_bad_folders_are_refused_in_one_line(copied, capsys):
    folder, _ = copied
    for given, words in (
        ({"folds": ["3"]}, "no fold_3 .* its folds are 0"),
        ({"overlpa": 1}, "Did you mean 'overlap'"),
    ):
        with pytest.raises(UserError, match=words):
            load_nnunet(folder, **given)
    with pytest.raises(UserError, match=r"holds no plans.json"):
        load_nnunet(folder / "fold_0")
    rewritten(folder, lambda data: data.replace(b"nnUNetTrainer", b"nnUNetUMamba_"))
    with pytest.raises(UserError, match="comes from the trainer 'nnUNetUMamba_'"):
        load_nnunet(folder)
    rewritten(folder, lambda _: pickle.dumps({"network_weights": _Command()}))
    with pytest.raises(UserError, match="builtins.print, which may run code"):
        load_nnunet(folder)
    assert capsys.readouterr().out == ""
    (folder / "fold_0/checkpoint_final.pth").unlink()
    with pytest.raises(UserError, match="has no fold with a checkpoint_final.pth"):
        load_nnunet(folder)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("nnUNetTrainer", True),
        ("nnUNetTrainerNoMirroring", True),
        ("nnUNetTrainer_4000epochs_NoMirroring", True),
        ("nnUNetTrainer_onlyMirror01_1500ep", True),
        ("nnUNetTrainerDA5Segord0", True),
        ("nnUNetTrainerVanillaAdam1en3", True),
        ("nnUNetTrainerBN", False),
        ("nnUNetTrainerUMambaEnc", False),
        ("nnUNet_Primus_M_Trainer", False),
    ],
)
def test_trainers_of_other_networks_are_known_by_name(name, known):
    assert (nnunet_folder.TRAINER.fullmatch(name) is not None) == known


def test_without_the_key_there_is_no_mirroring(copied):
    folder, _ = copied
    assert nnunet_folder.read(folder).mirror_axes == (0, 1, 2)
    key = b"inference_allowed_mirroring_axes"
    rewritten(folder, lambda data: data.replace(key, b"x" * len(key)))
    assert nnunet_folder.read(folder).mirror_axes == ()


def test_any_name_of_a_tensor_will_do_but_all_must_agree(root):
    folder = nnunet_folder.find(root / FOLDERS["A"])
    file = folder / "fold_0" / nnunet_folder.CHECKPOINT
    weights = nnunet_folder.files.read(file)
    assert len(weights) == 188
    model = nnunet_folder.read(folder, folds=["0"]).models[0]
    last = [n for n in weights if n.startswith("decoder.encoder") and "all_mod" in n]
    aliases = [n for n in weights if n.startswith("encoder") or ".encoder" in n]
    fewer = {n: a for n, a in weights.items() if n in last or n not in aliases}
    nnunet_folder.load_torch(model, {f"_orig_mod.{n}": a for n, a in fewer.items()})
    unequal = dict(weights)
    unequal[last[0]] = weights[last[0]] + 1
    with pytest.raises(UserError, match="different values under two names"):
        nnunet_folder.load_torch(model, unequal)


@pytest.mark.slow
def test_it_is_evaluated_like_any_run(root, tmp_path):
    """On a store of nnU-Net's own raw folder; the Dice is that of its labels."""
    raw = root / "raw" / FOLDERS["A"]
    store = ["preprocess.py", f"--source={raw}", f"--store={tmp_path / 'store'}"]
    command = [
        *("evaluate.py", f"--nnunet={root / FOLDERS['A']}", "--folds=0", "--nomirror"),
        *(f"--data_root={tmp_path / 'store'}", f"--output={tmp_path / 'out'}"),
        *("--split=test", "--surface_tolerance=0", "--limit=1"),
    ]
    for line in (store, command):
        done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    cases = json.loads((tmp_path / "out/results.json").read_text())["cases"]
    (case,) = cases.values()
    found = [case["dice"][name] for name in case["dice"]]
    theirs = [0.91, 0.57, 0.67, 0.70, 0.71, 0.83, 0.58]  # of t1_ras, by nnU-Net
    np.testing.assert_allclose(found, theirs, atol=0.006)
