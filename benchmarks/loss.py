"""Time and memory of forms of the Dice + cross-entropy loss.

    python benchmarks/loss.py --side=64 --classes=118

prints milliseconds and XLA's temporary memory, forward and with the gradient, of the
package's loss and of two ways to write it that leave the gradient to jax.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags

from swinsmt_jax.losses import SMOOTH, VOXELS, dice_cross_entropy

SIDE = flags.DEFINE_integer("side", 64, "side of the cubic patch in voxels")
CLASSES = flags.DEFINE_integer("classes", 118, "classes, background included")
REPEATS = flags.DEFINE_integer("repeats", 5, "runs of which the fastest counts")


def one_hot(logits, labels):
    truth = jax.nn.one_hot(labels, logits.shape[-1])
    p, log_p = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    both, size = (p * truth).sum(VOXELS), (p + truth).sum(VOXELS)
    dice = (2 * both + SMOOTH) / (size + SMOOTH)
    return (1 - dice).mean() - (truth * log_p).sum(-1).mean()


def compared(logits, labels):
    truth = labels[..., None] == jnp.arange(logits.shape[-1])
    p, log_p = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    both = jnp.where(truth, p, 0).sum(VOXELS)
    dice = (2 * both + SMOOTH) / (p.sum(VOXELS) + truth.sum(VOXELS) + SMOOTH)
    return (1 - dice).mean() - jnp.where(truth, log_p, 0).sum(-1).mean()


def measure(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    mib = memory.temp_size_in_bytes / 2**20 if memory else float("nan")
    return f"{min(seconds) * 1e3:8.1f} ms {mib:8.0f} MiB"


def main(_):
    shape = (1, *(SIDE.value,) * 3)
    key = jax.random.key(0)
    logits = jax.random.normal(key, (*shape, CLASSES.value))
    labels = jax.random.randint(key, shape, 0, CLASSES.value).astype(jnp.uint8)
    print(f"{jax.devices()[0].device_kind}, logits {logits.shape} float32")
    for form in (dice_cross_entropy, compared, one_hot):
        forward = measure(form, logits, labels)
        both = measure(jax.value_and_grad(form), logits, labels)
        print(f"{form.__name__:20} forward {forward}   with gradient {both}")


if __name__ == "__main__":
    app.run(main)
