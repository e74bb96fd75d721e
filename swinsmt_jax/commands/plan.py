"""Inspect a dataset before preprocessing, and propose spacing, patch and commands.

    swinsmt plan --source=data/mine

prints the spacings, shapes and extents of its scans and the voxels and cases of each
class. It proposes the commands that make a store and train on it. All labels are read;
--limit=20 reads only the first 20 cases. --config=configs/x.py proposes another network
than nnU-Net's. --measure compiles its training step and prints the memory and time that
it takes on one device of this machine.
"""

import numpy as np
from absl import flags

from swinsmt_jax import checks
from swinsmt_jax.config import ExperimentConfig, from_config_dict
from swinsmt_jax.data import dataset_plan
from swinsmt_jax.data.dataset import open_dataset
from swinsmt_jax.data.spacing import text
from swinsmt_jax.models import registry
from swinsmt_jax.runtime import startup
from swinsmt_jax.runtime.files import absolute

CONFIG = "configs/nnunet_plain.py"
BATCH = 2  # crops of a step, nnU-Net's least


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line."""
    flags.DEFINE_string("source", None, "folder of the dataset", flag_values=values)
    help = "JSON file that describes the source, or v1, v2, total_v3 (TotalSegmentator)"
    flags.DEFINE_string("description", "", help, flag_values=values)
    flags.DEFINE_integer(
        "limit", 0, "only the first cases; 0: all", 0, flag_values=values
    )
    help = "config of the network to propose"
    flags.DEFINE_string("config", CONFIG, help, flag_values=values)
    help = "compile a training step and time it on this machine"
    flags.DEFINE_bool("measure", False, help, flag_values=values)
    flags.mark_flag_as_required("source", flag_values=values)


def main(arguments: list[str]) -> None:
    """Print the plan."""
    startup.only_flags(arguments)
    options = flags.FLAGS
    print(
        plan(
            options.source,
            description=options.description,
            limit=options.limit,
            config=options.config,
            measure=options.measure,
        )
    )


def plan(
    source: str,
    *,
    description: str = "",
    limit: int = 0,
    config: str = CONFIG,
    measure: bool = False,
) -> str:
    """Return the plan of a dataset as text.

    Args:
        source: folder of the dataset.
        description: JSON file that describes it, if not its own.
        limit: of the cases that are looked at; 0 takes all.
        config: file of the network that is proposed.
        measure: compile a training step of it and time it on this machine.

    Raises:
        UserError: for a dataset without cases, a case or config that cannot be read,
            and a network that cannot take such patches.
    """
    proposed = startup.config_of(config)
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
        known = int(facts.annotated[:, number].sum())
        cases = some if known == len(names) else f"{some}/{known}"
        rare = "  rare" if voxels < dataset_plan.RARE * total else ""
        row = f"{name:<32}{cases:>7}{voxels:>13,}{voxels / total:>12.2%}"
        lines.append(row + ("  in no case" if not some else rare))
    proposed.model.out_channels = found.classes.num_classes
    stride = np.max(from_config_dict(proposed).model.total_stride)
    spacing, patch = text(facts.spacing()), facts.patch(stride=int(stride))
    proposed.data.update({"patch_shape": patch, "batch_size": BATCH})
    store = f"stores/{absolute(source).name}"
    told = f" --description={description}" if description else ""
    if not facts.annotated.all():
        lines.append("cases: those that have the class / those that annotate it")
    return "\n".join(
        [
            *lines,
            "proposed:",
            f"  python preprocess.py --source={source}{told} --store={store} "
            f"--spacing={spacing}",
            f"  python train.py --config={config} --workdir=runs/mine "
            f"--config.data.root={store} --config.data.spacing=0.0 "
            f"--config.model.out_channels={found.classes.num_classes} "
            f'--config.data.patch_shape="{patch}" --config.data.batch_size={BATCH}',
            *_cost(from_config_dict(proposed), measure),
        ]
    )


def _cost(config: ExperimentConfig, measure: bool):
    """Yield lines that say what a training step takes."""
    import jax

    from swinsmt_jax.models import abstract_model
    from swinsmt_jax.runtime.memory import gigabytes
    from swinsmt_jax.runtime.operations import forward_operations

    params = jax.tree.leaves(abstract_model(config.model)[1])
    count = sum(array.size for array in params)
    patch, batch = config.data.patch_shape, config.data.batch_size
    operations = 3 * batch * forward_operations(config.model, patch)
    yield (
        f"a step of {registry.entry_of(config.model).name} on {batch} crops: "
        f"{operations / 1e12:.4g} TFLOP; {count:,} parameters, which take "
        f"{gigabytes(12 * count)} with AdamW's moments"
    )
    if not measure:
        yield "  --measure gives memory and time of a step on this machine"
        return
    from swinsmt_jax.training import trial

    try:
        yield f"  measured on one device of this machine: {trial.take(config)}"
    except checks.UserError as error:
        yield f"  measured on one device of this machine: {error}"
