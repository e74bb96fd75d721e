"""What the benchmarks make of their measurements."""

import json
import subprocess
import sys
from multiprocessing import shared_memory

import jax
import jax.numpy as jnp
import pytest

import benchmarks
from benchmarks import input_pipeline, metrics, model, roofline, scaling, store_formats
from benchmarks.model_worker import Job

JOB = Job("", "swin_smt_e4", 96, "gradient")


def measured(seconds, gigabytes):
    compiled = {"compile_s": 1.0, "compiled_gb": 1.5}
    return {"seconds": seconds, "peak_gb": gigabytes, **compiled}


def test_frameworks_take_turns_and_ratios_are_of_medians(monkeypatch, tmp_path):
    turns = {
        "jax": [measured([3.0, 1.0], 2.0), measured([2.0, 9.0], 2.0)],
        "torch": [measured([4.0], 8.0), measured([6.0], 8.0)],
    }
    order = []

    def start(job):
        order.append(job.framework)
        return turns[job.framework].pop(0)

    monkeypatch.setattr(model, "start", start)
    row = model.compare(JOB, ("jax", "torch"), rounds=2)
    assert order == ["jax", "torch"] * 2
    assert row["jax"]["seconds"] == 2.5 and row["time_ratio"] == 0.5
    found = model.headline([row])
    assert found["fwdbwd_96_time_ratio"] == 0.5
    assert found["fwdbwd_96_memory_ratio"] == 0.25
    assert found["fwd_128_time_ratio"] is None
    assert "x 0.50" in model.line(row)
    model.plot([row], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_without_pytorch_there_is_no_ratio(monkeypatch):
    def start(job):
        if job.framework == "torch":
            return {"error": "ModuleNotFoundError: No module named 'torch'"}
        return measured([1.0], 2.0)

    monkeypatch.setattr(model, "start", start)
    row = model.compare(JOB, ("jax", "torch"), rounds=1)
    assert "time_ratio" not in row and "ModuleNotFound" in model.line(row)
    assert model.headline([row])["fwdbwd_96_time_ratio"] is None


def test_the_compiled_network_is_measured_after_all_others(monkeypatch, tmp_path):
    order = []

    def start(job):
        order.append(job.framework)
        seconds = {"jax": 1.0, "torch": 4.0, "torch.compile": 3.0}[job.framework]
        return measured([seconds], 2.0)

    monkeypatch.setattr(model, "start", start)
    job = Job("jax", "swin_smt_e32", 96, "step")
    found = {"command": "", "rows": []}
    path = tmp_path / "figures.json"
    model.measure_rows([job], ["torch", "torch.compile"], 1, found, str(path))
    assert order == ["jax", "jax", "torch", "torch.compile"]  # at first to compile
    known = json.loads(path.read_text())
    assert known["rows"][0]["torch.compile"]["seconds"] == 3
    assert known["headline"]["step_96_swin_smt_e32_time_ratio"] == 1 / 4
    assert known["headline"]["step_96_swin_smt_e32_memory_ratio"] == 1
    assert known["headline"]["step_96_swin_smt_e32_time_ratio_to_compiled"] == 1 / 3


def test_a_stopped_comparison_goes_on_where_it_ended(monkeypatch, tmp_path):
    order = []

    def start(job):
        if (job.side, job.framework) == (128, "torch.compile") and not again:
            raise TimeoutError
        if job.repeats:
            order.append((job.side, job.framework))
        return measured([1.0], 2.0)

    monkeypatch.setattr(model, "start", start)
    jobs = [Job("jax", "swin_smt_e32", side, "step") for side in (96, 128)]
    path, again = tmp_path / "figures.json", False
    found = {"command": "", "rows": [], "machine": {}}
    with pytest.raises(TimeoutError):
        model.measure_rows(jobs, ["torch.compile"], 1, found, str(path))
    done = [(96, "jax"), (128, "jax"), (96, "torch.compile")]
    assert order == done
    again, known = True, benchmarks.read(path)
    model.measure_rows(jobs, ["torch.compile"], 1, known, str(path))
    assert order == [*done, (128, "torch.compile")]
    known = benchmarks.read(path)
    assert [row["side"] for row in known["rows"]] == [96, 128]
    assert known["headline"]["step_128_swin_smt_e32_time_ratio_to_compiled"] == 1


GPU_PROGRAM = """
  %fusion.1 = f32[8]{0} fusion(%a), metadata={op_name="jit(step)/stage1/dot"}
  ROOT %custom-call.2 = f32[8]{0} custom-call(%b), metadata={op_name="jit/decoder1/c"}
  %copy.3 = f32[8]{0} copy(%c)
  %while.4 = f32[8]{0} while(%d)
"""


def test_kernels_of_a_gpu_are_joined_with_the_stages_of_the_program():
    def kernel(name, microseconds, *, thread=7, **arguments):
        event = {"ph": "X", "pid": 1, "tid": thread, "name": name, "args": arguments}
        return event | {"dur": microseconds}

    def named(thread, name):
        about = {"ph": "M", "pid": 1, "tid": thread, "name": "thread_name"}
        return about | {"args": {"name": name}}

    events = [
        named(7, "Stream #7(Compute,MemcpyD2D)"),
        named(8, "Stream #8(MemcpyD2H)"),
        named(9, "XLA Ops"),
        kernel("cudnn::attention", 500.0, hlo_op="custom-call.2"),
        kernel("fusion_1", 200.0),  # tells no operation, but is named after it
        kernel("fusion.1", 200.0, thread=9, hlo_op="fusion.1"),  # the same in a summary
        kernel("wrapped_copy", 30.0, hlo_op="copy.3"),
        kernel("MemcpyD2H", 20.0, thread=8, hlo_op="while.4"),  # of a loop's condition
        kernel("void other()", 7.0),
    ]
    stages, totals = roofline.joined(events, GPU_PROGRAM)
    milliseconds = {
        name: (round(1e3 * own.seconds, 6), own.launches)
        for name, own in (stages | totals).items()
    }
    assert milliseconds == {
        "decoder1": (0.5, 1),
        "stage1": (0.2, 1),
        "other": (0.05, 2),
        "kernels": (0.757, 5),
        "copies": (0.05, 2),
        "unmatched": (0.007, 1),
    }


def test_operations_of_a_cpu_are_joined_without_their_loops():
    events = [
        {"ph": "X", "pid": 1, "tid": 1, "name": name, "dur": 1e6}
        for name in ("fusion.1", "while.4", "python function")
    ]
    stages, totals = roofline.joined(events, GPU_PROGRAM)
    assert stages == {"stage1": (1.0, 1)} and not totals


def test_operations_and_bytes_are_of_the_stage_that_names_them():
    def function(a, b):
        with jax.named_scope("stage2"):
            c = a @ b
        with jax.named_scope("decoder1"):
            return (c @ b).sum()

    a, b = jnp.ones((8, 4)), jnp.ones((4, 4))
    found = roofline.counts(jax.grad(function), a, b)
    assert found["stage2"] == {"operations": 512, "bytes": 4 * (32 + 16 + 32) * 2}
    assert found["decoder1"]["operations"] >= 256
    assert found["head"] == {"operations": 0, "bytes": 0}


def test_expected_efficiency_falls_with_nodes_and_bytes():
    assert scaling.meshes(4) == [(4, 1), (2, 2), (1, 4)]
    sent = {"all-reduce": {"bytes": 8e8, "count": 3}}
    row = {"data": 8, "expert": 1, "collectives": sent, "expert_gradients": 0}
    given = {"operations": 1e13, "utilisation": 0.3, "voxels": 8.0}
    one, eight = (scaling.expected(c, row, **given) for c in scaling.CLUSTERS[:2])
    # 2 * 7/8 * 0.8 GB at 300 GB/s; then 2 * 7/8 of an eighth at 25 GB/s.
    assert one["gradients_ms"] == pytest.approx(4.667, abs=1e-3)
    assert eight["gradients_ms"] == pytest.approx(4.667 + 7.0, abs=1e-3)
    assert one["compute_ms"] == pytest.approx(1e13 / (0.3 * 312e12) * 1e3)
    assert 0 < eight["no_overlap"] < one["no_overlap"] < one["overlap"] == 1.0
    sent["all-to-all"] = {"bytes": 24e6, "count": 32}
    divided = scaling.expected(
        scaling.CLUSTERS[0], row | {"expert": 2, "data": 4}, **given
    )
    # Half of 24 MB for 8 times the voxels, in two bytes where the CPU sent four.
    assert divided["exchange_ms"] == pytest.approx(0.16)


def test_a_file_in_a_missing_folder_is_refused_before_anything_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks.soft_moe", "--quick"]
    file = tmp_path / "missing" / "x.json"
    done = subprocess.run([*command, f"--json={file}"], capture_output=True, text=True)
    assert done.returncode != 0 and "folder that does not exist" in done.stderr


@pytest.mark.slow
def test_the_input_pipeline_is_measured_with_and_without_a_peer():
    settings = {"scans": 1, "spacing": 12.0, "cases": 5, "sides": (96,), "few": 1}
    ((threads, workers),) = configurations = (input_pipeline.RECOMMENDED,)
    rows = input_pipeline.measure(**settings, configurations=configurations, count=20)
    (own,) = [row for row in rows if row["pipeline"] == "ours"]
    assert own["crops_per_s_per_worker"] == own["crops_per_s"] / (workers or threads)
    assert 0 < own["early_mb"] <= own["peak_mb"]
    rate = own["crops_per_s"]
    peer = own | {"pipeline": "monai", "crops_per_s": rate / 4, "peak_mb": 1e9}
    wider = own | {"side": 128, "crops_per_s": 1.0, "peak_mb": own["peak_mb"] + 1}
    workers = own | {"workers": 2, "crops_per_s": 1e9, "peak_mb": 1e9}
    assert input_pipeline.headline([own, wider, workers]) == {
        "crops_per_s_96": rate,
        "ratio_to_monai_96": None,
        "worker_peak_mb": own["peak_mb"] + 1,
    }
    assert input_pipeline.headline([own, peer])["ratio_to_monai_96"] == 4


def test_shared_memory_is_counted_once_whether_mapped_or_waiting():
    before = frozenset(input_pipeline.shared())
    block = shared_memory.SharedMemory(create=True, size=2**20)
    try:
        assert set(input_pipeline.shared(before).values()) == {2**20}
    finally:
        block.unlink()
    assert set(input_pipeline.shared(before).values()) == {2**20}  # still mapped
    block.close()
    assert not input_pipeline.shared(before)


def test_formats_of_stores_are_measured():
    rows = store_formats.measure(spacing=12.0, side=16, count=2, rounds=1)
    assert [row["format"] for row in rows] == list(store_formats.FORMATS)
    assert all(row["crops_per_s"] > 0 and row["mb"] > 0 for row in rows)
    assert [row["files"] for row in rows if "shard" in row["format"]] == [2, 2, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scoring_is_measured_beside_deepminds_package():
    ways = ("ours", "surface-distance")
    rows = [metrics.measure(way, (48, 48, 64), repeats=1) for way in ways]
    found = metrics.headline(rows)
    assert found["surface_dice_from_surface-distance_48x48x64"] < 1e-8
    assert found["ratio_to_surface-distance_48x48x64"] > 0
    assert 0 < rows[0]["surface_dice"] < 1 and rows[0]["structures"] > 100
