"""Memory of the gradient step of the paper's Swin SMT at 128^3, and one run of it.

    python -m benchmarks.paper_step [--quick] [--side=128] [--run] [--json=FILE]

32 experts, batch 1, float32 parameters, bfloat16 compute, rematerialised as the config
says: loss and gradient are compiled, and bytes of arguments and temporaries printed.
--run also takes one step; on a CPU that is minutes. --quick compiles a patch of 64^3.
"""

import json
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks import define_file, report, write
from configs import swin_smt_paper
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.layers import recompute
from swinsmt_jax.models import abstract_model
from swinsmt_jax.training import losses
from swinsmt_jax.training.step import loss_and_accuracy_counts

QUICK_SIDE = 64  # the least for 32 experts in the last stage


def compile_gradient(model, side):
    """Return the compiled loss and gradient, and its arguments' shapes."""
    graphdef, params = abstract_model(model)
    x = jax.ShapeDtypeStruct((1, side, side, side, 1), jnp.float32)
    y = jax.ShapeDtypeStruct((1, side, side, side), jnp.uint8)

    def loss(params, x, y):
        return loss_and_accuracy_counts(
            nnx.merge(graphdef, params), x, y, loss=losses.make("dice_ce")
        )[0]

    arguments = (params, x, y)
    options = recompute.compiler_options(jax.default_backend())
    gradient = jax.jit(jax.value_and_grad(loss), compiler_options=options)
    return gradient.lower(*arguments).compile(), arguments


def random_arguments(shapes):
    """Fill parameters with small normal numbers, image and labels with uniform ones."""
    params, x, y = shapes
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)) + 2))
    params = jax.tree.map(
        lambda a: 0.05 * jax.random.normal(next(keys), a.shape, a.dtype), params
    )
    image = jax.random.uniform(next(keys), x.shape)
    return params, image, jax.random.randint(next(keys), y.shape, 0, 118, y.dtype)


def main(_):
    options = flags.FLAGS
    side = QUICK_SIDE if options.quick else options.side
    model = from_config_dict(swin_smt_paper.get_config()).model
    start = time.perf_counter()
    compiled, shapes = compile_gradient(model, side)
    memory = compiled.memory_analysis()
    figures = {
        "side": side,
        "compile_s": time.perf_counter() - start,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
    }
    figures["together_gb"] = figures["arguments_gb"] + figures["temporaries_gb"]
    print(json.dumps(figures, indent=1), flush=True)
    write(options.json, report(figures, rows=[figures]))
    if options.run:
        arguments = jax.block_until_ready(random_arguments(shapes))
        start = time.perf_counter()
        loss, gradient = jax.block_until_ready(compiled(*arguments))
        figures["run_s"] = time.perf_counter() - start
        figures["loss"] = float(loss)
        norms = [float(jnp.linalg.norm(g)) for g in jax.tree.leaves(gradient)]
        figures["gradients_finite"] = all(n < float("inf") for n in norms)
        print({k: figures[k] for k in ("run_s", "loss", "gradients_finite")})
        write(options.json, report(figures, rows=[figures]))


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "a patch of 64^3")
    flags.DEFINE_integer("side", 128, "side of the patch")
    flags.DEFINE_bool("run", False, "also take one step")
    define_file("json", "also write the figures to this file")
    app.run(main)
