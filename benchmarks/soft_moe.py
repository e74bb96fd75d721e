"""Time and memory of a Soft MoE's routing: dense, blockwise by autodiff, streaming.

    python -m benchmarks.soft_moe [--quick] [--json=FILE]

One layer with dynamic slots, float32, batch 1. Memory is XLA's, of temporaries, and is
measured at every size; what needs more than --limit_gb is not run. "blockwise" is the
plain way to spare memory: dense routing of a block of slots, then of a block of tokens,
recomputed by `jax.checkpoint`. The share of the limit is that of the four
(forward) or fourteen (with gradient) products of tokens x slots x channels, in
the time that the same products take alone. --quick runs one size, forward.
"""

import functools
import json
import platform
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks import command_line, define_file
from swinsmt_jax.layers.soft_moe import SoftMoE
from swinsmt_jax.ops import blockwise_attention, soft_routing
from swinsmt_jax.ops.normalization import rms_norm

SIZES = (4096, 8192, 32768, 110592)  # 64^3, ~ 80^3, 128^3 and 192^3 patches
MEASURED = 32768
BLOCK = 1024  # of the blockwise form
PRODUCTS = {"forward": 4, "gradient": 14}


class Row(NamedTuple):
    """One form at one size; seconds and share are None where it was not run."""

    tokens: int
    form: str
    what: str
    temporaries_gb: float
    seconds: float | None = None
    share_of_limit: float | None = None


def forms(channels, num_experts):
    """Return {form: (function of parameters and tokens, parameters)}."""
    found = {}
    for name in ("dense", "blockwise", "streaming"):
        moe = SoftMoE(
            channels,
            num_experts=num_experts,
            routing="streaming" if name == "streaming" else "dense",
            rngs=nnx.Rngs(0),
        )
        graphdef, params = nnx.split(moe)
        run = blockwise if name == "blockwise" else lambda moe, x: moe(x)
        found[name] = (functools.partial(_merged, run, graphdef), params)
    return found


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
    moe = SoftMoE(channels, num_experts=num_experts, routing="dense", rngs=nnx.Rngs(0))
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


def seconds_of(compiled, *arguments, repeats):
    """Return the fastest of the repeats, after one run to warm up if there are many."""
    if repeats > 1:
        jax.block_until_ready(compiled(*arguments))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        found.append(time.perf_counter() - start)
    return min(found)


def seconds_of_a_product(tokens, channels):
    """Return the seconds of one product of tokens x slots x channels, in blocks."""
    rows, columns = blockwise_attention.CPU_BLOCK
    if jax.default_backend() != "cpu":
        rows, columns = blockwise_attention.ACCELERATOR_BLOCK
    columns = min(columns, tokens)
    repeats = max(1, 2**26 // (rows * columns))

    @jax.jit
    def products(a, b):
        def add(i, total):
            return total + (a + i) @ b

        return jax.lax.fori_loop(0, repeats, add, jnp.zeros((rows, channels)))

    arguments = jnp.ones((rows, columns)), jnp.ones((columns, channels))
    jax.block_until_ready(products(*arguments))
    seconds = seconds_of(products, *arguments, repeats=3)
    return seconds / (repeats * rows * columns) * tokens**2


def measure(tokens, *, channels, experts, limit_gb, repeats, whats, run):
    """Yield the rows of one size."""
    x = jax.random.normal(jax.random.key(0), (1, tokens, channels))
    product = seconds_of_a_product(tokens, channels) if run else None
    for what in whats:
        for form, (function, params) in forms(channels, experts).items():
            function = function if what == "forward" else gradient_of(function)
            compiled = jax.jit(function).lower(params, x).compile()
            gb = compiled.memory_analysis().temp_size_in_bytes / 1e9
            row = Row(tokens, form, what, gb)
            if run and gb <= limit_gb:
                seconds = seconds_of(compiled, params, x, repeats=repeats)
                share = PRODUCTS[what] * product / seconds
                row = row._replace(seconds=seconds, share_of_limit=share)
            print(_line(row), flush=True)
            yield row


def _line(row):
    ran = "not run"
    if row.seconds is not None:
        ran = f"{row.seconds:9.3f} s {row.share_of_limit:8.0%} of the limit"
    return (
        f"{row.tokens:7} tokens  {row.form:10} {row.what:9} "
        f"{row.temporaries_gb:8.3f} GB  {ran}"
    )


def headline(rows):
    """Return the figures that the issue of memory is judged by, by name."""
    found = {(r.tokens, r.form, r.what): r for r in rows}

    def ratio(what, other, tokens=MEASURED):
        ours, theirs = (found.get((tokens, f, what)) for f in ("streaming", other))
        if not (ours and theirs and ours.seconds and theirs.seconds):
            return None
        return ours.seconds / theirs.seconds

    def memory(tokens):
        row = found.get((tokens, "streaming", "gradient"))
        return row and row.temporaries_gb

    return {
        "grad_temp_gb_32768": memory(MEASURED),
        "grad_temp_gb_110592": memory(110592),
        "forward_ratio_32768": ratio("forward", "dense"),
        "gradient_ratio_to_blockwise_32768": ratio("gradient", "blockwise"),
    }


def main(_):
    print(f"{jax.devices()[0].device_kind}, {_CHANNELS.value} channels, float32")
    rows = []
    for tokens in SIZES:
        run = tokens == MEASURED if _QUICK.value else tokens <= MEASURED
        rows += measure(
            tokens,
            channels=_CHANNELS.value,
            experts=_EXPERTS.value,
            limit_gb=_LIMIT.value,
            repeats=1 if tokens >= MEASURED else 3,
            whats=tuple(PRODUCTS),
            run=run,
        )
    figures = headline(rows)
    figures["error_of_bfloat16_logits"] = error_of_bfloat16_logits(
        1024, _CHANNELS.value, _EXPERTS.value
    )
    print(json.dumps(figures, indent=1))
    if _JSON.value:
        report = {
            "headline": figures,
            "rows": [row._asdict() for row in rows],
            "machine": f"{platform.machine()} {jax.devices()[0].device_kind}",
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "command": command_line(),
        }
        Path(_JSON.value).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    _QUICK = flags.DEFINE_bool("quick", False, "run one size alone")
    _JSON = define_file("json", "also write the figures to this file")
    _CHANNELS = flags.DEFINE_integer("channels", 96, "channels of a token")
    _EXPERTS = flags.DEFINE_integer("experts", 32, "experts")
    _LIMIT = flags.DEFINE_float("limit_gb", 14.0, "run what needs no more temporaries")
    app.run(main)
