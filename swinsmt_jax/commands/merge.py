"""Merge stores of different classes, to train one network on all of them.

    swinsmt merge --stores=stores/a,stores/b --store=stores/both

The new store has the classes of all, matched by name. A case annotates the classes of
its own store: a voxel without a label may be of any class that the case does not
annotate, so the others get no loss there, and no score. Stores must have one spacing.
"""

from absl import flags

from swinsmt_jax.data.merge import merge
from swinsmt_jax.runtime import startup


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line."""
    help = "stores of preprocess.py, two or more"
    flags.DEFINE_list("stores", None, help, flag_values=values)
    flags.DEFINE_string("store", None, "folder to make", flag_values=values)
    for name in ("stores", "store"):
        flags.mark_flag_as_required(name, flag_values=values)


def main(arguments: list[str]) -> None:
    """Merge, and say how many cases annotate each class."""
    startup.only_flags(arguments)
    for name, cases in merge(flags.FLAGS.stores, flags.FLAGS.store).items():
        print(f"{name}: annotated in {cases} cases")
