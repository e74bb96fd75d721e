"""Floating-point operations of a network's products, counted from its program.

Counted are matrix products and convolutions, two operations for a multiplication with
its addition, taps on the padding included, as one counts by hand. A loop's body counts
as often as it runs, which XLA's own cost analysis leaves out, and where a function has
a form for each platform the plain one is counted: the figure does not depend on the
machine.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax.config import ModelConfig
from swinsmt_jax.training.state import abstract_model


def forward_operations(config: ModelConfig, shape: tuple[int, int, int]) -> int:
    """Count the operations of one forward pass over [1, D, H, W, C_in]."""
    graphdef, params = abstract_model(config)
    x = jax.ShapeDtypeStruct((1, *shape, config.in_channels), jnp.float32)
    return count(lambda p, x: nnx.merge(graphdef, p)(x), params, x)


def count(function, *arguments) -> int:
    """Count the operations of a function of arrays or shapes, without running it."""
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        sides = equation.invars[0].aval.shape
        return (
            2 * equation.outvars[0].aval.size * math.prod(sides[i] for i in contracted)
        )
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // features
    if name == "cond":
        return _of_branches(params)
    if name == "while":
        raise ValueError("how often a while loop runs is not in the program.")
    times = params["length"] if name == "scan" else 1
    return times * sum(_of_jaxpr(inner) for inner in _inner(params))


def _of_branches(params) -> int:
    """Count the branch for platforms without a form of their own, or the largest."""
    platforms = params.get("branches_platforms")
    branches = params["branches"]
    if platforms is not None:
        branches = [b for b, p in zip(branches, platforms, strict=True) if p is None]
    return max(_of_jaxpr(branch.jaxpr) for branch in branches)


def _inner(params):
    """Yield the programs that an equation calls."""
    for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
