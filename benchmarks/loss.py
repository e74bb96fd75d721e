"""Forms of the Dice + cross-entropy loss; see `benchmarks.model`."""

import jax
import jax.numpy as jnp

from benchmarks import programs, save
from swinsmt_jax.training import losses
from swinsmt_jax.training.losses import SMOOTH, SPATIAL_AXES

WHATS = ("forward", "gradient")
CHANNELS, REPEATS = 48, 5


def dice_cross_entropy(logits, labels):
    return losses.make("dice_ce")(logits, labels)


def dice_cross_entropy_of_features(features, kernel, bias, labels):
    return losses.make("dice_ce").of_features(features, kernel, bias, labels)


def one_hot(logits, labels):
    truth = jax.nn.one_hot(labels, logits.shape[-1])
    p, log_p = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    both, size = (p * truth).sum(SPATIAL_AXES), (p + truth).sum(SPATIAL_AXES)
    dice = (2 * both + SMOOTH) / (size + SMOOTH)
    return (1 - dice).mean() - (truth * log_p).sum(-1).mean()


def compared(logits, labels):
    truth = labels[..., None] == jnp.arange(logits.shape[-1])
    p, log_p = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    both = jnp.where(truth, p, 0).sum(SPATIAL_AXES)
    sizes = p.sum(SPATIAL_AXES) + truth.sum(SPATIAL_AXES)
    dice = (2 * both + SMOOTH) / (sizes + SMOOTH)
    return (1 - dice).mean() - jnp.where(truth, log_p, 0).sum(-1).mean()


def head_and_loss(features, kernel, bias, labels):
    return dice_cross_entropy(features @ kernel + bias, labels)


def measured(form, *arguments, repeats):
    """Measure a loss of arguments whose last are the labels, and print it."""
    inexact = tuple(range(len(arguments) - 1))
    functions = form, jax.value_and_grad(form, argnums=inexact)
    row = {"form": form.__name__}
    for what, function in zip(WHATS, functions, strict=True):
        compiled = jax.jit(function).lower(*arguments).compile()
        mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
        seconds = programs.seconds_of(compiled, *arguments, repeats=repeats)
        row[what] = {"ms": 1e3 * min(seconds), "mib": mib}
    cells = (f"{w} {row[w]['ms']:8.1f} ms {row[w]['mib']:8.0f} MiB" for w in WHATS)
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


def measure(options) -> None:
    """Measure all forms on one patch, and write the report."""
    side = 32 if options.quick else 64
    repeats = 1 if options.quick else REPEATS
    shape, key = (1, *(side,) * 3), jax.random.key(0)
    logits = jax.random.normal(key, (*shape, options.classes))
    labels = jax.random.randint(key, shape, 0, options.classes).astype(jnp.uint8)
    print(f"{jax.devices()[0].device_kind}, logits {logits.shape} float32")
    rows = [
        measured(form, logits, labels, repeats=repeats)
        for form in (dice_cross_entropy, compared, one_hot)
    ]
    features = jax.random.normal(key, (*shape, CHANNELS))
    kernel = 0.1 * jax.random.normal(key, (CHANNELS, options.classes))
    print(f"features {features.shape} float32")
    rows += [
        measured(form, features, kernel, kernel[0], labels, repeats=repeats)
        for form in (dice_cross_entropy_of_features, head_and_loss)
    ]
    save(headline(rows), rows=rows, shape=logits.shape)
