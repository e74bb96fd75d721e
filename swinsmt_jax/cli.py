"""The command `swinsmt` with its subcommands: train, predict and so on."""

import importlib
import sys

from absl import flags

from swinsmt_jax import checks
from swinsmt_jax.runtime import statuses

flags.disclaim_key_flags()  # so that --help of a command lists its own

COMMANDS = {  # name: (module, what it does)
    "preprocess": ("commands.preprocess", "turn a dataset into a store, read in crops"),
    "plan": ("commands.plan", "look at a dataset, and propose what fits it"),
    "merge": ("commands.merge", "merge stores of different classes"),
    "train": ("commands.train", "train a network, or continue a run"),
    "evaluate": ("commands.evaluate", "score a network or label files, compare two"),
    "inspect": ("commands.inspect", "say what a run, store, dataset or file is"),
    "predict": ("commands.predict", "segment CT scans"),
    "convert": ("convert.command", "exchange weights with PyTorch"),
    "export": ("inference.export", "write a network as one file that needs only jax"),
    "import-scan": ("data.import_scan", "add one scan with labels to a dataset"),
    "phantoms": ("phantoms.dataset", "make up scans of synthetic bodies"),
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        lines = [f"  {name:12} {words}" for name, (_, words) in COMMANDS.items()]
        print("usage: swinsmt COMMAND [--flag=value ...]\n", *lines, sep="\n")
        print("\nFor more: swinsmt COMMAND --help")
        return
    try:
        checks.one_of("the command", name, COMMANDS)
    except checks.UserError as error:
        print(f"swinsmt: {error}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"swinsmt {name}"]
    run(name, program=sys.argv[0])


def run(name: str, *, program: str) -> None:
    """Run a command on `sys.argv`.

    What it needs is imported here: `swinsmt phantoms` loads no jax.

    Args:
        name: one of COMMANDS.
        program: that says so in messages.
    """
    with statuses.ending_at_signals(program):
        module = importlib.import_module(f"swinsmt_jax.{COMMANDS[name][0]}")
        if hasattr(module, "define_flags"):
            startup = importlib.import_module("swinsmt_jax.runtime.startup")
            startup.run(module, program=program)
        else:
            module.main()
