"""Types of arrays inside a user's `jax.shard_map`.

There an array varies over mesh axes or is known to be the same on all their devices. A
loop's carry must vary as what is added to it does, and a rule for gradients must return
types of its operands: both hold once all operands vary alike.
"""

import jax


def vary_alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Let arrays vary over every axis that one of them varies over; None stays None.

    The transpose sums the gradient of what was the same everywhere. Outside of
    `shard_map`, and with `check_vma=False`, nothing happens.
    """
    union = frozenset().union(*(_axes(a) for a in arrays if a is not None))
    return tuple(
        a if a is None or union == _axes(a) else _vary(a, union - _axes(a))
        for a in arrays
    )


def _axes(array):
    return jax.typeof(array).manual_axis_type.varying


def _vary(array, axes):
    return jax.lax.pcast(array, tuple(sorted(axes)), to="varying")
