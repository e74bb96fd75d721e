"""Evaluate a trained network on a split: `swinsmt evaluate` from a checkout."""

from swinsmt_jax import cli

if __name__ == "__main__":
    cli.run("evaluate", program="evaluate.py")
