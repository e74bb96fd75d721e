"""Train a network, or continue a run: `swinsmt train` from a checkout."""

from swinsmt_jax import cli

if __name__ == "__main__":
    cli.run("train", program="train.py")
