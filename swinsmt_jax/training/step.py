"""One compiled update of the parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from swinsmt_jax import sharding
from swinsmt_jax.training.state import TrainState, shardings_of

Batch = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array],
    seed: int,
    like: TrainState,
    mesh: Mesh,
) -> TrainStep:
    """Return the jitted function (state, batch) -> (state, metrics).

    The state handed in is donated: use the returned one. Its dropout key is
    `fold_in(key(seed), step)`, so that an update depends on state and batch alone.

    Args:
        graphdef: structure of the network, from `state.blueprint`.
        optimizer: what `like.opt_state` belongs to.
        schedule: learning rate of the step, for the metrics.
        loss_fn: (logits [B, D, H, W, K], labels [B, D, H, W]) -> scalar.
        seed: of dropout and drop path.
        like: the state's shapes and shardings, from `state.blueprint`.
        mesh: over which batches are divided.

    Returns:
        The step. Its batch holds `image` [B, D, H, W, C] and `label` [B, D, H, W];
        its metrics are the float32 scalars `loss`, `grad_norm` (before clipping) and
        `learning_rate`.
    """

    def loss_of(params, batch, key):
        model = nnx.merge(graphdef, params)
        logits = model(batch["image"], rngs=nnx.Rngs(dropout=key))
        with jax.named_scope("loss"):
            return loss_fn(logits, batch["label"])

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with sharding.within(mesh):
            loss, grads = jax.value_and_grad(loss_of)(state.params, batch, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    places = shardings_of(like)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(places, sharding.batch_sharding(mesh)),
        out_shardings=(places, sharding.replicated(mesh)),
    )


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
