"""Scripts that print a table; every figure of the README comes from one of them."""

import sys
from pathlib import Path


def command_line() -> str:
    """Return the command line that repeats this run."""
    name = Path(sys.argv[0]).stem
    return " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])
