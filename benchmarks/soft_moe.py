"""Time and memory of a Soft MoE's routing: dense, blockwise by autodiff, streaming.

    python -m benchmarks.soft_moe [--quick] [--json=FILE]
    python -m benchmarks.soft_moe --maps_of=runs/demo [--case=...] [--block=...]
        [--shares] [--quick] [--json=FILE]

One layer with dynamic slots, float32, batch 1. Memory is XLA's, of temporaries, and is
measured at every size; what needs more than --limit_gb is not run. "blockwise" is the
plain way to spare memory: dense routing of a block of slots, then of a block of tokens,
recomputed by `jax.checkpoint`. The share of the limit is that of the four
(forward) or fourteen (with gradient) products of tokens x slots x channels, in
the time that the same products take alone. On a GPU two more forms compute in bfloat16:
"streaming_bf16", and "cudnn", the fused kernel where its limits allow.

--quick compiles dense and streaming at 32,768 and 110,592 tokens for their memory, and
runs the forward pass of both once at 32,768: the headline's figures but for the
gradient's time, in a minute on two cores. The JSON is written after every row, so that
a run that is stopped keeps what it knows. What needs more memory than is free is left
out.

--maps_of shows instead which expert of a trained network looks where, on one case of a
split, for one Soft MoE block or all. Written to <workdir>/routing are:
- <case>_<block>_experts.nii.gz: each voxel's expert with the largest share, from 1;
- <case>_<block>_shares.nii.gz: the shares of all experts as a fourth axis, if --shares;
- <case>_<block>.png: CT, groups of the ground truth, and experts in two planes;
- <case>_<block>.csv: mean share of each expert in each anatomical group.
The JSON has these shares too, and how many experts of each block have next to no share
in any group. --quick takes the first block alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import memory_limit_gb, routing_maps, run, save, show
from benchmarks.programs import seconds_of
from swinsmt_jax.layers.soft_moe import SoftMoE, SoftMoEConfig
from swinsmt_jax.ops import by_platform, soft_routing
from swinsmt_jax.ops.normalization import rms_norm

SIZES = (4096, 8192, 32768, 110592)  # 64^3, ~ 80^3, 128^3 and 192^3 patches
MEASURED, LARGEST = 32768, 110592
BLOCK = 1024  # of the blockwise form
PRODUCTS = {"forward": 4, "gradient": 14}
ROUTING = {  # of each form, and the dtype of the experts and averages
    "dense": ("dense", "float32"),
    "blockwise": ("dense", "float32"),
    "streaming": ("streaming", "float32"),
    "streaming_bf16": ("streaming", "bfloat16"),
    "cudnn": ("cudnn", "bfloat16"),
}
PLAIN, ON_GPU = ("dense", "blockwise", "streaming"), ("streaming_bf16", "cudnn")


class Row(NamedTuple):
    """One form at one size; seconds and share are None where it was not run.

    Where it could not be compiled or run, `error` says why.
    """

    tokens: int
    form: str
    what: str
    temporaries_gb: float | None = None
    seconds: float | None = None
    share_of_limit: float | None = None
    error: str | None = None


def form(name, channels, num_experts):
    """Return (function of parameters and tokens, parameters) of a form."""
    routing, dtype = ROUTING[name]
    moe = SoftMoE(
        channels,
        SoftMoEConfig(num_experts=num_experts, routing=routing),
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(moe)
    run = blockwise if name == "blockwise" else lambda moe, x: moe(x)
    return functools.partial(_merged, run, graphdef), params


def _merged(run, graphdef, params, x):
    return run(nnx.merge(graphdef, params), x)


def blockwise(moe, x):
    """Dispatch a block of slots at a time, then combine a block of tokens at a time."""
    tokens = rms_norm(x, moe.gamma[...])
    slots = moe.slot_embeddings(tokens)
    b, e, s, c = slots.shape

    @jax.checkpoint
    def dispatch(part):
        logits = soft_routing.logits(tokens, part[:, None])
        return soft_routing.dispatch(soft_routing.dispatch_weights(logits), tokens)

    @jax.checkpoint
    def combine(part):
        logits = soft_routing.logits(part, slots)
        return soft_routing.combine(soft_routing.combine_weights(logits), outputs)

    def blocks(a):
        return jnp.moveaxis(a.reshape(b, -1, min(BLOCK, tokens.shape[1]), c), 1, 0)

    inputs = jax.lax.map(dispatch, blocks(slots.reshape(b, e * s, c)))
    outputs = moe.experts(jnp.moveaxis(inputs[:, :, 0], 0, 1).reshape(b, e, s, c))
    return jnp.moveaxis(jax.lax.map(combine, blocks(tokens)), 0, 1).reshape(x.shape)


def error_of_bfloat16_logits(tokens, channels, num_experts):
    """Return the relative L2 error of a new layer if logits had bfloat16 operands.

    That is what the fused attention of cuDNN takes.
    """
    options = SoftMoEConfig(num_experts=num_experts, routing="dense")
    moe = SoftMoE(channels, options, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, tokens, channels))

    @functools.partial(jax.jit, static_argnums=0)
    def output(dtype):
        normed = rms_norm(x, moe.gamma[...])
        slots = moe.slot_embeddings(normed)
        logits = soft_routing.logits(normed.astype(dtype), slots.astype(dtype))
        inputs = soft_routing.dispatch(soft_routing.dispatch_weights(logits), normed)
        weights = soft_routing.combine_weights(logits)
        return soft_routing.combine(weights, moe.experts(inputs))

    exact = output("float32")
    return float(jnp.linalg.norm(output("bfloat16") - exact) / jnp.linalg.norm(exact))


def gradient_of(function):
    """Return the gradient of the sum of squares in parameters and tokens."""
    return jax.grad(lambda params, x: jnp.square(function(params, x)).sum(), (0, 1))


def seconds_of_a_product(tokens, channels):
    """Return the seconds of one product of tokens x slots x channels, in blocks."""
    platform = "cpu" if jax.default_backend() == "cpu" else "default"
    rows, columns = by_platform.ATTENTION_BLOCK[platform]
    columns = min(columns, tokens)
    repeats = max(1, 2**26 // (rows * columns))

    @jax.jit
    def products(a, b):
        def add(i, total):
            return total + (a + i) @ b

        return jax.lax.fori_loop(0, repeats, add, jnp.zeros((rows, channels)))

    arguments = jnp.ones((rows, columns)), jnp.ones((columns, channels))
    seconds = min(seconds_of(products, *arguments, repeats=3))
    return seconds / (repeats * rows * columns) * tokens**2


def measure(tokens, what, name, *, channels, experts, limit_gb, run):
    """Return the row of one form."""
    x = jax.random.normal(jax.random.key(0), (1, tokens, channels))
    function, params = form(name, channels, experts)
    function = function if what == "forward" else gradient_of(function)
    row = Row(tokens, name, what)
    try:
        compiled = jax.jit(function).lower(params, x).compile()
        gb = compiled.memory_analysis().temp_size_in_bytes / 1e9
        row = row._replace(temporaries_gb=gb)
        if run and gb <= limit_gb:
            repeats, warm = (1, 0) if tokens >= MEASURED else (3, 1)
            times = seconds_of(compiled, params, x, repeats=repeats, warm=warm)
            seconds = min(times)
            product = seconds_of_a_product(tokens, channels)
            share = PRODUCTS[what] * product / seconds
            row = row._replace(seconds=seconds, share_of_limit=share)
    except Exception as error:  # of XLA and cuDNN: what they raise differs
        row = row._replace(error=str(error)[:300])
    return row


def line(row):
    """Format a row of the table."""
    text = f"{row.tokens:7} tokens  {row.form:14} {row.what:9} "
    if row.temporaries_gb is not None:
        text += f"{row.temporaries_gb:8.3f} GB  "
    if row.error:
        return text + row.error.splitlines()[0][:60]
    if row.seconds is None:
        return text + "not run"
    return text + f"{row.seconds:9.3f} s {row.share_of_limit:8.0%} of the limit"


def plan(*, quick, on_gpu):
    """Return (tokens, what, form, whether to run it) of every row, in order."""
    names = PLAIN + (ON_GPU if on_gpu else ())
    if not quick:
        return [
            (tokens, what, name, tokens <= MEASURED)
            for tokens in SIZES
            for what in PRODUCTS
            for name in names
        ]
    names = [name for name in names if name != "blockwise"]
    compiled = [(n, "gradient", f, on_gpu) for n in (MEASURED, LARGEST) for f in names]
    # Streaming before dense, which takes longest and most.
    return compiled + [(MEASURED, "forward", name, True) for name in reversed(names)]


def headline(rows):
    """Return the figures that the issue of memory is judged by, by name."""
    found = {(r.tokens, r.form, r.what): r for r in rows}

    def ratio(what, form, other):
        ours, theirs = (found.get((MEASURED, f, what)) for f in (form, other))
        if not (ours and theirs and ours.seconds and theirs.seconds):
            return None
        return ours.seconds / theirs.seconds

    def memory(tokens):
        row = found.get((tokens, "streaming", "gradient"))
        return row and row.temporaries_gb

    figures = {
        "grad_temp_gb_32768": memory(MEASURED),
        "grad_temp_gb_110592": memory(LARGEST),
        "forward_ratio_32768": ratio("forward", "streaming", "dense"),
        "gradient_ratio_to_blockwise_32768": ratio(
            "gradient", "streaming", "blockwise"
        ),
    }
    if any(row.form == "cudnn" for row in rows):
        for what in PRODUCTS:
            name = f"cudnn_{what}_ratio_to_streaming_bf16_32768"
            figures[name] = ratio(what, "cudnn", "streaming_bf16")
    return figures


def main(options):
    if options.maps_of:
        return routing_maps.draw_maps(options)
    on_gpu = jax.default_backend() == "gpu"
    print(f"{jax.devices()[0].device_kind}, {options.channels} channels, float32")
    limit, rows = memory_limit_gb(options.limit_gb), []
    for tokens, what, name, runs in plan(quick=options.quick, on_gpu=on_gpu):
        row = measure(
            tokens,
            what,
            name,
            channels=options.channels,
            experts=options.experts,
            limit_gb=limit,
            run=runs,
        )
        rows.append(row)
        print(line(row), flush=True)
        save(headline(rows), rows=[row._asdict() for row in rows])
    figures = headline(rows)
    figures["error_of_bfloat16_logits"] = error_of_bfloat16_logits(
        1024, options.channels, options.experts
    )
    save(figures, rows=[row._asdict() for row in rows])
    show(figures)


if __name__ == "__main__":
    flags.DEFINE_integer("channels", 96, "channels of a token")
    flags.DEFINE_integer("experts", 32, "experts")
    flags.DEFINE_float("limit_gb", 14.0, "run what needs no more temporaries")
    routing_maps.define_flags()
    run(main, quick="the headline's figures alone, or the first block")
