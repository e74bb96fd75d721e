"""The architecture of DiNTS as a file, and the names of what it makes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import convert, models
from swinsmt_jax.checks import UserError
from swinsmt_jax.config import model_from_dict, to_dict
from swinsmt_jax.models.dints import DiNTSConfig
from swinsmt_jax.models.dints_architecture import PUBLISHED
from swinsmt_jax.ops.interpolation import resize

TWO_BLOCKS = Path(__file__).with_name("dints_two_blocks.json")
SIZES = {"in_channels": 1, "out_channels": 118}


def test_parameters_of_half_the_width():
    config = DiNTSConfig(**SIZES, channel_mul=0.5)
    assert models.count_parameters(config) == 38_112_454


def test_the_published_architecture():
    config = DiNTSConfig(**SIZES, channel_mul=1 / 16)
    rows = config.architecture
    assert rows[0] == "1.13212.1." and rows[-1] == "44.....021"
    assert [sum(row.count(o) for row in rows) for o in ".01234"] == [
        *(23, 24, 33, 14, 12, 14)
    ]
    graphdef, shapes = models.abstract_model(config)
    arrays = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    names = convert.to_torch(nnx.merge(graphdef, arrays))
    assert len(names) == 502
    for name, shape in {
        "stem_down.3.mod.4.weight": (32, 16, 3, 3, 3),
        "stem_up.0.mod.2.bias": (2,),
        "stem_finals.0.conv.weight": (2, 2, 3, 3, 3),
        "stem_finals.1.bias": (118,),
        "dints_space.cell_tree.(0, 4).preprocess.conv.weight": (8, 16, 1, 1, 1),
        "dints_space.cell_tree.(0, 4).op.ops.0.conv_1.weight": (8, 8, 1, 1, 3),
        "dints_space.cell_tree.(1, 8).preprocess.conv_2.weight": (16, 16, 1, 1, 1),
        "dints_space.cell_tree.(11, 8).op.ops.0.norm.weight": (32,),
    }.items():
        assert names[name].shape == shape, name


def test_the_file_is_not_needed_again(tmp_path):
    content = json.loads(TWO_BLOCKS.read_text())
    for name in ("a", "c"):  # as Auto3DSeg names them
        content[f"code_{name}"] = content.pop(f"arch_code_{name}")
    file = tmp_path / "searched.json"
    file.write_text(json.dumps(content))
    config = DiNTSConfig(**SIZES, architecture=str(file))
    file.unlink()
    assert config.architecture == ("1.2.", "3041") and config.num_depths == 2
    assert model_from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert config == DiNTSConfig(**SIZES, architecture=TWO_BLOCKS)


def with_entry(name, row, column, value):
    def change(content):
        content[name][row][column] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_entry("arch_code_a", 10, slice(8, 10), [0, 0]),
            "path 7 of block 11 is not connected: it starts at depth 3, where no path",
        ),
        (
            lambda c: c["arch_code_a"].pop(),
            r"arch_code_a of shape \(11, 10\) and arch_",
        ),
        (lambda c: c["arch_code_a"][3].pop(), "must have an array arch_code_a of numb"),
        (lambda c: c.pop("arch_code_c"), "must have an array arch_code_c of numbers"),
        (
            lambda c: [row.pop() for n in "ac" for row in c[f"arch_code_{n}"]],
            "has 12 blocks of 9 paths, but must have .* 3 depths - 2 paths in each",
        ),
        (
            lambda c: c.update(arch_code_a=[[]], arch_code_c=[[]]),
            "has 1 blocks of 0 paths",
        ),
        (with_entry("arch_code_a", 0, 0, 2), "arch_code_a must hold only 0 and 1"),
        (with_entry("arch_code_c", 0, 0, 5), "operations from 0 to 4 where a path"),
        (with_entry("arch_code_a", 0, slice(None), [0] * 10), "at least one path"),
        (with_entry("node_a", 12, 1, 1), "node_a is .* of arch_code_a make it"),
        (lambda c: c.update(num_blocks=11), "num_blocks is 11, but .* make it 12"),
    ],
)
def test_a_bad_architecture_is_refused(change, message, tmp_path):
    content = json.loads(PUBLISHED.read_text())
    change(content)
    file = tmp_path / "searched.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"the architecture file {file}.*{message}"):
        DiNTSConfig(**SIZES, architecture=file)


def test_other_bad_values_are_refused(tmp_path):
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "list.json").write_text("[1]")
    for rows, message in (
        (tmp_path / "none.json", "cannot be read as JSON .*No such file"),
        (tmp_path / "pickle.pth", "cannot be read as JSON"),
        (tmp_path / "list.json", "must hold a JSON object"),
        ((), "model.architecture has 0 blocks of no paths"),
        (("1.2.", "3"), "has 2 blocks of 1, 4 paths"),
        (("1.2.", "3x41"), "block 1 is '3x41'"),
        (("1...", "3041"), "path 1 of block 1 is not connected: it starts at depth 1"),
    ):
        with pytest.raises(UserError, match=message):
            DiNTSConfig(**SIZES, architecture=rows)
    with pytest.raises(UserError, match="channel_mul is 0.01, but must be at least"):
        DiNTSConfig(**SIZES, channel_mul=0.01)
    with pytest.raises(UserError, match=r"\(16, 16, 16\), but one side .* 32: the coa"):
        DiNTSConfig(**SIZES).check_patch("data.patch_shape", (16, 16, 16))


def test_interpolation_keeps_corners_and_what_is_linear(rng):
    slope = rng.standard_normal((3, 2))

    def ramp(*grid):
        axes = [np.linspace(0, 1, n) if n > 1 else [0.0] for n in grid]
        places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        return jnp.asarray(places @ slope, jnp.float32)[None]

    for before, after in (((4, 1, 6), (8, 2, 3)), ((2, 3, 5), (1, 7, 5))):
        expected = ramp(*after) if before[1] > 1 else ramp(8, 1, 3).repeat(2, axis=2)
        np.testing.assert_allclose(resize(ramp(*before), after), expected, atol=1e-6)
