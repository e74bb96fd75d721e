"""Prior weights on kernel entries, as a pure function around any optimiser.

The Bayesian frequency prior of 3D RepUX-Net (Lee et al., MICCAI 2023) multiplies each
large kernel W by a fixed matrix P. The parameters here are the effective kernels E,
which start as P W. So saving, evaluating and converting need no P.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from swinsmt_jax.models.registry import Prior
from swinsmt_jax.sharding import path_name


class Rule(NamedTuple):
    """The effect of a prior P on one parameter E, entry by entry.

    Attributes:
        gradient: (gradient by E, P) -> gradient for the optimiser.
        parameter: (E, P) -> parameter for the optimiser.
        update: (the optimiser's update, E, P) -> update of E.
    """

    gradient: Callable
    parameter: Callable
    update: Callable


RULES = {
    # W is what is learnt, E = P W what is used.
    "fixed": Rule(lambda g, p: g * p, lambda e, p: e / p, lambda u, e, p: u * p),
    # The kernel is weighed again in every step.
    "compound": Rule(lambda g, p: g, lambda e, p: e, lambda u, e, p: p * (e + u) - e),
    # The same, and no update arrives, as in the published code.
    "released": Rule(lambda g, p: 0 * g, lambda e, p: e, lambda u, e, p: p * e - e),
}


def around(
    optimizer: optax.GradientTransformation, prior: Prior
) -> optax.GradientTransformation:
    """Return an optimiser for parameters, some of which have a prior.

    Its state is the same as without a prior.
    """
    rule = RULES[prior.rule]

    def weighed(function, *trees):
        def one(path, first, *rest):
            if not prior.acts_on(path_name(path)):
                return first
            return function(first, *rest, prior.weights)

        return jax.tree_util.tree_map_with_path(one, *trees)

    def update(grads, state, params):
        seen = weighed(rule.gradient, grads), weighed(rule.parameter, params)
        updates, state = optimizer.update(seen[0], state, seen[1])
        return weighed(rule.update, updates, params), state

    return optax.GradientTransformation(optimizer.init, update)
