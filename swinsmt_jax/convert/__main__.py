"""Run `swinsmt_jax.convert.command`."""

from swinsmt_jax.convert import command

__doc__ = command.__doc__  # for --help

command.run()
