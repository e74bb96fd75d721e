"""Optimiser, state, step, checkpoints and loop."""
