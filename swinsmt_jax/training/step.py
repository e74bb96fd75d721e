"""One compiled update of the parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from swinsmt_jax import sharding
from swinsmt_jax.layers import recompute
from swinsmt_jax.layers.conv import Conv
from swinsmt_jax.ops.tracing import traced_once, without_collection
from swinsmt_jax.training import losses
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
    schedule: optax.Schedule,
    seed: int,
    like: TrainState,
    mesh: Mesh,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """Return the jitted function (state, batch) -> (state, metrics).

    The state handed in is donated: use the returned one. Its dropout key is
    `fold_in(key(seed), step)`, so that an update depends on state and batch alone.
    Where the loss or the gradient is not finite, the step is counted and nothing else
    of the state changes.

    Args:
        graphdef: structure of the network, from `state.blueprint`.
        optimizer: what `like.opt_state` belongs to.
        schedule: learning rate of the step, for the metrics.
        seed: of dropout and drop path.
        like: the state's shapes and shardings, from `state.blueprint`.
        mesh: over which batches are divided.
        accumulate: parts of a batch whose gradients are averaged in turn: the memory of
            one part, and the gradient of the whole. Divides the batch of a device.
        ema_decay: of `like.average`, if it has one. The decay after step t is at most
            (1 + t) / (10 + t), so that the first parameters are soon forgotten.

    Returns:
        The step. Its batch holds `image` [B, D, H, W, C] and `label` [B, D, H, W];
        its metrics are the scalars `loss`, `grad_norm` (before clipping),
        `learning_rate`, `accuracy`, the share of the labelled voxels on every
        `SPARSE`th plane, row and column that got their label, and the counts `skipped`
        and `skipped_in_row`.
    """

    def loss_of(params, batch, key):
        model, rngs = nnx.merge(graphdef, params), nnx.Rngs(dropout=key)
        return loss_and_hits(model, batch["image"], batch["label"], rngs=rngs)

    value_and_gradient = jax.value_and_grad(loss_of, has_aux=True)

    def gradient(params, batch, key):
        if accumulate == 1:
            return value_and_gradient(params, batch, key)
        parts = {name: _parts(batch[name], accumulate) for name in ("image", "label")}

        def add(total, part):
            index, part = part
            key_of_part = jax.random.fold_in(key, index)
            found = value_and_gradient(params, part, key_of_part)
            return jax.tree.map(jnp.add, total, found), None

        none = jnp.float32(0), jnp.zeros(2)
        zero = none, jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))
        return jax.tree.map(lambda sum: sum / accumulate, total)

    def averaged(state, params):
        step = state.step - state.skipped[0]
        decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
        return optax.incremental_update(params, state.average, 1 - decay)

    packing = Packing(like.params, kind=optimizer.kind)
    update = traced_once(optimizer.update)

    def updated(state, grads, finite):
        """Return parameters, optimizer's state and average; the old ones if not finite.

        The optimizer's state is updated after the parameters, by a second call, of
        which the compiler keeps nothing that is not needed. XLA may take both from the
        old state at any time otherwise, so it copies the state before overwriting it.
        """

        def choose(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        old = state.opt_state
        updates, _ = update(grads, old, state.params)
        params = choose(optax.apply_updates(state.params, updates), state.params)
        params, old = jax.lax.optimization_barrier((params, old))
        _, opt_state = update(grads, old, state.params)
        average = averaged(state, params) if state.average else {}
        return params, choose(opt_state, old), choose(average, state.average)

    @without_collection()
    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with sharding.within(mesh):
            (loss, hits), grads = gradient(state.params, batch, key)
        with jax.named_scope("optimizer"):
            packed, grads = packing.pack((state, grads))
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            updates = updated(packed, grads, finite)
            params, opt_state, average = packing.unpack(updates)
        total = state.skipped[0] + ~finite
        in_row = jnp.where(finite, 0, state.skipped[1] + 1)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "accuracy": hits[0] / jnp.maximum(hits[1], 1e-6),
            "learning_rate": jnp.asarray(
                schedule(state.step - state.skipped[0]), jnp.float32
            ),
            "skipped": total,
            "skipped_in_row": in_row,
        }
        skipped = jnp.stack([total, in_row])
        new = TrainState(state.step + 1, params, opt_state, average, skipped)
        return new, metrics

    places = shardings_of(like)
    return jax.jit(
        train_step,
        donate_argnums=0,
        compiler_options=recompute.compiler_options(mesh.devices.flat[0].platform),
        in_shardings=(places, sharding.batch_sharding(mesh)),
        out_shardings=(places, sharding.replicated(mesh)),
    )


def loss_and_hits(
    model: nnx.Module,
    image: jax.Array,
    label: jax.Array,
    *,
    rngs: nnx.Rngs | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return Dice plus cross-entropy of a network's prediction, and voxels it got.

    Of a network with `features` and a `head` that is a 1 x 1 x 1 `layers.conv.Conv`
    with a bias (see `models.create`) no logits are made; any other is called.

    Args:
        model: a network.
        image: [B, D, H, W, C].
        label: [B, D, H, W].
        rngs: of dropout and drop path; without it there is none.

    Returns:
        The loss, and [labelled voxels with the right label, all labelled ones] of every
        `SPARSE`th plane, row and column: cheap, and says early whether anything is
        learnt, as the loss moves first by learning how rare each class is.
    """
    if not _has_head(model):
        logits = model(image, rngs=rngs)
        with jax.named_scope("loss"):
            loss = losses.dice_cross_entropy(logits, label)
            return loss, _hits(_sparse(logits), _sparse(label))
    features, head = model.features(image, rngs=rngs), model.head
    with jax.named_scope("loss"):
        loss = losses.dice_cross_entropy_of_features(
            features.astype(head.dtype), head.kernel[0, 0, 0], head.bias[...], label
        )
        return loss, _hits(head(_sparse(features)), _sparse(label))


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


def _hits(logits, labels):
    labelled = labels > 0
    right = labelled & (logits.argmax(-1) == labels)
    return jnp.stack([right.sum(), labelled.sum()]).astype(jnp.float32)


def _parts(array, count):
    """Cut [B, ...] into [count, B / count, ...]; every device cuts its own part."""
    return array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)


def make_predict(
    graphdef: nnx.GraphDef, *, like: TrainState, mesh: Mesh
) -> Callable[[dict, jax.Array], jax.Array]:
    """Return the jitted function (params, windows) -> logits, without dropout.

    Windows and logits are divided over the mesh. Of several processes each predicts
    by itself, with its `sharding.local_mesh` and `sharding.copy_to_local` of `params`.
    """
    windows = sharding.batch_sharding(mesh)
    alone = jax.process_count() == 1
    places = shardings_of(like.params) if alone else sharding.replicated(mesh)

    def predict(params, x):
        with sharding.within(mesh):
            return nnx.merge(graphdef, params)(x)

    return jax.jit(predict, in_shardings=(places, windows), out_shardings=windows)
