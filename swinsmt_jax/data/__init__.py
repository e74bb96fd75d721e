"""Scans, labels and the input pipeline. Imports no jax."""
