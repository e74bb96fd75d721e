"""Run `swinsmt_jax.convert.command`."""

from swinsmt_jax.convert import command
from swinsmt_jax.runtime import startup

if __name__ == "__main__":
    startup.run(command, program="convert")
