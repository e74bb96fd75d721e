import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import models
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.inference import export as export_command
from swinsmt_jax.inference import portable
from swinsmt_jax.inference.export import export
from swinsmt_jax.inference.segmenter import predict_fn
from swinsmt_jax.inference.sliding_window import predict_labels
from swinsmt_jax.layers.soft_moe import SoftMoE, SoftMoEConfig
from swinsmt_jax.ops import by_platform

ROOT = Path(portable.__file__).parents[2]
# What the loader must do without.
BLOCKED = """
import sys
from importlib.metadata import packages_distributions
needed = {"jax", "jaxlib", "numpy", "flatbuffers"}
needed |= {"ml_dtypes", "opt_einsum", "scipy"}  # which jax itself needs
for name in packages_distributions():
    if name not in needed and not name.startswith(("_", "swinsmt_jax")):
        sys.modules[name] = None
from swinsmt_jax.inference import portable
"""
ALONE = f"""{BLOCKED}
import numpy as np
network = portable.load(sys.argv[1])
np.save(sys.argv[3], network.segment(np.load(sys.argv[2])))
print(network.about["class_names"]["1"], network.about["step"])
"""


@pytest.fixture(scope="module")
def config():
    return from_config_dict(
        {
            "model": {
                "name": "swin_smt",
                "in_channels": 1,
                "out_channels": 4,
                "feature_size": 12,
                "num_experts": 2,
                "num_moe_stages": 1,
                "depths": (1, 1, 1, 1),
            },
            "data": {"root": "nowhere", "patch_shape": (32, 32, 32), "batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
            "inference": {"overlap": 0.25, "window_batch": 2},
        }
    )


@pytest.mark.slow
def test_an_exported_network_needs_jax_and_numpy_alone(config, tmp_path, rng):
    model = models.create(config.model, rngs=nnx.Rngs(0))
    export(model, config, tmp_path / "network.npz", step=7)
    hu = rng.integers(-1024, 1024, (40, 32, 36)).astype(np.int16)
    np.save(tmp_path / "hu.npy", hu)
    files = [tmp_path / name for name in ("network.npz", "hu.npy", "labels.npy")]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["spleen", "7"]
    low, high = config.data.hu_range
    expected = predict_labels(
        predict_fn(model),
        ((hu - low) / np.float32(high - low)).clip(0, 1).astype("f4")[..., None],
        window=config.data.patch_shape,
        num_classes=4,
        overlap=0.25,
        window_batch=2,
    )
    # made where cuDNN is not, it has none of its attention
    about = portable.load(files[0]).about
    (windows,), routing = map(about["attention_on_cuda"].get, ("windows", "routing"))
    assert windows.startswith("in blocks") and list(routing) == ["dense"]
    labels = np.load(files[2])
    assert (labels == expected).mean() > 0.999 and len(np.unique(expected)) > 1


def test_the_loader_imports_jax_numpy_and_flatbuffers_alone():
    subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, check=True)


