"""What is made of labels: statistics, checks of anatomy, and files for other programs.

No file here imports jax.
"""
