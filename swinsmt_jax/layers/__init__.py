"""Flax modules shared by the networks."""
