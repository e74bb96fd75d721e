"""Pure jnp functions without parameters.

The plain form of each operation stands here, what only a CPU wants in `cpu`, what only
a GPU wants in `gpu`. `by_platform` chooses between them.
"""
