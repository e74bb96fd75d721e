"""One measurement of a network in a process of its own; `benchmarks.model` starts it.

    python -m benchmarks.model_worker JSON

The JSON is a `Job`'s fields. The last line of the output is JSON: `seconds` of each
repeat after one that is not counted, `compile_s`, and `peak_gb`, of the process on a
CPU, else of the device's allocator.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable

CONFIGS = {
    "swin_smt_e4": "swin_smt_e4",
    "swin_smt_e32": "swin_smt_paper",
    "swin_unetr_b": "swin_unetr_b",
}


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
        remat: False keeps all activations, whatever the config says.
        repeats: timed runs; 0 compiles alone.
        threads: CPU cores; 0 for all.
        cache: folder of compiled programs.
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


def measure(job: Job) -> dict:
    """Measure in this process."""
    if job.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    return _jax(job) if job.framework == "jax" else _torch(job)


def _config(job):
    from swinsmt_jax.config import from_config_dict

    config = importlib.import_module(f"configs.{CONFIGS[job.network]}").get_config()
    config.model.dtype = job.dtype
    config.data.batch_size = job.batch
    config.data.patch_shape = (job.side,) * 3
    if not job.remat:
        config.model.remat = ()
    return from_config_dict(config)


def model_config(job: Job):
    """Return the config of a job's network."""
    return _config(job).model


def _jax(job):
    import jax

    jax.config.update("jax_compilation_cache_dir", job.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    start = time.perf_counter()
    compiled, make = _jax_step(job) if job.what == "step" else _jax_function(job)
    found = {"compile_s": time.perf_counter() - start}
    memory = compiled.memory_analysis()
    compiled_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    found["compiled_gb"] = compiled_bytes / 1e9
    if not job.repeats:
        return found
    carried, batch = make()

    def run():
        nonlocal carried
        out = jax.block_until_ready(compiled(carried, batch))
        if job.what == "step":
            carried = out[0]

    found |= _timed(run, job.repeats)
    if jax.default_backend() != "cpu":
        found["peak_gb"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
    return found


def _jax_function(job):
    """Compile the forward pass or the gradient; return it and its arguments' maker."""
    program, shapes, make = network_program(job)
    return program.lower(*shapes).compile(), make


def network_program(job: Job):
    """Return the jitted forward pass or gradient, its arguments' shapes and maker."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from swinsmt_jax import models
    from swinsmt_jax.layers import recompute
    from swinsmt_jax.models import abstract_model, split

    config = _config(job).model
    graphdef, params = abstract_model(config)

    def forward(params, x):
        return nnx.merge(graphdef, params)(x)

    def gradient(params, x):
        return jax.value_and_grad(lambda p: jnp.square(forward(p, x)).mean())(params)

    x = jax.ShapeDtypeStruct((job.batch, *(job.side,) * 3, 1), jnp.float32)
    program = jax.jit(
        forward if job.what == "forward" else gradient,
        compiler_options=recompute.compiler_options(jax.default_backend()),
    )

    def make():
        _, values = split(models.create(config, rngs=nnx.Rngs(0)))
        return values, jax.random.uniform(jax.random.key(0), x.shape)

    return program, (params, x), make


def _jax_step(job):
    """Compile the training step; return it and its arguments' maker."""
    import jax
    import jax.numpy as jnp

    from swinsmt_jax import sharding
    from swinsmt_jax.training import losses
    from swinsmt_jax.training.optimizer import make_optimizer, make_schedule
    from swinsmt_jax.training.state import abstract_state, initialize
    from swinsmt_jax.training.step import make_train_step

    config = _config(job)
    mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
    schedule = make_schedule(config.optimizer, num_steps=1000)
    optimizer = make_optimizer(config.optimizer, schedule, network=config.model)
    graphdef, abstract = abstract_state(config.model, optimizer, mesh=mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=losses.make("dice_ce"),
        schedule=schedule,
        seed=0,
        abstract=abstract,
        mesh=mesh,
    )
    shape = (job.batch, *(job.side,) * 3)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, 1), jnp.float32),
        "label": jax.ShapeDtypeStruct(shape, jnp.uint8),
    }

    def make():
        key = jax.random.key(0)
        image = jax.random.uniform(key, (*shape, 1))
        label = jax.random.randint(key, shape, 0, config.model.out_channels, jnp.uint8)
        batch = sharding.place_batch({"image": image, "label": label}, mesh)
        return initialize(config.model, optimizer, seed=0, abstract=abstract), batch

    return step.lower(abstract, batch).compile(), make


def _torch(job):
    import torch
    from monai.losses import DiceCELoss

    from benchmarks import pytorch_network

    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    config = _config(job).model
    network = pytorch_network.create(config).to(device)
    x = torch.rand(job.batch, 1, *(job.side,) * 3, device=device)
    if on_gpu:
        network = network.to(memory_format=torch.channels_last_3d)
        x = x.to(memory_format=torch.channels_last_3d)
    y = torch.randint(0, config.out_channels, x.shape, device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-4)
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
