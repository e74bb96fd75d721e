"""Segment CT scans with a trained network: `swinsmt predict` from a checkout."""

from swinsmt_jax import cli

if __name__ == "__main__":
    cli.run("predict", program="predict.py")
