"""Look at a dataset before preprocessing: what it holds, and what would fit it.

    swinsmt plan --source=data/mine

prints spacings, shapes and extents of its scans, voxels of each class and in how many
cases they are, and proposes the commands that make a store and train on it. All labels
are read; --limit=20 looks at the first 20 cases alone.
"""

import numpy as np
from absl import flags

from swinsmt_jax import checks
from swinsmt_jax.data import dataset_plan
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.spacing import text
from swinsmt_jax.runtime import startup
from swinsmt_jax.runtime.files import absolute


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line."""
    flags.DEFINE_string("source", None, "folder of the dataset", flag_values=values)
    help = "JSON file that describes the source, or v1, v2, total_v3 (TotalSegmentator)"
    flags.DEFINE_string("description", "", help, flag_values=values)
    flags.DEFINE_integer("limit", 0, "first cases only; 0: all", 0, flag_values=values)
    flags.mark_flag_as_required("source", flag_values=values)


def main(arguments: list[str]) -> None:
    """Print the plan."""
    startup.only_flags(arguments)
    options = flags.FLAGS
    print(plan(options.source, description=options.description, limit=options.limit))


def plan(source: str, *, description: str = "", limit: int = 0) -> str:
    """Return the plan of a dataset as text.

    Raises:
        UserError: for a dataset without cases, and a case that cannot be read.
    """
    found = open_dataset(source, description=description)
    names = list(found.splits)[: limit or None]
    checks.require(bool(names), f"{found.root} has no case that can be used.")
    facts = dataset_plan.look_at([found.case(n, found.splits[n]) for n in names])
    splits = [found.splits[name] for name in names]
    lines = [
        f"{found.root}: {len(names)} cases looked at ("
        + ", ".join(f"{splits.count(s)} {s}" for s in ("train", "val", "test"))
        + f"), {len(found.refused)} refused",
        f"{'':<24}{'least':>21}{'median':>21}{'most':>21}",
    ]
    for title, values, digits in (
        ("voxel sides, mm", facts.sides, 2),
        ("shape, voxels", facts.shapes, 0),
        ("extent, mm", facts.sides * facts.shapes, 0),
    ):
        rows = (values.min(axis=0), np.median(values, axis=0), values.max(axis=0))
        cells = (" x ".join(f"{v:.{digits}f}" for v in row) for row in rows)
        lines.append(f"{title:<24}" + "".join(f"{cell:>21}" for cell in cells))
    lines.append(f"{'class':<32}{'cases':>7}{'voxels':>13}{'of labelled':>13}")
    total = max(1, facts.counts[:, 1:].sum())
    for number, name in enumerate(found.classes.names[1:], start=1):
        voxels = int(facts.counts[:, number].sum())
        some = int((facts.counts[:, number] > 0).sum())
        rare = "  rare" if voxels < dataset_plan.RARE * total else ""
        row = f"{name:<32}{some:>7}{voxels:>13,}{voxels / total:>12.2%}"
        lines.append(row + ("  in no case" if not some else rare))
    spacing, patch = text(facts.spacing()), facts.patch()
    store = f"stores/{absolute(source).name}"
    told = f" --description={description}" if description else ""
    return "\n".join(
        [
            *lines,
            "proposed:",
            f"  python preprocess.py --source={source}{told} --store={store} "
            f"--spacing={spacing}",
            "  python train.py --config=configs/nnunet_plain.py --workdir=runs/mine "
            f"--config.data.root={store} --config.data.spacing=0.0 "
            f"--config.model.out_channels={found.classes.num_classes} "
            f'--config.data.patch_shape="{patch}"',
        ]
    )
