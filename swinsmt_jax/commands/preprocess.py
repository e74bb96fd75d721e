"""Preprocess a dataset once, so that training reads crops instead of 117 files a case.

    python preprocess.py --source=data/Totalsegmentator_dataset_v201 --store=data/ts15 \
        --spacing=1.5 --workers=8

The source has the layout of TotalSegmentator-V2, of nnU-Net (dataset.json), or of the
JSON file given by --description; see docs/data.md. Each case becomes one folder of the
store: CT and merged labels in RAS orientation, resampled if a spacing is given
(--config=configs/x.py uses the config's), chunked and compressed. Pass the store to
train.py as --config.data.root. The same command continues, and retries cases that
failed or whose files changed; nothing is removed without --prune. A case that cannot be
used is named with its reason, the others continue, and the exit status is 1. At the end
report.html and report.json in the store describe its contents. SIGTERM and SIGUSR1 end
it with status 75, Ctrl-C with 130.
"""

import sys

from absl import flags

from swinsmt_jax import checks
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.data import store_report
from swinsmt_jax.data.nifti import OVERLAPS
from swinsmt_jax.data.preprocess import preprocess
from swinsmt_jax.data.resampling import LABEL_RULES
from swinsmt_jax.data.spacing import Sides, parse, text
from swinsmt_jax.runtime import startup
from swinsmt_jax.runtime.files import absolute


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line."""
    flags.DEFINE_string("source", None, "folder of the dataset", flag_values=values)
    flags.DEFINE_string("store", None, "folder to make", flag_values=values)
    help = "side of voxels in mm, or three: 1.5,1.5,3; 0 keeps each scan's own"
    flags.DEFINE_string("spacing", None, help, flag_values=values)
    help = "config that will train on the store; uses its data.spacing"
    flags.DEFINE_string("config", None, help, flag_values=values)
    help = "model folder of nnU-Net to fine-tune on the store; uses its spacing"
    flags.DEFINE_string("nnunet", None, help, flag_values=values)
    help = "JSON file that describes the source, or v1, v2, total_v3 (TotalSegmentator)"
    flags.DEFINE_string("description", "", help, flag_values=values)
    help = "names of the classes to keep; without it all"
    flags.DEFINE_list("classes", [], help, flag_values=values)
    help = "processes; each needs some 20 bytes a voxel"
    startup.define_pool(values, workers=1, help=help)
    help = "ids of cases to leave out; known: those of TotalSegmentator v2 that public"
    help = f"{help} reports name"
    flags.DEFINE_list("exclude", [], help, flag_values=values)
    help = "read the stored cases completely, and rebuild damaged ones"
    flags.DEFINE_bool("verify", False, help, flag_values=values)
    help = "only report what would be made, rebuilt, kept or removed"
    flags.DEFINE_bool("check", False, help, flag_values=values)
    help = "remove cases that the source no longer lists; let another source take over"
    flags.DEFINE_bool("prune", False, help, flag_values=values)
    help = "which class a resampled voxel gets; docs/data.md says what each keeps"
    rules = list(LABEL_RULES)
    flags.DEFINE_enum("label_resampling", "most", rules, help, flag_values=values)
    help = "which mask wins where masks overlap: the later class, or the smaller"
    flags.DEFINE_enum("overlaps", "order", OVERLAPS, help, flag_values=values)
    for name in ("source", "store"):
        flags.mark_flag_as_required(name, flag_values=values)


def spacing_of(options: flags.FlagValues) -> Sides:
    """Return the spacing of --spacing, --config or --nnunet, which may not differ.

    That of a config may be 0, which takes the store's.
    """
    given = None if options.spacing is None else parse("--spacing", options.spacing)
    where = options.nnunet or options.config
    if where is None:
        return given or 0.0
    checks.require(
        not (options.nnunet and options.config),
        "--nnunet and --config both set a spacing; remove one of them.",
    )
    if options.nnunet:
        from swinsmt_jax.convert import nnunet_finetune, nnunet_folder  # they load jax

        folder = nnunet_folder.read(options.nnunet, first=True)
        wanted = nnunet_finetune.spacing_of(folder)
    else:
        wanted = from_config_dict(startup.config_of(options.config)).data.spacing
    checks.require(
        given is None or text(wanted) in ("0", text(given)),
        f"--spacing is {options.spacing}, but the spacing of {where} is "
        f"{text(wanted)}; leave one of them out.",
    )
    return wanted if given is None else given


def main(arguments: list[str]) -> None:
    """Preprocess as the flags say."""
    startup.only_flags(arguments)
    options = flags.FLAGS
    root = absolute(options.store)
    spacing = spacing_of(options)
    failed = preprocess(
        options.source,
        root,
        spacing=spacing,
        description=options.description,
        classes=options.classes,
        **startup.pool_of(options, jax_in_workers=False),
        exclude=options.exclude,
        progress=True,
        verify=options.verify,
        label_resampling=options.label_resampling,
        overlaps=options.overlaps,
        prune=options.prune,
        check=options.check,
    )
    if options.check:
        return
    print(store_report.write(root))
    if failed:
        for name, reason in failed.items():
            print(f"left out: {name}: {reason}", file=sys.stderr)
        print(f"{len(failed)} cases are left out; {root / 'report.html'} says why")
        sys.exit(1)
