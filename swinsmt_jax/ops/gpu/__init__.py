"""Forms of operations that only a GPU has."""
