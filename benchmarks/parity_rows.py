"""What the goldens of 3D RepUX-Net and the Universal Model hold besides the usual.

Batch statistics, the frequency prior and what its rules make of an update; the other
encoding of the classes, and the one-vs-all loss.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.goldens import loaded, part
from swinsmt_jax import convert, models
from swinsmt_jax.models import repux_net as network
from swinsmt_jax.models.registry import Prior
from swinsmt_jax.models.ux_net import DEPTHWISE
from swinsmt_jax.training import losses
from swinsmt_jax.training.prior import around
from swinsmt_jax.training.step import loss_and_accuracy_counts

GRADIENT = 1e-3  # of norms, relative to the norm plus 0.1 % of the largest


def repux_net(golden: Mapping, config) -> list[tuple[str, float, float]]:
    """Return (what, deviation, tolerance) of statistics, prior and updates."""
    graphdef, state = loaded(config, part(golden, "param/"))
    x, y = jnp.moveaxis(golden["x"], 1, -1), jnp.asarray(golden["y"][:, 0])

    @jax.jit
    def run(state):
        def loss(state):
            model = nnx.merge(graphdef, state)
            logits = model(x, rngs=nnx.Rngs(0))
            return losses.make("dice_ce")(logits, y), (logits, nnx.state(model))

        return jax.value_and_grad(loss, has_aux=True)(state)

    stages = jax.jit(lambda s: nnx.merge(graphdef, s).uxnet_3d(x))(state)
    rows = [
        (f"stage {i}, absolute", _absolute(stage, golden[f"stage/{i}"]), 2e-4)
        for i, stage in enumerate(stages)
    ]
    (value, (logits, after)), gradient = run(state)
    rows += _trained(golden, "train/", value, logits, graphdef, gradient)
    running = convert.to_torch(nnx.merge(graphdef, after))
    deviations = [
        np.abs(running[name] - expected).max()
        for name, expected in part(golden, "train/running/").items()
    ]
    rows.append(("running statistics, absolute", max(deviations), 1e-5))

    matrix = network.frequency_prior(config.kernel_size, config.alpha)
    rows.append(("prior", np.abs(matrix - golden["prior/matrix"]).max(), 0))
    weighed = _weighed(state, matrix)
    (value, (logits, _)), gradient = run(weighed)
    rows += _trained(golden, "prior/", value, logits, graphdef, gradient)
    stored = _norms(graphdef, _weighed(gradient, matrix))
    expected = part(golden, "prior/grad_norm_stored/")
    rows.append(("prior, by the stored kernels", _worst(stored, expected), GRADIENT))
    return rows + updates_by_rule(part(golden, "update/"))


def _weighed(state, matrix):
    def weigh(path, leaf):
        is_kernel = "dwconv" in str(path) and leaf.ndim == 4
        return leaf * matrix[..., None] if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(weigh, state)


def updates_by_rule(golden: Mapping) -> list[tuple[str, float, float]]:
    """Return (what, deviation, tolerance) of two steps of one block by each rule."""
    config = network.RepUXNetConfig(
        in_channels=1, out_channels=2, kernel_size=5, alpha=0.0
    )
    block = network.RepUXBlock(4, number=0, config=config, rngs=nnx.Rngs(0))
    block.dwconv.bias[...] = jnp.asarray(golden["param/dwconv.bias"])
    for name, torch in (("scale", "weight"), ("bias", "bias")):
        getattr(block.norm, name)[...] = jnp.asarray(golden[f"param/norm.{torch}"])
    graphdef, arrays = models.split(block)

    @jax.jit
    def run(kernel, x, cotangent):
        def out(kernel):
            conv = {**arrays["dwconv"], "kernel": kernel}
            block = nnx.merge(graphdef, {**arrays, "dwconv": conv})
            return block(x, jax.random.key(0))

        y, pull_back = jax.vjp(out, kernel)
        return y, *pull_back(cotangent)

    weights, rate = golden["matrix"][..., None], float(golden["lr"])
    adamw = optax.adamw(rate, weight_decay=float(golden["weight_decay"]))
    rows = []
    for rule, name, optimizer in (
        ("fixed", "fixed/sgd", optax.sgd(rate)),
        ("fixed", "fixed/adamw", adamw),
        ("compound", "compound", optax.sgd(rate)),
        ("released", "released", adamw),
    ):
        optimizer = around(optimizer, Prior(rule, "kernel", weights))
        kernel = weights * DEPTHWISE.from_torch(golden["param/dwconv.weight"], ())
        params, found = {"kernel": jnp.asarray(kernel)}, {}
        moments = optimizer.init(params)
        for step in ("1", "2"):
            x, cotangent = (
                jnp.moveaxis(golden[f"{what}/{step}"], 1, -1)
                for what in ("x", "cotangent")
            )
            before = params["kernel"]
            out, g = run(before, x, cotangent)
            updates, moments = optimizer.update({"kernel": g}, moments, params)
            params = optax.apply_updates(params, updates)
            after = params["kernel"]
            if rule == "fixed":
                found |= {f"out/{step}": jnp.moveaxis(out, -1, 1)}
                kernels = {"grad": g * weights, "stored": after / weights}
                kernels["effective"] = after
            else:
                kernels = {"effective": before}
            if rule == "compound":  # by the other, the norm was trained as well
                kernels["grad"] = g
            for what, array in kernels.items():
                found[f"{what}/{step}"] = DEPTHWISE.to_torch(np.asarray(array))
        worst = max(
            np.abs(np.asarray(array) - golden[f"{name}/{key}"]).max()
            / np.abs(golden[f"{name}/{key}"]).max()
            for key, array in found.items()
        )
        rows.append((f"updates, {name}, relative", worst, 1e-5))
    return rows


def universal_model(golden: Mapping, config) -> list[tuple[str, float, float]]:
    """Return (what, deviation, tolerance) of learned embeddings and one-vs-all."""
    rows = one_vs_all_loss(golden)
    own = part(golden, "param/")
    x = jnp.moveaxis(golden["x"], 1, -1)

    def trained(config, arrays, loss, y, prefix):
        graphdef, state = loaded(config, arrays)

        @jax.jit
        def run(state):
            def value(state):
                model = nnx.merge(graphdef, state)
                return loss_and_accuracy_counts(model, x, y, loss=loss)[0]

            return *jax.value_and_grad(value)(state), nnx.merge(graphdef, state)(x)

        value, gradient, logits = run(state)
        norms = _norms(graphdef, gradient)
        expected = part(golden, f"{prefix}grad_norm/")
        return value, logits, _worst(norms, expected)

    y = jnp.asarray(golden["y"][:, 0])
    learned = dataclasses.replace(config, embeddings="learned")
    arrays = {n: a for n, a in own.items() if not n.startswith("text_to_vision")}
    del arrays["organ_embedding"]
    arrays |= part(golden, "other/param/")
    value, logits, gradients = trained(
        learned, arrays, losses.make("dice_ce"), y, "other/"
    )
    even = _absolute(logits[:, ::2, ::2, ::2], golden["other/logits_even"])
    rows += [
        ("learned embeddings, logits, absolute", even, 2e-4),
        ("learned embeddings, loss", abs(value - golden["other/dice_ce"]), 2e-6),
        ("learned embeddings, gradient norms, guarded", gradients, GRADIENT),
    ]
    plane = dataclasses.replace(
        config, zero_plane=True, out_channels=config.out_channels + 1
    )
    value, logits, gradients = trained(
        plane,
        own,
        losses.make("one_vs_all"),
        jnp.asarray(golden["one_vs_all/y"][:, 0]),
        "one_vs_all/",
    )
    expected = golden["one_vs_all/bce"] + golden["one_vs_all/dice_volume"]
    labels = np.asarray(logits.argmax(-1))[:, None]
    unequal = (labels != golden["one_vs_all/label_argmax"]).mean()
    return rows + [
        ("one-vs-all, loss", abs(value - expected), 1e-6),
        ("one-vs-all, gradient norms, guarded", gradients, GRADIENT),
        ("one-vs-all, share of other labels", unequal, 1e-4),
    ]


def one_vs_all_loss(golden: Mapping) -> list[tuple[str, float, float]]:
    """Return (what, deviation, tolerance) of the loss of logits with a zero plane."""
    logits = jnp.moveaxis(golden["loss/logits"], 1, -1)
    logits = jnp.pad(logits, ((0, 0),) * 4 + ((1, 0),))
    labels = jnp.asarray(golden["loss/y"][:, 0])
    run = jax.jit(jax.value_and_grad(losses.make("one_vs_all")))
    value, gradient = run(logits, labels)
    both = [golden[f"loss/all/{part}"] for part in ("bce", "dice_volume")]
    slopes = [golden[f"loss/all/{part}_grad"] for part in ("bce", "dice_volume")]
    deviation = _absolute(gradient[..., 1:], sum(slopes))
    return [
        ("one-vs-all loss of logits", abs(float(value) - sum(both)), 1e-6),
        ("one-vs-all loss of logits, gradient", deviation, 1e-6),
    ]


FIGURES = {
    "zoo/repux_net_small": repux_net,
    "zoo/universal_model_small": universal_model,
}


def _trained(golden, prefix, value, logits, graphdef, gradient):
    """Compare a forward pass with the statistics of its batch, and its gradient."""
    name = prefix.removesuffix("/")
    even = _absolute(logits[:, ::2, ::2, ::2], golden[f"{prefix}logits_even"])
    norms = _norms(graphdef, gradient)
    worst = _worst(norms, part(golden, f"{prefix}grad_norm/"))
    return [
        (f"{name}, logits, absolute", even, 2e-4),
        (f"{name}, Dice + CE", abs(value - golden[f"{prefix}dice_ce"]), 1e-6),
        (f"{name}, gradient norms, guarded", worst, GRADIENT),
    ]


def _norms(graphdef, gradient):
    arrays = convert.to_torch(nnx.merge(graphdef, gradient))
    return {name: np.linalg.norm(array.astype(float)) for name, array in arrays.items()}


def _worst(norms, expected):
    largest = max(expected.values())
    return max(
        abs(norms[name] - value) / (value + 1e-3 * largest)
        for name, value in expected.items()
    )


def _absolute(ours, theirs):
    return float(np.abs(np.moveaxis(np.asarray(ours), -1, 1) - theirs).max())
