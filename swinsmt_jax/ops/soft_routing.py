"""Soft MoE routing (Puigcerver et al. 2023) as pure functions, dense form.

Axes: b batch, n tokens, e experts, s slots per expert, c channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RoutingWeights(NamedTuple):
    """Dispatch and combine weights of one Soft MoE, both float32 [B, N, E, S]."""

    dispatch: jax.Array
    combine: jax.Array


def slot_means(tokens: jax.Array, num_experts: int) -> jax.Array:
    """Average every `num_experts` consecutive tokens; the last mean may have fewer.

    With N tokens and E experts there are S = ceil(N / E) means, so that E S slots
    are about as many as the tokens ("dynamic slots").

    Args:
        tokens: [B, N, C].
        num_experts: E.

    Returns:
        [B, S, C].
    """
    b, n, c = tokens.shape
    slots = -(-n // num_experts)
    padded = jnp.pad(tokens, ((0, 0), (0, slots * num_experts - n), (0, 0)))
    total = padded.reshape(b, slots, num_experts, c).sum(axis=2)
    count = jnp.minimum(num_experts, n - num_experts * jnp.arange(slots))
    return total / count[:, None].astype(total.dtype)


def logits(tokens: jax.Array, slot_embeddings: jax.Array) -> jax.Array:
    """Inner products of tokens [B, N, C] and slots [B, E, S, C]: float32 [B, N, E, S].

    Their magnitude reaches C, so they are computed in full float32: rounding the
    operands to bfloat16 would move them by tenths, and the softmax by tens of percent.
    """
    return jnp.einsum(
        "bnc,besc->bnes",
        tokens.astype(jnp.float32),
        slot_embeddings.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


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
