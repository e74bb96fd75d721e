"""One measurement of a network in a process of its own; `benchmarks.model` starts it.

    python -m benchmarks.model_worker JSON

The JSON is a `Job`'s fields. The last line of the output is JSON: `seconds` of each
repeat after one that is not counted, `compile_s`, and `peak_gb`, of the process on a
CPU, else of the device's allocator. A process imports only the framework it measures.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks import ROOT, memory_limit_gb

CONFIGS = {
    "swin_smt_e4": "swin_smt_e4",
    "swin_smt_e32": "swin_smt_paper",
    "swin_unetr_b": "swin_unetr_b",
}

LIMIT = 1800  # seconds of one process


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        framework: "jax", "torch" or "torch.compile".
        network: of `CONFIGS`.
        side: of the patch.
        what: "forward"; "gradient", of the mean square of the logits; "step", of the
            training: Dice plus cross-entropy, clipping, AdamW.
        dtype: "float32" or "bfloat16", with autocast in PyTorch.
        batch: patches.
        remat: True recomputes all parts in the backward pass; False none.
        repeats: timed runs; 0 compiles alone.
        threads: CPU cores; 0 for all.
        cache: folder of compiled programs; "" leaves it to JAX_COMPILATION_CACHE_DIR.
    """

    framework: str
    network: str
    side: int
    what: str
    dtype: str = "float32"
    batch: int = 1
    remat: bool = False
    repeats: int = 2
    threads: int = 0
    cache: str = ""


def keep_to_cores(threads: int) -> None:
    """Keep this process to some of its cores; 0 leaves all."""
    if threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def start(job: Job) -> dict:
    """Measure in a process; return what it found, or {"error": the last line}."""
    missing = shortage(job)
    if missing:
        return {"error": missing}
    command = (sys.executable, "-m", "benchmarks.model_worker")
    try:
        done = subprocess.run(
            [*command, json.dumps(dataclasses.asdict(job))],
            cwd=ROOT,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {LIMIT} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def shortage(job: Job) -> str | None:
    """Return why a job is known not to fit, or None.

    The PyTorch network makes three matrices of tokens x slots at once in its first Soft
    MoE, and dynamic slots are as many as the tokens.
    """
    if job.framework == "jax":
        return None
    config = experiment(job).model
    if not config.num_experts or config.slots != "dynamic":
        return None
    tokens = (job.side // 2 ** (5 - config.num_moe_stages)) ** 3
    needed = 3 * job.batch * tokens**2 * (4 if job.dtype == "float32" else 2) / 1e9
    limit = memory_limit_gb()
    if needed <= limit:
        return None
    return f"skipped: needs more than {needed:.0f} GB, and {limit:.0f} GB are free"


def measure(job: Job) -> dict:
    """Measure in this process."""
    keep_to_cores(job.threads)
    return _jax(job) if job.framework == "jax" else _torch(job)


def experiment(job: Job):
    """Return the config of a job's experiment."""
    from benchmarks import programs
    from swinsmt_jax.config import from_config_dict

    module = importlib.import_module(f"swinsmt_jax.configs.{CONFIGS[job.network]}")
    config = module.get_config()
    config.model.dtype = job.dtype
    config.data.batch_size = job.batch
    config.data.patch_shape = (job.side,) * 3
    config.model.remat = ()
    config = from_config_dict(config)
    model = programs.with_all_recomputed(config.model) if job.remat else config.model
    return dataclasses.replace(config, model=model)


def _jax(job):
    import jax

    from benchmarks.programs import gigabytes

    if job.cache:
        jax.config.update("jax_compilation_cache_dir", job.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    start = time.perf_counter()
    lowered, make = _step(job) if job.what == "step" else _function(job)
    compiled = lowered.compile()
    found = {"compile_s": time.perf_counter() - start}
    found["compiled_gb"] = gigabytes(compiled)
    if not job.repeats:
        return found
    arguments = list(make())

    def run():
        out = jax.block_until_ready(compiled(*arguments))
        if job.what == "step":
            arguments[0] = out[0]

    found |= _timed(run, job.repeats)
    if jax.default_backend() != "cpu":
        found["peak_gb"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
    return found


def _function(job):
    """Lower the forward pass or the gradient; return it and its arguments' maker."""
    from benchmarks import programs

    what = {"forward": "forward", "gradient": "square"}[job.what]
    model = experiment(job).model
    program, shapes = programs.program(model, job.side, what=what, batch=job.batch)
    return program.lower(*shapes), lambda: programs.random_arguments(shapes)


def _step(job):
    """Lower the training step; return it and its arguments' maker."""
    import jax

    from benchmarks import programs
    from swinsmt_jax import sharding

    config = experiment(job)
    mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
    step, abstract_state, start = programs.training_step(config, mesh)
    shape = (job.batch, *(job.side,) * 3)

    def make():
        classes = config.model.out_channels
        return start(), programs.random_batch(shape, mesh, classes=classes)

    return step.lower(abstract_state, programs.abstract_batch(shape, mesh)), make


def _torch(job):
    import torch
    from monai.losses import DiceCELoss

    from benchmarks import pytorch_network

    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    config = experiment(job).model
    torch.backends.cudnn.benchmark = on_gpu
    fused = on_gpu and job.what == "forward"
    network = pytorch_network.create(config, fused=fused).to(device)
    x = torch.rand(job.batch, 1, *(job.side,) * 3, device=device)
    if on_gpu:
        network = network.to(memory_format=torch.channels_last_3d)
        x = x.to(memory_format=torch.channels_last_3d)
    y = torch.randint(0, config.out_channels, x.shape, device=device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, weight_decay=1e-4, fused=on_gpu or None
    )
    dice_cross_entropy = DiceCELoss(to_onehot_y=True, softmax=True)
    apply = torch.compile(network) if job.framework == "torch.compile" else network
    narrow = torch.autocast(device, torch.bfloat16, enabled=job.dtype == "bfloat16")

    def run():
        with narrow, torch.set_grad_enabled(job.what != "forward"):
            logits = apply(x)
        if job.what == "gradient":
            logits.float().square().mean().backward()
            optimizer.zero_grad()
        elif job.what == "step":
            dice_cross_entropy(logits.float(), y).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()

    found = _timed(run, job.repeats)
    if on_gpu:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found | {"compile_s": found["first_s"] - min(found["seconds"])}


def _timed(run: Callable[[], None], repeats: int) -> dict:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"first_s": seconds[0], "seconds": seconds[1:], "peak_gb": peak}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(Job(**json.loads(sys.argv[1])))
    print(json.dumps(result))
