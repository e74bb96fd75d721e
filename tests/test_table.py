import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import table, table_format
from swinsmt_jax.evaluation import published_results
from swinsmt_jax.ops import by_platform
from swinsmt_jax.runtime import operations

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "networks_cpu.json"


def nnunet_by_hand(side, *, classes=118):
    """Operations of plain nnU-Net: two convolutions a stage, both ways, and a head."""
    features = (32, 64, 128, 256, 320, 320)
    voxels = [(side // 2**i) ** 3 for i in range(len(features))]
    pairs, before = 0, 1
    for channels, count in zip(features, voxels, strict=True):
        pairs += 27 * count * (before * channels + channels * channels)
        before = channels
    for i in range(len(features) - 1):
        finer, coarser = features[i], features[i + 1]
        pairs += 8 * voxels[i + 1] * coarser * finer  # 2^3 transposed
        pairs += 27 * voxels[i] * (2 * finer * finer + finer * finer)
    return 2 * (pairs + voxels[0] * features[0] * classes)


def test_operations_equal_a_count_by_hand():
    config = table.model_of("nnunet_plain", 128)
    counted = operations.forward_operations(config, (128, 128, 128))
    assert counted == nnunet_by_hand(128)


def test_loops_count_as_often_as_they_run():
    def products(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    assert operations.count(products, jnp.ones((4, 4))) == 5 * 2 * 4**3
    with pytest.raises(ValueError, match="while loop"):
        operations.count(
            lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ c, x),
            jnp.ones((4, 4)),
        )


def test_the_form_that_is_counted_is_no_platforms_own():
    x, kernel = jnp.ones((1, 4, 4, 4, 6)), jnp.ones((7, 7, 7, 6))
    counted = operations.count(by_platform.depthwise_conv, x, kernel)
    assert counted == 2 * 4**3 * 6 * 7**3
    counted = operations.count(by_platform.depthwise_conv, x, jnp.ones((9, 9, 9, 6)))
    assert counted == 3 * round(2.5 * 6 * 8**3 * 9)  # transforms of 4 + 3 -> 8 a side
    x, kernel = jnp.ones((1, 2, 64, 64, 6)), jnp.ones((3, 3, 3, 6, 5))
    counted = operations.count(by_platform.conv3x3x3, x, kernel)
    assert counted == 2 * 2 * 64**2 * 27 * 6 * 5
    x = jnp.ones((1, 4, 4, 4, 6))
    counted = operations.count(
        lambda x, k: by_platform.strided_conv(x, k, (2, 1, 2)), x, kernel
    )
    assert counted == 2 * 16 * 27 * 6 * 5


@pytest.mark.slow
def test_the_quick_table_is_written(tmp_path):
    files = {n: tmp_path / f"table.{n}" for n in ("json", "markdown")}
    files["plot"] = tmp_path / "table.png"
    subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.table", "--quick"),
            "--networks=nnunet_plain,nnformer,swin_smt_paper",
            *(f"--{name}={path}" for name, path in files.items()),
        ],
        check=True,
        cwd=ROOT,
    )
    found = json.loads(files["json"].read_text())
    assert found["headline"] == {
        "nnunet_plain": 31_288_974,
        "nnformer": 149_960_014,
        "swin_smt_paper": 170_783_560,
    }
    assert found["rows"][0]["forward_patches_per_s"] > 0
    assert found["rows"][0]["forward_gb"] > 0.1
    assert "| 31,288,974 |" in files["markdown"].read_text()
    assert files["plot"].stat().st_size > 0


def test_what_the_paper_reports_stands_apart():
    row = {"name": "unetr", "parameters": 7, "side": 64, "timed_side": 0}
    row |= {"forward_gflop": 1500.0, "forward_gb": 2.0}
    text = table_format.markdown([row], table.NETWORKS, device="cpu")
    measured, theirs = text.split("Reported by the authors")
    assert "| UNETR | 7 | 1,500 | 2.00 | – | – | – |" in measured
    assert "forward, GB at 64^3" in measured and "102.02" not in measured
    assert "| UNETR | 102.02 | 35 | 73.84 |" in theirs and "85.09" in theirs
    assert theirs.count("\n| ") == 2 + 12


def test_sizes_are_those_of_the_authors():
    ours = json.loads(MEASURED.read_text())["headline"]
    theirs = {row["network"]: row["parameters_m"] for row in published_results.ROWS}
    for network, name in table_format.SAME.items():
        allowed = {
            "nnformer": 1.0,
            "unest": 0.1,
            "repux_net": 0.04,
            "universal_model": 0.25,
        }.get(name, 0.02)  # millions
        assert theirs[network] == pytest.approx(ours[name] / 1e6, abs=allowed)


def test_the_picture_has_the_authors_dice():
    rows = json.loads(MEASURED.read_text())["rows"]
    figure = table_format.picture(rows, table.NETWORKS)
    sizes, theirs, seconds = figure.axes[0], *figure.axes[2:]
    assert all("by the authors" in axis.get_title() for axis in (theirs, seconds))
    found = {line.get_label(): line for line in theirs.lines}
    assert len(found) == len(seconds.lines) == 12
    assert found["Swin SMT"].get_xydata().tolist() == [[170.78, 85.09]]
    assert seconds.lines[0].get_xydata().tolist() == [[35, 70.88]]
    assert len(sizes.lines) == len(rows)
    own = {line.get_label(): line.get_color() for line in sizes.lines}
    assert own["Swin UNETR B"] == found["SwinUNETR-B"].get_color()


def test_a_table_is_made_again_without_measuring(tmp_path):
    files = {"json": tmp_path / "t.json", "markdown": tmp_path / "t.md"}
    files["plot"] = tmp_path / "t.png"
    subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.table", f"--measured={MEASURED}"),
            *(f"--{name}={path}" for name, path in files.items()),
        ],
        check=True,
        cwd=ROOT,
    )
    before, found = (
        json.loads(MEASURED.read_text()),
        json.loads(files["json"].read_text()),
    )
    assert found["rows"] == before["rows"] and found["command"] == before["command"]
    assert [row["network"] for row in found["reported"]][-1] == "Swin SMT"
    assert "| 170,783,560 | 2,828 |" in files["markdown"].read_text()
    assert files["plot"].stat().st_size > 0
