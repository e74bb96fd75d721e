"""The experts of a Soft MoE, on one device or divided over an axis of the mesh."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.linear import dropout, fold_in, gelu
from swinsmt_jax.ops import by_platform

DATA, EXPERT = "data", "expert"  # the axes of the mesh
BATCH = PartitionSpec((DATA, EXPERT))
HIDDEN = 4  # recomputed experts hold a fourth of the entries that a device takes


class Experts(nnx.Module):
    """E two-layer MLPs with exact GELU, each on its own slots.

    Within a mesh whose axis "expert" has n > 1 devices, each device holds E / n
    experts. Slots travel to their experts and back by one all-to-all each way.

    Args:
        channels: C.
        num_experts: E.
        hidden: F, channels between the two layers.
        dropout_rate: after the GELU.
        dtype: of the matrix products.
        rngs: initialises the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_experts: int,
        hidden: int,
        dropout_rate: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.dropout_rate = dropout_rate
        self.dtype = dtype
        e, c, f = num_experts, channels, hidden
        self.w1 = initializers.uniform_fan_in(rngs, (e, c, f), fan_in=c)
        self.b1 = initializers.uniform_fan_in(rngs, (e, f), fan_in=c)
        self.w2 = initializers.uniform_fan_in(rngs, (e, f, c), fan_in=f)
        self.b2 = initializers.uniform_fan_in(rngs, (e, c), fan_in=f)

    def __call__(
        self, slots: jax.Array, *, key: jax.Array | None = None, recompute: bool = False
    ) -> jax.Array:
        """Map slots [B, E, S, C] to [B, E, S, C].

        Args:
            slots: inputs of the experts.
            key: switches dropout on.
            recompute: keep no hidden activations for the backward pass, and hold those
                of a few experts at a time.

        Raises:
            UserError: for a mesh whose devices do not divide batch or experts.
        """
        weights = tuple(
            p[...].astype(self.dtype) for p in (self.w1, self.b1, self.w2, self.b2)
        )
        run = self._few_at_a_time if recompute else self._feed_forward
        slots = slots.astype(self.dtype)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.shape.get(EXPERT, 1) == 1:
            return run(slots, weights, key)
        _require_divisible(slots.shape, mesh)

        def on_each_device(slots, weights, key):
            slots = jax.lax.all_to_all(slots, EXPERT, 1, 0, tiled=True)
            here = jax.lax.axis_index(mesh.axis_names)
            outputs = run(slots, weights, fold_in(key, here))
            return jax.lax.all_to_all(outputs, EXPERT, 0, 1, tiled=True)

        return jax.shard_map(
            on_each_device,
            in_specs=(BATCH, PartitionSpec(EXPERT), PartitionSpec()),
            out_specs=BATCH,
        )(slots, weights, key)

    def _feed_forward(self, x, weights, key):
        w1, b1, w2, b2 = weights
        x = jnp.einsum("besc,ecf->besf", x, w1) + b1[None, :, None]
        x = dropout(gelu(x), rate=self.dropout_rate, key=key)
        return jnp.einsum("besf,efc->besc", x, w2) + b2[None, :, None]

    def _few_at_a_time(self, x, weights, key):
        b, e, s, c = x.shape
        hidden = b * e * s * weights[0].shape[-1]
        most = by_platform.entries_at_a_time() / HIDDEN
        groups = _divisor(e, at_least=hidden / most)

        @jax.checkpoint
        def of_group(part):
            x, weights, group = part
            return self._feed_forward(x, weights, fold_in(key, group))

        def grouped(array, axis):
            shape = array.shape
            array = array.reshape(*shape[:axis], groups, -1, *shape[axis + 1 :])
            return jnp.moveaxis(array, axis, 0)

        parts = (
            grouped(x, 1),
            tuple(grouped(w, 0) for w in weights),
            jnp.arange(groups),
        )
        y = jax.lax.map(of_group, parts)  # [groups, B, E / groups, S, C]
        return jnp.moveaxis(y, 0, 1).reshape(b, e, s, c)


def _require_divisible(shape, mesh):
    batch, experts = shape[:2]
    checks.require(
        batch % mesh.size == 0,
        f"a batch of {batch} cannot be divided over the mesh of {mesh.size} devices; "
        f"take a multiple of {mesh.size}.",
    )
    checks.require(
        experts % mesh.shape[EXPERT] == 0,
        f"{experts} experts cannot be divided over mesh.expert = "
        f"{mesh.shape[EXPERT]}; take a multiple.",
    )


def _divisor(number, *, at_least):
    """Return the smallest divisor that is at least so large, or the number itself."""
    enough = (n for n in range(1, number) if number % n == 0 and n >= at_least)
    return next(enough, number)
