"""Preprocess a dataset once for training: `swinsmt preprocess` from a checkout."""

from swinsmt_jax import cli

if __name__ == "__main__":
    cli.run("preprocess", program="preprocess.py")
