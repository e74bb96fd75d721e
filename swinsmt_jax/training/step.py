"""One compiled update of the parameters."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from swinsmt_jax import models, sharding
from swinsmt_jax.layers import recompute
from swinsmt_jax.layers.conv import Conv
from swinsmt_jax.models.network import Network
from swinsmt_jax.ops import by_platform
from swinsmt_jax.ops.tracing import traced_once, without_collection
from swinsmt_jax.training.losses import Loss
from swinsmt_jax.training.optimizer import Optimizer
from swinsmt_jax.training.packing import Packing
from swinsmt_jax.training.state import TrainState, shardings_of

Batch = dict[str, jax.Array]
SPARSE = 4  # voxels between those that the accuracy is of
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    *,
    loss: Loss,
    schedule: optax.Schedule,
    seed: int,
    abstract: TrainState,
    mesh: Mesh,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    deterministic: bool = False,
) -> TrainStep:
    """Return the jitted function (state, batch) -> (state, metrics).

    The step donates its input state: use the returned one. Its dropout key is
    `fold_in(key(seed), step)`, so an update depends only on state and batch. If the
    loss, the gradient or a buffer is not finite, the step is counted and nothing else
    in the state changes.

    Args:
        graphdef, abstract: network and state, from `state.abstract_state`.
        optimizer: that `abstract.opt_state` belongs to.
        loss: that is minimised.
        schedule: learning rate of the step, for the metrics.
        seed: of dropout and drop path.
        mesh: that divides the batches.
        accumulate: number of parts of a batch whose gradients are averaged in turn: the
            gradient of the whole with the memory of one part. It divides the batch of a
            device.
        ema_decay: of `abstract.ema_params`, if kept. The decay after step t is at most
            (1 + t) / (10 + t), so the average soon forgets the first parameters.
        deterministic: avoid kernels whose order of sums varies.

    Returns:
        The step. Its batch contains `image` [B, D, H, W, C] and `label` [B, D, H, W],
        and `annotated` [B, K] if cases are partly annotated, see `losses.Loss`. Its
        metrics are the scalars `loss`, `grad_norm` (before clipping), `learning_rate`,
        `accuracy`, and the counts `skipped` and `skipped_in_row`. The accuracy is the
        share of correctly labelled voxels among the labelled ones on every `SPARSE`th
        plane, row and column.
    """

    def loss_of(params, buffers, batch, key):
        model = nnx.merge(graphdef, models.merge_buffers(params, buffers))
        image, label, rngs = batch["image"], batch["label"], nnx.Rngs(dropout=key)
        value, counts = loss_and_accuracy_counts(
            model, image, label, batch.get("annotated"), loss=loss, rngs=rngs
        )
        return value, (counts, models.split_buffers(*models.split(model))[1])

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    packing = Packing(abstract.params, kind=optimizer.kind)

    @without_collection()
    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with sharding.within(mesh), attention_of(deterministic):
            found, buffers = _averaged_over_parts(
                gradient, accumulate, state, batch, key
            )
        value, counts, grads = found
        with jax.named_scope("optimizer"):
            ema_params, ema_buffers = models.split_buffers(graphdef, state.ema_params)
            packed, grads = packing.pack((replace(state, ema_params=ema_params), grads))
            grad_norm = optax.tree.norm(grads)
            numbers = jnp.stack([value, grad_norm, optax.tree.norm(buffers)])
            finite = jnp.isfinite(numbers).all()
            updates = _update(optimizer, packed, grads, finite, ema_decay=ema_decay)
            params, opt_state, ema_params = packing.unpack(updates)
            buffers = _choose(finite, buffers, state.buffers)
            moved = _averaged(state, buffers, ema_buffers, ema_decay=ema_decay)
            ema_buffers = _choose(finite, moved, ema_buffers)
            ema_params = models.merge_buffers(ema_params, ema_buffers)
        total = state.skipped[0] + ~finite
        in_row = jnp.where(finite, 0, state.skipped[1] + 1)
        rate = schedule(state.step - state.skipped[0])
        metrics = {
            "loss": value,
            "grad_norm": grad_norm,
            "accuracy": counts[0] / jnp.maximum(counts[1], 1e-6),
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "skipped": total,
            "skipped_in_row": in_row,
        }
        skipped = jnp.stack([total, in_row])
        step = state.step + 1
        state = TrainState(step, params, buffers, opt_state, ema_params, skipped)
        return state, metrics

    places = shardings_of(abstract)
    return jax.jit(
        train_step,
        donate_argnums=0,
        compiler_options=recompute.compiler_options(mesh.devices.flat[0].platform),
        in_shardings=(places, sharding.batch_sharding(mesh)),
        out_shardings=(places, sharding.replicated(mesh)),
    )


def attention_of(deterministic: bool) -> contextlib.AbstractContextManager:
    """Let the platform choose fused attention, or disable it."""
    if deterministic:
        return by_platform.fused_attention(None)
    return contextlib.nullcontext()


def _averaged_over_parts(gradient, accumulate, state, batch, key):
    """Return (loss, counts, gradients), averaged over parts of a batch, and buffers.

    Every part changes the buffers of the part before.
    """

    def call(buffers, part, key):
        (value, (counts, buffers)), grads = gradient(state.params, buffers, part, key)
        return (value, counts, grads), buffers

    if accumulate == 1:
        return call(state.buffers, batch, key)
    # [B, ...] -> [parts, B / parts, ...]; every device cuts its own samples.
    parts = {
        name: array.reshape(-1, accumulate, *array.shape[1:]).swapaxes(0, 1)
        for name, array in batch.items()
        if name in ("image", "label", "annotated")
    }

    def add(carried, part):
        (total, buffers), (index, part) = carried, part
        found, buffers = call(buffers, part, jax.random.fold_in(key, index))
        return (jax.tree.map(jnp.add, total, found), buffers), None

    zero = jnp.float32(0), jnp.zeros(2), jax.tree.map(jnp.zeros_like, state.params)
    start = zero, state.buffers
    (total, buffers), _ = jax.lax.scan(add, start, (jnp.arange(accumulate), parts))
    return jax.tree.map(lambda sum: sum / accumulate, total), buffers


def _update(optimizer, state, grads, finite, *, ema_decay):
    """Return parameters, optimizer's state and average; the old ones if not finite.

    The optimizer is called twice with a barrier between, so XLA can update the state in
    place. XLA removes the duplicate work.
    """
    update = traced_once(optimizer.update)
    updates, _ = update(grads, state.opt_state, state.params)
    params = _choose(finite, optax.apply_updates(state.params, updates), state.params)
    params, old = jax.lax.optimization_barrier((params, state.opt_state))
    _, opt_state = update(grads, old, state.params)
    opt_state = _choose(finite, opt_state, old)
    moved = _averaged(state, params, state.ema_params, ema_decay=ema_decay)
    return params, opt_state, _choose(finite, moved, state.ema_params)


def _averaged(state, arrays, ema, *, ema_decay):
    """Return the running average after a step; an empty one stays empty."""
    step = state.step - state.skipped[0]
    decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
    if not ema:
        return {}
    return jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), ema, arrays)


def _choose(finite, new, old):
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def loss_and_accuracy_counts(
    model: Network,
    image: jax.Array,
    label: jax.Array,
    annotated: jax.Array | None = None,
    *,
    loss: Loss,
    rngs: nnx.Rngs | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of a network's prediction and the counts of its accuracy.

    Two kinds of networks are scored without making logits: those with `features` and a
    1 x 1 x 1 `layers.conv.Conv` with a bias as `head`, and those with
    `features_and_head`. Any other network is called.

    Args:
        model: a network.
        image: [B, D, H, W, C].
        label: [B, D, H, W].
        annotated: [B, K], the annotated classes of each sample; None for all.
        loss: that is minimised.
        rngs: of dropout and drop path; None disables both.

    Returns:
        The loss, and [labelled voxels with the right label, all labelled ones] on every
        `SPARSE`th plane, row and column. This is cheap and shows early whether the
        network learns anything: the loss first falls by learning how rare each class
        is.
    """
    if hasattr(model, "features_and_head"):
        features, head = model.features_and_head(image, rngs=rngs)
        with jax.named_scope("loss"):
            value = loss.of_head(features, head, label, annotated)
            return value, _counts(head(_sparse(features)), _sparse(label))
    if not _has_head(model):
        logits = model(image, rngs=rngs)
        with jax.named_scope("loss"):
            value = loss(logits, label, annotated)
            return value, _counts(_sparse(logits), _sparse(label))
    features = model.features(image, rngs=rngs)
    head = cast(Conv, model.head)
    with jax.named_scope("loss"):
        parameters = head.kernel[0, 0, 0], head.bias[...]
        features = features.astype(head.dtype)
        value = loss.of_features(features, *parameters, label, annotated)
        return value, _counts(head(_sparse(features)), _sparse(label))


