"""Pure jnp functions without parameters.

This package has the plain form of each operation, `cpu` and `gpu` the forms for only
one of them. `by_platform` chooses between them.
"""
