"""Soft MoE routing (Puigcerver et al. 2023) as pure functions.

The dense form makes the weights of every token and slot. The streaming form sees
dispatch and combine as two attentions and never holds more than a block of them.

Axes: b batch, n tokens, e experts, s slots per expert, c channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from swinsmt_jax.ops import blockwise_attention, cudnn_attention


class RoutingWeights(NamedTuple):
    """Dispatch and combine weights of one Soft MoE, both float32 [B, N, E, S]."""

    dispatch: jax.Array
    combine: jax.Array


class RoutingStatistics(NamedTuple):
    """What a Soft MoE's routing looks like, float32; entropies in nats.

    Tokens that the mask leaves out have zeros, and so has a sample without any other.
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
        return self._average(self.expert_share)

    def load(self) -> jax.Array:
        """Share of the tokens whose largest `expert_share` is the expert's, [B, E]."""
        experts = self.expert_share.shape[-1]
        return self._average(jax.nn.one_hot(self.expert_share.argmax(-1), experts))

    def _average(self, by_token):
        """Average [B, N, E] over the tokens that the mask keeps."""
        kept = self.expert_share.any(-1, keepdims=True)
        return jnp.where(kept, by_token, 0).sum(1) / jnp.maximum(kept.sum(1), 1)


def slot_means(
    tokens: jax.Array, num_experts: int, *, mask: jax.Array | None = None
) -> jax.Array:
    """Average every `num_experts` consecutive tokens; the last mean may have fewer.

    With N tokens and E experts there are S = ceil(N / E) means, so that E S slots
    are about as many as the tokens ("dynamic slots").

    Args:
        tokens: [B, N, C].
        num_experts: E.
        mask: bool [B, N]; tokens that are False are left out of their mean, and a mean
            of none is zero.

    Returns:
        [B, S, C].
    """
    b, n, c = tokens.shape
    slots = -(-n // num_experts)
    padding = (0, slots * num_experts - n)
    if mask is None:
        count = jnp.minimum(num_experts, n - num_experts * jnp.arange(slots))
    else:
        tokens = jnp.where(mask[..., None], tokens, 0)
        kept = jnp.pad(mask, ((0, 0), padding)).reshape(b, slots, num_experts)
        count = jnp.maximum(kept.sum(axis=2), 1)
    padded = jnp.pad(tokens, ((0, 0), padding, (0, 0)))
    total = padded.reshape(b, slots, num_experts, c).sum(axis=2)
    return total / count[..., None].astype(total.dtype)


def slot_mask(mask: jax.Array, num_experts: int) -> jax.Array:
    """Return which dynamic slots have a token: bool [B, N] -> [B, E, S]."""
    b, n = mask.shape
    slots = -(-n // num_experts)
    kept = jnp.pad(mask, ((0, 0), (0, slots * num_experts - n)))
    filled = kept.reshape(b, 1, slots, num_experts).any(-1)
    return jnp.broadcast_to(filled, (b, num_experts, slots))


def logits(tokens: jax.Array, slot_embeddings: jax.Array) -> jax.Array:
    """Inner products of tokens [B, N, C] and slots [B, E, S, C]: float32 [B, N, E, S].

    In full float32 whatever the operands: see `blockwise_attention.logits_of`.
    """
    b, e, s, _ = slot_embeddings.shape
    flat = blockwise_attention.logits_of(tokens, _flat(slot_embeddings))
    return flat.reshape(b, -1, e, s)


def dispatch_weights(
    logits: jax.Array, *, token_mask: jax.Array | None = None
) -> jax.Array:
    """Softmax of [B, N, E, S] over the tokens: how each slot averages them.

    Tokens that are False in `token_mask`, bool [B, N], get no weight.
    """
    mask = None if token_mask is None else token_mask[:, :, None, None]
    return _softmax(logits, mask, axis=1)


def combine_weights(
    logits: jax.Array, *, slot_mask: jax.Array | None = None
) -> jax.Array:
    """Softmax of [B, N, E, S] over all slots: how each token averages the experts.

    Slots that are False in `slot_mask`, bool [B, E, S], get no weight.
    """
    mask = None if slot_mask is None else slot_mask[:, None]
    return _softmax(logits, mask, axis=(2, 3))


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
    token_mask: jax.Array | None = None,
    cudnn: bool = False,
) -> jax.Array:
    """Do `dispatch_weights` and `dispatch` in memory that grows with N + E S.

    Args:
        tokens: [B, N, C], of which the logits are made.
        slot_embeddings: [B, E, S, C].
        values: [B, N, V], what the slots average.
        token_mask: bool [B, N]; tokens that are False get no weight.
        cudnn: take cuDNN's kernel with bfloat16 logits where its limits allow.

    Returns:
        [B, E, S, V] in the values' dtype.
    """
    attend = (cudnn_attention if cudnn else blockwise_attention).attend
    out = attend(_flat(slot_embeddings), tokens, values, key_mask=token_mask)
    return out.reshape(*slot_embeddings.shape[:3], -1)


def combine_streaming(
    tokens: jax.Array,
    slot_embeddings: jax.Array,
    outputs: jax.Array,
    *,
    slot_mask: jax.Array | None = None,
    cudnn: bool = False,
) -> jax.Array:
    """Do `combine_weights` and `combine` in memory that grows with N + E S.

    Args:
        tokens: [B, N, C].
        slot_embeddings: [B, E, S, C].
        outputs: of the experts, [B, E, S, V].
        slot_mask: bool [B, E, S]; slots that are False get no weight.
        cudnn: take cuDNN's kernel with bfloat16 logits where its limits allow.

    Returns:
        [B, N, V] in the outputs' dtype.
    """
    attend = (cudnn_attention if cudnn else blockwise_attention).attend
    return attend(
        tokens, _flat(slot_embeddings), _flat(outputs), key_mask=_flat(slot_mask)
    )


def statistics(
    tokens: jax.Array,
    slot_embeddings: jax.Array,
    *,
    token_mask: jax.Array | None = None,
    slot_mask: jax.Array | None = None,
) -> RoutingStatistics:
    """Return the routing's statistics without ever holding its weights.

    The entropy of a softmax with weights p of logits l is logsumexp(l) - sum p l, and
    since l is an inner product, sum p l is that with the average of the keys. The
    statistics are constants to `jax.grad`.

    Args:
        tokens: [B, N, C].
        slot_embeddings: [B, E, S, C].
        token_mask, slot_mask: bool [B, N] and [B, E, S], as in dispatch and combine.
    """
    b, e, s, c = slot_embeddings.shape
    tokens, slots = jax.lax.stop_gradient((tokens, _flat(slot_embeddings)))
    tokens, slots = tokens.astype(jnp.float32), slots.astype(jnp.float32)
    attend = blockwise_attention.attend_with_softmax
    mean_token, over_tokens = attend(slots, tokens, tokens, key_mask=token_mask)
    expert = jnp.broadcast_to(jnp.repeat(jnp.eye(e), s, axis=0), (b, e * s, e))
    values = jnp.concatenate([slots, expert], axis=-1)
    mean, over_slots = attend(tokens, slots, values, key_mask=_flat(slot_mask))
    dispatch_entropy = over_tokens.entropy(_inner(slots, mean_token))
    return RoutingStatistics(
        dispatch_entropy=dispatch_entropy.reshape(b, e, s),
        dispatch_max=over_tokens.greatest_weight().reshape(b, e, s),
        combine_entropy=_kept(
            over_slots.entropy(_inner(tokens, mean[..., :c])), token_mask
        ),
        combine_max=_kept(over_slots.greatest_weight(), token_mask),
        expert_share=_kept(mean[..., c:], token_mask),
    )


def statistics_of(
    weights: RoutingWeights, *, token_mask: jax.Array | None = None
) -> RoutingStatistics:
    """Return the statistics of dense routing weights, for the mask they were made with.

    Constants to `jax.grad`, like `statistics`.
    """
    dispatch, combine = jax.lax.stop_gradient(weights)
    return RoutingStatistics(
        dispatch_entropy=jax.scipy.special.entr(dispatch).sum(1),
        dispatch_max=dispatch.max(1),
        combine_entropy=_kept(jax.scipy.special.entr(combine).sum((2, 3)), token_mask),
        combine_max=_kept(combine.max((2, 3)), token_mask),
        expert_share=_kept(combine.sum(3), token_mask),
    )


def _inner(a, b):
    return jnp.einsum("bqc,bqc->bq", a, b, precision=jax.lax.Precision.HIGHEST)


def _kept(by_token, mask):
    """Zeros for the tokens of [B, N, ...] that the mask leaves out."""
    if mask is None:
        return by_token
    mask = jnp.expand_dims(mask, tuple(range(2, by_token.ndim)))
    return jnp.where(mask, by_token, 0)


def _softmax(logits, mask, *, axis):
    """Softmax in which masked entries weigh nothing, all of them zeros if need be."""
    if mask is None:
        return jax.nn.softmax(logits, axis=axis)
    weights = jax.nn.softmax(
        jnp.where(mask, logits, blockwise_attention.LOWEST), axis=axis
    )
    return jnp.where(mask, weights, 0)


def _flat(by_expert):
    """[B, E, S, ...] -> [B, E S, ...]; None stays None."""
    if by_expert is None:
        return None
    b, e, s = by_expert.shape[:3]
    return by_expert.reshape(b, e * s, *by_expert.shape[3:])
