"""Soft Mixture-of-Experts (Puigcerver et al. 2023) with dynamic or learned slots.

Dynamic slots are made from the tokens themselves, as in the published Swin SMT: the
mean of every E consecutive tokens is projected to one slot embedding per expert.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.experts import Experts
from swinsmt_jax.layers.linear import fold_in
from swinsmt_jax.ops import by_platform, soft_routing
from swinsmt_jax.ops.normalization import rms_norm

ROUTING = ("dense", "streaming", "auto", "cudnn")
SLOTS = ("dynamic", "learned")

Routing = soft_routing.RoutingWeights | soft_routing.RoutingStatistics


@dataclass(frozen=True, kw_only=True)
class SoftMoEConfig:
    """Options of a Soft MoE, which the configs of networks inherit.

    Attributes:
        num_experts: experts E of every Soft MoE.
        routing: "dense" makes the weights of all tokens and slots, "streaming" never
            holds more than a block of them, forward and backward; "auto" takes the
            faster. Equal up to rounding. "cudnn" streams by cuDNN's kernel, with logits
            of bfloat16 operands, where its limits allow.
        slots: "dynamic" makes as many slots as tokens, S = ceil(N / E) per expert, from
            the tokens, as in the published Swin SMT; "learned" has parameters for
            `slots_per_expert`, as in the Soft MoE paper.
        slots_per_expert: S of learned slots.
    """

    num_experts: checks.Positive
    routing: str = "auto"
    slots: str = "dynamic"
    slots_per_expert: int = 0

    def __post_init__(self):
        checks.typed_fields("model", self)
        checks.one_of("model.routing", self.routing, ROUTING)
        checks.one_of("model.slots", self.slots, SLOTS)
        if self.slots == "learned":
            checks.positive("model.slots_per_expert", self.slots_per_expert)
        checks.require(
            self.slots == "learned" or self.slots_per_expert == 0,
            f"model.slots_per_expert is {self.slots_per_expert}, but dynamic slots are "
            'as many as the tokens; set slots="learned" or leave it out.',
        )


class SoftMoE(nnx.Module):
    """Soft MoE over a set of tokens, [B, N, C] -> [B, N, C].

    Args:
        channels: C.
        config: its options.
        hidden: channels inside an expert; 4 C if not given.
        dropout_rate: inside the experts.
        dtype: of the experts and of the weighted averages; routing is float32.
        rngs: initialises the parameters.
    """

    def __init__(
        self,
        channels: int,
        config: SoftMoEConfig,
        *,
        hidden: int | None = None,
        dropout_rate: float = 0.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.channels = channels
        self.num_experts = e = config.num_experts
        self.slots = config.slots
        self.routing = config.routing
        self.dtype = dtype
        self.gamma = initializers.constant(1.0, (channels,))
        if self.slots == "dynamic":
            self.slot_kernel = initializers.uniform_fan_in(
                rngs, (channels, e, channels), fan_in=channels
            )
            self.slot_gamma = initializers.constant(1.0, (channels,))
        else:
            self.slot_embeds = initializers.normal(
                rngs, (e, config.slots_per_expert, channels)
            )
            self.slot_norm_gamma = initializers.constant(1.0, (channels,))
        self.experts = Experts(
            channels,
            num_experts=e,
            hidden=4 * channels if hidden is None else hidden,
            dropout_rate=dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )

    def slot_embeddings(self, tokens: jax.Array) -> jax.Array:
        """Return the slots [B, E, S, C] of normalised tokens [B, N, C], in float32."""
        if self.slots == "learned":
            slots = rms_norm(self.slot_embeds[...], self.slot_norm_gamma[...])
            return jnp.broadcast_to(slots, (tokens.shape[0], *slots.shape))
        slots = jnp.einsum(
            "bsc,ced->besd",
            soft_routing.slot_means(tokens, self.num_experts),
            self.slot_kernel[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        return rms_norm(slots, self.slot_gamma[...])

    def __call__(
        self,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        return_routing: bool | str = False,
    ) -> jax.Array | tuple[jax.Array, Routing]:
        """Map tokens [B, N, C] to [B, N, C].

        Args:
            x: the tokens.
            key: switches dropout on.
            return_routing: True also returns the `RoutingWeights`, for which the
                routing is dense; "statistics" the `RoutingStatistics`, which stream.

        Raises:
            UserError: for a wrong shape, and fewer tokens than experts.
        """
        self._check(x, return_routing)
        with jax.named_scope("routing"):
            tokens = rms_norm(x, self.gamma[...])
            slots = self.slot_embeddings(tokens)
        key = fold_in(key, 0)
        routing: Any = None
        if return_routing is True or self.routing == "dense":
            y, routing = self._dense(tokens, slots, key)
        elif self.routing == "auto":
            y = by_platform.dense_or_streaming(
                x.shape[1] * self.num_experts * slots.shape[2],
                dense=lambda: self._dense(tokens, slots, key)[0],
                streaming=lambda: self._streaming(tokens, slots, key),
            )
        else:
            y = self._streaming(tokens, slots, key)
        if return_routing == "statistics":
            routing = soft_routing.statistics(tokens, slots)
        return (y, routing) if return_routing else y

    def _dense(self, tokens, slots, key):
        with jax.named_scope("routing"):
            logits = soft_routing.logits(tokens, slots)
            weights = soft_routing.RoutingWeights(
                dispatch=soft_routing.dispatch_weights(logits),
                combine=soft_routing.combine_weights(logits),
            )
        with jax.named_scope("dispatch"):
            inputs = soft_routing.dispatch(weights.dispatch, tokens.astype(self.dtype))
        with jax.named_scope("experts"):
            outputs = self.experts(inputs, key=key)
        with jax.named_scope("combine"):
            return soft_routing.combine(weights.combine, outputs), weights

    def _streaming(self, tokens, slots, key):
        fused = self.routing != "streaming"
        with jax.named_scope("dispatch"):
            values = tokens.astype(self.dtype)
            inputs = soft_routing.dispatch_streaming(tokens, slots, values, fused=fused)
        with jax.named_scope("experts"):
            outputs = self.experts(inputs, key=key, recompute=True)
        with jax.named_scope("combine"):
            return soft_routing.combine_streaming(tokens, slots, outputs, fused=fused)

    def _check(self, x, return_routing):
        checks.require(
            x.ndim == 3 and x.shape[2] == self.channels and 0 not in x.shape,
            f"tokens have shape {x.shape}, but must be [B, N, C] with C = "
            f"{self.channels} channels, and at least one of each.",
        )
        checks.require(
            self.slots == "learned" or x.shape[1] >= self.num_experts,
            f"there are {x.shape[1]} tokens for num_experts = {self.num_experts}, but "
            "each expert needs at least one for its slots; take a larger patch or "
            "fewer experts.",
        )
        checks.one_of("return_routing", return_routing, (False, True, "statistics"))