def test_the_output_of_an_export_is_tried_before_the_network_is_read(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(export_command.startup, "start", lambda arguments: None)
    for output, words in (
        ("new/network.npz", "nowhere"),
        ("file/network.npz", "output folder .*file cannot be made"),
    ):
        options = types.SimpleNamespace(
            workdir=tmp_path / "nowhere", output=tmp_path / output, step=None
        )
        monkeypatch.setattr(export_command.flags, "FLAGS", options)
        with pytest.raises(UserError, match=words):
            export_command.main([])
    assert (tmp_path / "new").is_dir()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    for name in ("x.npz", "y.npz", "missing.npz"):
        with pytest.raises(UserError, match=rf"{name} is not an exported network"):
            portable.load(tmp_path / name)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What the file of a small exported network holds."""
    program = jax.jit(lambda parameters, windows: windows * parameters[0])
    shapes = [jax.ShapeDtypeStruct((2,), "float32")]
    windows = jax.ShapeDtypeStruct((2, 8, 8, 8, 1), "float32")
    exported = jax.export.export(program)(shapes, windows)
    about = {"window": [8, 8, 8], "window_batch": 2, "hu_range": [0, 1]}
    about |= {"num_classes": 2, "overlap": 0.5, "blend": "constant"}
    path = tmp_path_factory.mktemp("portable") / "network.npz"
    portable.save(path, exported, [np.float32([-1, 1])], about)
    with np.load(path) as file:
        return dict(file)


def test_a_file_comes_back(parts, tmp_path):
    np.savez(tmp_path / "x.npz", **parts)
    network = portable.load(tmp_path / "x.npz")
    assert (network.segment(np.full((9, 8, 8), 2)) == 1).all()


def changed(parts, **keys):
    about = json.loads(parts["about"].tobytes()) | keys
    return {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: {"program": parts["program"][:-9]},
        lambda parts: {"program": np.zeros(64, np.uint8)},
        lambda parts: {"about": np.frombuffer(b"[" * 100_000, np.uint8)},
        lambda parts: {"about": np.frombuffer(b"[]", np.uint8)},
        lambda parts: {"about": np.frombuffer(b"{}", np.uint8)},
        lambda parts: {"about": np.frombuffer(b"\xff", np.uint8)},
        lambda parts: {"parameter_0": np.zeros(3, np.float32)},
        lambda parts: {"parameter_1": np.zeros(2, np.float32)},
        lambda parts: {"parameter_0": np.array([{}], object)},
        lambda parts: changed(parts, window=[8, 8, 9]),
        lambda parts: changed(parts, window=None),
    ],
)
def test_damaged_files_are_refused_in_one_way(parts, tmp_path, change):
    np.savez(tmp_path / "x.npz", **(parts | change(parts)))
    with pytest.raises(UserError, match="x.npz is not an exported network"):
        portable.load(tmp_path / "x.npz")


def test_a_program_that_calls_code_of_the_host_is_refused(parts, tmp_path):
    def program(parameters, windows):
        square = jnp.linalg.cholesky(jnp.eye(2) * parameters[0])
        return windows * parameters[0] + square[0]  # by LAPACK

    shapes = [jax.ShapeDtypeStruct((2,), "float32")]
    windows = jax.ShapeDtypeStruct((2, 8, 8, 8, 1), "float32")
    exported = jax.export.export(jax.jit(program))(shapes, windows)
    about = json.loads(parts["about"].tobytes())
    portable.save(tmp_path / "x.npz", exported, [np.float32([1, 1])], about)
    with pytest.raises(UserError, match="x.npz is not an exported .*calls lapack"):
        portable.load(tmp_path / "x.npz")


def test_the_routing_is_that_of_the_platform_that_runs_the_program(monkeypatch):
    """On a CPU this Soft MoE streams, in a loop; elsewhere it is dense."""
    monkeypatch.setattr(by_platform, "DENSE", {"cpu": 1, "default": 2**24})
    moe = SoftMoE(8, SoftMoEConfig(num_experts=2), rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((1, 24, 8), "float32")
    loops = {}
    for platform in portable.PLATFORMS:
        with by_platform.for_every_platform():
            lowered = jax.export.export(jax.jit(moe), platforms=[platform])(x)
        loops[platform] = "stablehlo.while" in lowered.mlir_module()
    assert loops == {"cpu": True, "cuda": False, "tpu": False}
    with by_platform.for_every_platform():
        exported = jax.export.export(jax.jit(moe), platforms=portable.PLATFORMS)(x)
    x = jax.random.normal(jax.random.key(0), x.shape)
    np.testing.assert_allclose(exported.call(x), moe(x), atol=1e-5)


def test_a_program_is_compiled_once_for_all_scans(rng):
    traced = []

    def call(parameters, windows):
        traced.append(windows.shape)
        return windows * parameters[0]

    about = {"window": [8, 8, 8], "window_batch": 2, "hu_range": [0, 1]}
    about |= {"num_classes": 2, "overlap": 0.5, "blend": "constant"}
    exported = types.SimpleNamespace(call=call)
    network = portable.Portable(about, exported, [np.float32([-1, 1])])
    for size in (9, 12):
        assert (network.segment(np.full((size, 8, 8), 2)) == 1).all()
    assert traced == [(2, 8, 8, 8, 1)]
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="hu has 512 voxels that are NaN or"):
            network.segment(np.full((8, 8, 8), bad))
    with pytest.raises(UserError, match="one real number a voxel"):
        network.segment(np.full((8, 8, 8), 1j))
