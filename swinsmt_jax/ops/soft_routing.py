"""Soft MoE routing (Puigcerver et al. 2023) as pure functions.

The dense form makes the weights of every token and slot. The streaming form sees
dispatch and combine as two attentions and never holds more than a block of them.

Axes: b batch, n tokens, e experts, s slots per expert, c channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from swinsmt_jax.ops import by_platform
from swinsmt_jax.ops.blockwise_attention import logits_of


class RoutingWeights(NamedTuple):
    """Dispatch and combine weights of one Soft MoE, both float32 [B, N, E, S]."""

    dispatch: jax.Array
    combine: jax.Array


class RoutingStatistics(NamedTuple):
    """What a Soft MoE's routing looks like, float32; entropies in nats.

    No gradient flows from here: make losses of `RoutingWeights`.

    Attributes:
        dispatch_entropy: of each slot's weights over the tokens, [B, E, S].
        dispatch_max: greatest weight of a token in each slot, [B, E, S].
        combine_entropy: of each token's weights over all slots, [B, N].
        combine_max: greatest weight of a slot for each token, [B, N].
        expert_share: sum of each token's combine weights by expert, [B, N, E].
    """

    dispatch_entropy: jax.Array
    dispatch_max: jax.Array
    combine_entropy: jax.Array
    combine_max: jax.Array
    expert_share: jax.Array

    def importance(self) -> jax.Array:
        """Share of all tokens' combine weight that each expert has, [B, E]."""
        return self.expert_share.mean(1)

    def load(self) -> jax.Array:
        """Share of the tokens whose largest `expert_share` is the expert's, [B, E]."""
        experts = self.expert_share.shape[-1]
        return jax.nn.one_hot(self.expert_share.argmax(-1), experts).mean(1)


def slot_means(tokens: jax.Array, num_experts: int) -> jax.Array:
    """Average every `num_experts` consecutive tokens; the last mean may have fewer.

    With N tokens [B, N, C] and E experts there are S = ceil(N / E) means [B, S, C], so
    that E S slots are about as many as the tokens ("dynamic slots").
    """
    b, n, c = tokens.shape
    slots = -(-n // num_experts)
    padded = jnp.pad(tokens, ((0, 0), (0, slots * num_experts - n), (0, 0)))
    total = padded.reshape(b, slots, num_experts, c).sum(axis=2)
    count = jnp.minimum(num_experts, n - num_experts * jnp.arange(slots))
    return total / count[:, None].astype(total.dtype)


def logits(tokens: jax.Array, slot_embeddings: jax.Array) -> jax.Array:
    """Inner products of tokens [B, N, C] and slots [B, E, S, C]: float32 [B, N, E, S].

    In full float32 whatever the operands: see `blockwise_attention.logits_of`.
    """
    b, e, s, _ = slot_embeddings.shape
    return logits_of(tokens, _flat(slot_embeddings)).reshape(b, -1, e, s)


def dispatch_weights(logits: jax.Array) -> jax.Array:
    """Softmax of [B, N, E, S] over the tokens: how each slot averages them."""
    return jax.nn.softmax(logits, axis=1)


def combine_weights(logits: jax.Array) -> jax.Array:
    """Softmax of [B, N, E, S] over all slots: how each token averages the experts."""
    return jax.nn.softmax(logits, axis=(2, 3))


def dispatch(weights: jax.Array, tokens: jax.Array) -> jax.Array:
    """Slot inputs [B, E, S, C] from dispatch weights and tokens [B, N, C]."""
    return jnp.einsum("bnes,bnc->besc", weights.astype(tokens.dtype), tokens)


def combine(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Tokens [B, N, C] from combine weights and expert outputs [B, E, S, C]."""
    return jnp.einsum("bnes,besc->bnc", weights.astype(outputs.dtype), outputs)


def dispatch_streaming(
    tokens: jax.Array,
    slot_embeddings: jax.Array,
    values: jax.Array,
    *,
    fused: bool = False,
) -> jax.Array:
    """Do `dispatch_weights` and `dispatch` in memory that grows with N + E S.

    Args:
        tokens: [B, N, C], of which the logits are made.
        slot_embeddings: [B, E, S, C].
        values: [B, N, V], what the slots average.
        fused: see `by_platform.attend`.

    Returns:
        [B, E, S, V] in the values' dtype.
    """
    out = by_platform.attend(_flat(slot_embeddings), tokens, values, fused=fused)
    return out.reshape(*slot_embeddings.shape[:3], -1)


def combine_streaming(
    tokens: jax.Array,
    slot_embeddings: jax.Array,
    outputs: jax.Array,
    *,
    fused: bool = False,
) -> jax.Array:
    """Do `combine_weights` and `combine` in memory that grows with N + E S.

    Args:
        tokens: [B, N, C].
        slot_embeddings: [B, E, S, C].
        outputs: of the experts, [B, E, S, V].
        fused: see `by_platform.attend`.

    Returns:
        [B, N, V] in the outputs' dtype.
    """
    slots, outputs = _flat(slot_embeddings), _flat(outputs)
    return by_platform.attend(tokens, slots, outputs, fused=fused)


def statistics(tokens: jax.Array, slot_embeddings: jax.Array) -> RoutingStatistics:
    """Return the routing's statistics without ever holding its weights.

    The entropy of a softmax with weights p of logits l is logsumexp(l) - sum p l, and
    since l is an inner product, sum p l is that with the average of the keys. The
    statistics are constants to `jax.grad`.

    Args:
        tokens: [B, N, C].
        slot_embeddings: [B, E, S, C].
    """
    b, e, s, c = slot_embeddings.shape
    tokens, slots = jax.lax.stop_gradient((tokens, _flat(slot_embeddings)))
    tokens, slots = tokens.astype(jnp.float32), slots.astype(jnp.float32)
    mean_token, over_tokens = by_platform.attend_with_softmax(slots, tokens, tokens)
    expert = jnp.broadcast_to(jnp.repeat(jnp.eye(e), s, axis=0), (b, e * s, e))
    values = jnp.concatenate([slots, expert], axis=-1)
    mean, over_slots = by_platform.attend_with_softmax(tokens, slots, values)
    return RoutingStatistics(
        dispatch_entropy=over_tokens.entropy(_inner(slots, mean_token)).reshape(
            b, e, s
        ),
        dispatch_max=over_tokens.greatest_weight().reshape(b, e, s),
        combine_entropy=over_slots.entropy(_inner(tokens, mean[..., :c])),
        combine_max=over_slots.greatest_weight(),
        expert_share=mean[..., c:],
    )


def _inner(a, b):
    return jnp.einsum("bqc,bqc->bq", a, b, precision=jax.lax.Precision.HIGHEST)


def _flat(by_expert):
    """[B, E, S, ...] -> [B, E S, ...]."""
    b, e, s = by_expert.shape[:3]
    return by_expert.reshape(b, e * s, *by_expert.shape[3:])
