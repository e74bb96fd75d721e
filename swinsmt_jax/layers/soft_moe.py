"""Soft Mixture-of-Experts with dynamic slots (Puigcerver et al. 2023).

The slots are made from the tokens themselves, as in the published Swin SMT: the mean
of every E consecutive tokens is projected to one slot embedding per expert.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.linear import dropout, fold_in, gelu
from swinsmt_jax.ops import soft_routing
from swinsmt_jax.ops.normalization import rms_norm


class Experts(nnx.Module):
    """E two-layer MLPs with exact GELU, each on its own slots."""

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

    def __call__(self, slots: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Map slots [B, E, S, C] to [B, E, S, C]."""
        w1, b1, w2, b2 = (
            p[...].astype(self.dtype) for p in (self.w1, self.b1, self.w2, self.b2)
        )
        x = slots.astype(self.dtype)
        x = jnp.einsum("besc,ecf->besf", x, w1) + b1[None, :, None]
        x = gelu(x)
        x = dropout(x, rate=self.dropout_rate, key=key)
        return jnp.einsum("besf,efc->besc", x, w2) + b2[None, :, None]


class SoftMoE(nnx.Module):
    """Soft MoE over a set of tokens, [B, N, C] -> [B, N, C].

    Args:
        channels: C.
        num_experts: E; there are ceil(N / E) slots per expert.
        hidden: channels inside an expert; 4 C if not given.
        dropout_rate: inside the experts.
        dtype: of the experts and of the weighted averages; routing is float32.
        rngs: initialises the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_experts: int,
        hidden: int | None = None,
        dropout_rate: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        checks.positive("num_experts", num_experts)
        self.num_experts = num_experts
        self.dtype = dtype
        self.gamma = initializers.constant(1.0, (channels,))
        self.slot_kernel = initializers.uniform_fan_in(
            rngs, (channels, num_experts, channels), fan_in=channels
        )
        self.slot_gamma = initializers.constant(1.0, (channels,))
        self.experts = Experts(
            channels,
            num_experts=num_experts,
            hidden=hidden or 4 * channels,
            dropout_rate=dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )

    def slot_embeddings(self, tokens: jax.Array) -> jax.Array:
        """Return the dynamic slots [B, E, S, C] of normalised tokens, in float32."""
        means = soft_routing.slot_means(tokens, self.num_experts)
        slots = jnp.einsum(
            "bsc,ced->besd",
            means,
            self.slot_kernel[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        return rms_norm(slots, self.slot_gamma[...])

    def __call__(
        self,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        return_routing: bool = False,
    ) -> jax.Array | tuple[jax.Array, soft_routing.RoutingWeights]:
        """Map tokens [B, N, C] to [B, N, C]; on request with the routing weights."""
        checks.require(
            x.ndim == 3,
            f"tokens have shape {x.shape}, but must be [B, N, C].",
        )
        with jax.named_scope("routing"):
            tokens = rms_norm(x, self.gamma[...])
            logits = soft_routing.logits(tokens, self.slot_embeddings(tokens))
            weights = soft_routing.RoutingWeights(
                dispatch=soft_routing.dispatch_weights(logits),
                combine=soft_routing.combine_weights(logits),
            )
        slots = soft_routing.dispatch(weights.dispatch, tokens.astype(self.dtype))
        outputs = self.experts(slots, key=fold_in(key, 0))
        y = soft_routing.combine(weights.combine, outputs)
        return (y, weights) if return_routing else y
