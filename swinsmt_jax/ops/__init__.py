"""Pure jnp functions without parameters."""
