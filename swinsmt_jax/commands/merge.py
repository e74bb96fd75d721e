"""Merge stores of different classes, to train one network on all of them.

    swinsmt merge --stores=stores/a,stores/b --store=stores/both

The new store has the classes of all, matched by name. A case annotates the classes of
its own store. A voxel without a label may belong to any class that the case does not
annotate, so these classes have no loss and no score there. All stores must have the
same spacing.
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
