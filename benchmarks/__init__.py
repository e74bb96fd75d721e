"""Scripts that print a table; every figure of the README comes from one of them."""

import sys
from pathlib import Path

from absl import flags


def command_line() -> str:
    """Return the command line that repeats this run."""
    name = Path(sys.argv[0]).stem
    return " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])


def define_file(name: str, help: str) -> flags.FlagHolder:
    """Define a flag for a file to write, refused at once if its folder is missing."""
    holder = flags.DEFINE_string(name, None, help)
    flags.register_validator(
        name,
        lambda path: not path or Path(path).resolve().parent.is_dir(),
        message="lies in a folder that does not exist; make it first",
    )
    return holder
