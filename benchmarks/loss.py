"""Time and memory of forms of the Dice + cross-entropy loss.

    python -m benchmarks.loss [--quick] [--side=64] [--classes=118] [--json=FILE]

Milliseconds and XLA's temporary memory, forward and with the gradient, of the package's
loss of logits and of two ways to write it that leave the gradient to jax; then, of
features with the head before the loss: in blocks, as training has it, and by way of the
logits. --quick takes a side of 32 and one run.
"""

import time

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import define_file, report, write
from swinsmt_jax.ops.convolution import pointwise_conv
from swinsmt_jax.training import losses
from swinsmt_jax.training.losses import SMOOTH, VOXELS

WHATS = ("forward", "gradient")


def dice_cross_entropy(logits, labels):
    return losses.make("dice_ce")(logits, labels)


def dice_cross_entropy_of_features(features, kernel, bias, labels):
    return losses.make("dice_ce").of_features(features, kernel, bias, labels)


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


def head_and_loss(features, kernel, bias, labels):
    return dice_cross_entropy(pointwise_conv(features, kernel, bias), labels)


def measure(function, *arguments, repeats):
    """Return the fastest run's milliseconds, and MiB of temporaries."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    mib = memory.temp_size_in_bytes / 2**20 if memory else None
    return {"ms": 1e3 * min(seconds), "mib": mib}


def measured(form, *arguments, repeats):
    """Measure a loss of arguments whose last are the labels, and print it."""
    inexact = tuple(range(len(arguments) - 1))
    functions = form, jax.value_and_grad(form, argnums=inexact)
    row = {"form": form.__name__}
    for what, function in zip(WHATS, functions, strict=True):
        row[what] = measure(function, *arguments, repeats=repeats)
    cells = (
        f"{what} {row[what]['ms']:8.1f} ms {row[what]['mib'] or 0:8.0f} MiB"
        for what in WHATS
    )
    print(f"{row['form']:30} " + "   ".join(cells), flush=True)
    return row


def headline(rows):
    """Return ours by flat names, and its time over those of the other forms."""
    ours, compared, one_hot, blocks, by_logits = rows
    found = {f"{what}_{k}": v for what in WHATS for k, v in ours[what].items()}
    for row in (compared, one_hot):
        found[f"gradient_ratio_to_{row['form']}"] = _ratio(ours, row)
    found |= {f"features_{w}_{k}": v for w in WHATS for k, v in blocks[w].items()}
    found["features_gradient_ratio_to_head_and_loss"] = _ratio(blocks, by_logits)
    return found


def _ratio(ours, other):
    return ours["gradient"]["ms"] / other["gradient"]["ms"]


def main(_):
    options = flags.FLAGS
    side, repeats = (32, 1) if options.quick else (options.side, options.repeats)
    shape = (1, *(side,) * 3)
    key = jax.random.key(0)
    logits = jax.random.normal(key, (*shape, options.classes))
    labels = jax.random.randint(key, shape, 0, options.classes).astype(jnp.uint8)
    print(f"{jax.devices()[0].device_kind}, logits {logits.shape} float32")
    rows = [
        measured(form, logits, labels, repeats=repeats)
        for form in (dice_cross_entropy, compared, one_hot)
    ]
    features = jax.random.normal(key, (*shape, options.channels))
    kernel = 0.1 * jax.random.normal(key, (options.channels, options.classes))
    print(f"features {features.shape} float32")
    rows += [
        measured(form, features, kernel, kernel[0], labels, repeats=repeats)
        for form in (dice_cross_entropy_of_features, head_and_loss)
    ]
    write(options.json, report(headline(rows), rows=rows, shape=logits.shape))


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "a side of 32, one run")
    flags.DEFINE_integer("side", 64, "side of the cubic patch in voxels")
    flags.DEFINE_integer("classes", 118, "classes, background included")
    flags.DEFINE_integer("channels", 48, "features of the head")
    flags.DEFINE_integer("repeats", 5, "runs of which the fastest counts")
    define_file("json", "also write the figures to this file")
    app.run(main)
