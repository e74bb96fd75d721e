"""What the variants of a step on a GPU are, and how they are measured."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import gpu_check, gpu_copies, gpu_variants, stacked_planes
from swinsmt_jax.ops import by_platform
from swinsmt_jax.training import losses

ROOT = Path(__file__).resolve().parents[1]


def test_an_unknown_flag_of_xla_is_refused_before_anything_is_compiled(monkeypatch):
    unknown = gpu_variants.Variant("--xla_gpu_of_no_version=true")
    monkeypatch.setitem(gpu_variants.VARIANTS, "base", unknown)
    row, machine = gpu_variants.in_a_process("base", small=True)
    assert row == {"variant": "base", "status": gpu_variants.UNKNOWN} and not machine
    wrong = gpu_variants.refusal(f"{gpu_variants.COMMAND_BUFFER}NOTHING_KNOWN")
    assert wrong.startswith("failed: --xla_gpu_enable_command_buffer=NOTHING_KNOWN")


def test_this_jaxlib_knows_the_flags_of_all_variants():
    given = [variant.flags for variant in gpu_variants.VARIANTS.values()]
    assert len([*filter(None, given)]) >= 5
    assert gpu_variants.refusal(" ".join(given)) is None


def test_flags_of_a_variant_are_added_to_those_that_are_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    assert gpu_variants.with_flags("--b=")["XLA_FLAGS"] == "--a=1 --b="
    monkeypatch.delenv("XLA_FLAGS")
    assert gpu_variants.with_flags("--b=")["XLA_FLAGS"] == "--b="


MEASURED = {"step_s": 2.0, "loss": 5.0, "compiled_gb": 7.0, "compile_s": 9.0}


def variants_of(monkeypatch, tmp_path, measured, **options):
    """Run the benchmark with what `measured` returns for a name; return its status."""
    monkeypatch.setattr(
        gpu_variants,
        "in_a_process",
        lambda name, small: ({"variant": name} | measured(name), {"platform": "gpu"}),
    )
    values = {"variants": ["base", "conv_nhwc", "padded_head"], "quick": True}
    values |= {"own": None, "json": str(tmp_path / "variants.json")}
    status = gpu_variants.main(SimpleNamespace(**values | options))
    return status, benchmarks.read(values["json"])


def test_variants_go_on_where_a_call_ended_beside_a_base_of_their_own(
    monkeypatch, tmp_path
):
    order = []

    def measured(name):
        order.append(name)
        if name == "padded_head" and order.count("base") == 1:
            raise TimeoutError
        seconds = {"base": 2.0 * order.count("base"), "conv_nhwc": 1.0}
        return MEASURED | {"status": "ok", "step_s": seconds.get(name, 6.0)}

    with pytest.raises(TimeoutError):
        variants_of(monkeypatch, tmp_path, measured)
    status, found = variants_of(monkeypatch, tmp_path, measured)
    assert status == 0 and found["machine"] == {"platform": "gpu"}
    assert order == ["base", "conv_nhwc", "padded_head", "base", "padded_head"]
    rows = {row["variant"]: row for row in found["variants"]}
    assert rows["conv_nhwc"]["base_s"] == 2 and rows["conv_nhwc"]["ratio"] == 0.5
    assert rows["padded_head"]["base_s"] == 4 and rows["padded_head"]["ratio"] == 1.5
    assert found["headline"]["base_s"] == 4
    assert found["headline"]["padded_head_ratio"] == 1.5
    assert variants_of(monkeypatch, tmp_path, measured) == (0, found)
    assert len(order) == 5  # nothing is missing
    variants_of(monkeypatch, tmp_path, measured, quick=False, variants=["conv_nhwc"])
    assert len(order) == 5  # without a GPU the small form is that of --quick too
    monkeypatch.setattr(gpu_variants, "gpus", lambda: ["NVIDIA H100, 580"])
    variants_of(monkeypatch, tmp_path, measured, variants=["conv_nhwc"])
    assert order[5:] == ["base", "conv_nhwc"]  # another device's do not count


def test_variants_that_fail_or_deviate_are_repeated_and_others_kept(
    monkeypatch, tmp_path
):
    order = []

    def measured(name):
        order.append(name)
        status = {"padded_head": "out of memory", "blocks_x4": gpu_variants.UNKNOWN}
        if name in status:
            return {"status": status[name]}
        loss = 5.1 if name == "conv_nhwc" else 5.0
        return MEASURED | {"status": "ok", "loss": loss}

    names = ["conv_nhwc", "padded_head", "blocks_x4"]
    status, found = variants_of(monkeypatch, tmp_path, measured, variants=names)
    rows = {row["variant"]: row for row in found["variants"]}
    assert status == 1
    assert rows["conv_nhwc"]["status"] == "failed: the loss deviates by 2.0e-02"
    assert rows["conv_nhwc"]["loss_deviation"] == pytest.approx(0.02)
    assert "out of memory" in gpu_variants.line(rows["padded_head"])
    variants_of(monkeypatch, tmp_path, measured, variants=names)
    assert order == ["base", *names, "base", "conv_nhwc"]


def test_a_variant_is_changed_while_it_is_measured_and_no_longer(monkeypatch):
    entries, seen = by_platform.entries_at_a_time(), []

    def timed(config, *, repeats):
        seen.append(by_platform.entries_at_a_time())
        raise RuntimeError("RESOURCE_EXHAUSTED" if len(seen) == 1 else "wrong")

    monkeypatch.setattr(gpu_variants, "_timed", timed)
    row = gpu_variants.own_row("blocks_x4", small=True)
    assert row == {"variant": "blocks_x4", "side": 32, "status": "out of memory"}
    assert gpu_variants.own_row("base", small=True)["status"] == "failed: wrong"
    assert seen == [4 * entries, entries]


def test_convolutions_of_stacked_planes_take_the_place_of_others(rng):
    parts = [jnp.asarray(rng.normal(size=(1, 3, 4, 5, c)), jnp.float32) for c in (2, 1)]
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 3, 2)), jnp.float32)
    plain = by_platform.conv3x3x3
    with gpu_variants.planes():
        found = by_platform.conv3x3x3(*parts, kernel)
    assert by_platform.conv3x3x3 is plain
    assert (found == stacked_planes.conv(jnp.concatenate(parts, -1), kernel)).all()
    np.testing.assert_allclose(found, plain(*parts, kernel), rtol=1e-5, atol=2e-5)


def test_a_padded_head_has_the_same_loss_and_gradients(rng):
    features = jnp.asarray(rng.normal(size=(2, 4, 3, 3, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(6, 118)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=118), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 118, (2, 4, 3, 3)), jnp.uint8)

    def gradients():
        loss = losses.make("dice_ce")
        found = jax.value_and_grad(
            lambda *operands: loss.of_features(*operands, labels), (0, 1, 2)
        )
        operands = features, kernel, bias
        return found(*operands), str(jax.make_jaxpr(found)(*operands))

    ours, plain = gradients()
    with gpu_variants.padded_head():
        padded, wider = gradients()
    assert "2,4,3,3,120]" in wider and "2,4,3,3,118]" not in wider
    assert "2,4,3,3,120]" not in plain
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


COPIES = """
%fused_computation.1 (p: f32[8,4]) -> f32[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %copy.9 = f32[8,4]{0,1} copy(%p), metadata={op_name="jit(step)/stage1/add"}
}

