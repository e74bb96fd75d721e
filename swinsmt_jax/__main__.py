"""`python -m swinsmt_jax COMMAND` is `swinsmt COMMAND`."""

from swinsmt_jax import cli

if __name__ == "__main__":
    cli.main()
