"""Outputs made from labels: statistics, anatomy checks, files for other programs.

No file here imports jax.
"""