%body.1 (t: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  %t = (s32[], bf16[2,3]{1,0}) parameter(0)
  %element.1 = bf16[2,3]{1,0} get-tuple-element(%t), index=1
  %copy.4 = bf16[2,3]{0,1} copy(%element.1), metadata={op_name="jit(step)/head/dot"}
}

%region (a: f32[], b: f32[]) -> f32[] {
  %copy.7 = f32[] copy(%a)
}

ENTRY %main.5 (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %add.2 = f32[8,4]{1,0} fusion(%a), kind=kLoop, calls=%fused_computation.1
  %dot.2 = f32[8,4]{1,0} dot(%a, %a), metadata={op_name="jit(step)/decoder1/dot"}
  %bitcast.3 = f32[4,8]{1,0} bitcast(f32[8,4]{1,0} %dot.2)
  %copy-start.1 = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]) copy-start(%bitcast.3)
  %copy-done.1 = f32[4,8]{1,0} copy-done(%copy-start.1)
  %wrapped_copy = pred[8]{0} fusion(%a), kind=kLoop, calls=%fused_computation.1
  %sum = f32[] reduce(%a, %a), to_apply=%region
  ROOT %while.1 = (s32[]) while(%t), condition=%cond, body=%body.1, LOOP
}
""".replace("LOOP", 'backend_config={"known_trip_count":{"n":"32"},"more":[]}')


def test_copies_of_a_program_are_counted_by_the_operations_they_belong_to():
    total, *rows = gpu_copies.copies(COPIES)
    assert (total["copies"], total["bytes"]) == (34, 32 * 12 + 128 + 8)
    found = {(r["stage"], r["operation"]): (r["copies"], r["bytes"]) for r in rows}
    assert found == {
        ("head", "dot"): (32, 32 * 12),  # of a loop
        ("decoder1", "dot"): (1, 128),  # has the name of what it copies
        ("other", "unknown"): (1, 8),
    }
    assert [r["stage"] for r in gpu_copies.copies(COPIES, most=1)][:2] == [
        "all",
        "head",
    ]
    assert "32 copies" in gpu_copies.line(rows[0])


def test_the_small_form_of_the_check_has_that_of_its_variants():
    commands = [
        gpu_check.command_of("variants", SimpleNamespace(quick=quick))
        for quick in (True, False)
    ]
    assert [command[2:] for command in commands] == [
        ["benchmarks.gpu_variants", "--quick"],
        ["benchmarks.gpu_variants"],
    ]


@pytest.mark.slow
def test_a_variant_is_measured_beside_base_in_its_own_process(tmp_path):
    file = tmp_path / "variants.json"
    command = [sys.executable, "-m", "benchmarks.gpu_variants", f"--json={file}"]
    command += ["--quick", "--variants=padded_head"]
    subprocess.run(command, check=True, cwd=ROOT)
    found = json.loads(file.read_text())
    base, padded = found["variants"]
    assert (base["variant"], padded["variant"]) == ("base", "padded_head")
    assert base["status"] == padded["status"] == "ok"
    assert padded["loss_deviation"] < 1e-5 and padded["attention"]["windows"]
    assert padded["ratio"] == padded["step_s"] / base["step_s"] > 0
    assert base["copies_compiled"][0]["copies"] > 0
    assert found["machine"]["platform"] == "cpu"