def _has_head(model):
    head = getattr(model, "head", None)
    return (
        isinstance(head, Conv)
        and head.kernel.shape[:3] == head.strides == (1, 1, 1)
        and head.bias is not None
        and callable(getattr(model, "features", None))
    )


def _sparse(array):
    return array[:, ::SPARSE, ::SPARSE, ::SPARSE]


def _counts(logits, labels):
    labelled = (labels > 0) & (labels < logits.shape[-1])
    right = labelled & (logits.argmax(-1) == labels)
    return jnp.stack([right.sum(), labelled.sum()]).astype(jnp.float32)


def make_predict(
    graphdef: nnx.GraphDef, *, abstract: TrainState, mesh: Mesh
) -> Callable[[dict, jax.Array], jax.Array]:
    """Return the jitted function (params, windows) -> logits, without dropout.

    The mesh divides windows and logits. Each process predicts alone, with its
    `sharding.local_mesh` and `sharding.copy_to_local` of `params`.
    """
    windows = sharding.batch_sharding(mesh)
    alone = jax.process_count() == 1
    places = shardings_of(abstract.arrays) if alone else sharding.replicated(mesh)

    def predict(params, x):
        with sharding.within(mesh):
            return nnx.merge(graphdef, params)(x)

    return jax.jit(predict, in_shardings=(places, windows), out_shardings=windows)
