"""Floating-point operations of a network's products, counted from its program.

Matrix products and convolutions count two operations for a multiplication with its
addition, including taps on the padding, as one counts by hand. Real Fourier transforms
of n numbers count 2.5 n log2 n. A loop's body counts as often as it runs, which XLA's
own cost analysis ignores. Where a function has a form for each platform, the plain one
is counted, so the figure does not depend on the machine.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import JaxprEqn

from swinsmt_jax.models import abstract_model
from swinsmt_jax.models.registry import NetworkConfig

PRODUCTS = ("dot_general", "conv_general_dilated", "fft")


def forward_operations(config: NetworkConfig, shape: Sequence[int]) -> int:
    """Count the operations of one forward pass over [1, D, H, W, C_in].

    The network is taken in its plainest form, with Soft MoE dense and nothing repeated.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    plain: dict[str, Any] = {"routing": "dense", "remat": ()}
    plain = {name: value for name, value in plain.items() if name in fields}
    config = dataclasses.replace(config, **plain)
    graphdef, params = abstract_model(config)
    x = jax.ShapeDtypeStruct((1, *shape, config.in_channels), jnp.float32)
    return count(lambda p, x: nnx.merge(graphdef, p)(x), params, x)


def count(function: Callable, *arguments: Any) -> int:
    """Count the operations of a function of arrays or shapes, without running it."""
    return sum(
        times * of_product(equation)
        for _, equation, times in products(function, *arguments)
    )


def products(
    function: Callable, *arguments: Any
) -> Iterator[tuple[str, JaxprEqn, int]]:
    """Yield the products of a function: name of its scope, equation, times it runs."""
    yield from _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr, "", 1)


def of_product(equation: Any) -> int:
    """Count the operations of one product."""
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        sides = equation.invars[0].aval.shape
        return (
            2 * equation.outvars[0].aval.size * math.prod(sides[i] for i in contracted)
        )
    if equation.primitive.name == "fft":
        side = math.prod(params["fft_lengths"])
        count = math.prod(equation.invars[0].aval.shape[: -len(params["fft_lengths"])])
        return round(2.5 * count * side * math.log2(side))
    kernel = equation.invars[1].aval
    features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return 2 * equation.outvars[0].aval.size * kernel.size // features


def _of_jaxpr(jaxpr, scope, times):
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inside = f"{scope}/{equation.source_info.name_stack}"
        if name in PRODUCTS:
            yield inside, equation, times
        elif name == "cond":
            yield from _of_branches(params, inside, times)
        elif name == "while":
            raise ValueError("how often a while loop runs is not in the program.")
        else:
            runs = times * (params["length"] if name == "scan" else 1)
            for inner in _inner(params):
                yield from _of_jaxpr(inner, inside, runs)


def _of_branches(params, scope, times):
    """Yield from the branch for platforms without their own form, or the largest."""
    platforms = params.get("branches_platforms")
    branches = params["branches"]
    if platforms is not None:
        branches = [b for b, p in zip(branches, platforms, strict=True) if p is None]
    found = [list(_of_jaxpr(branch.jaxpr, scope, times)) for branch in branches]
    yield from max(
        found, key=lambda products: sum(t * of_product(e) for _, e, t in products)
    )


def _inner(params):
    """Yield the programs that an equation calls."""
    for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
