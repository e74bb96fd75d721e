"""Weights of PyTorch to a workdir, and a workdir's network to PyTorch.

    python -m swinsmt_jax.convert from_torch --config=configs/swin_unetr_b.py \\
        --weights=model.pt --workdir=runs/converted
    python -m swinsmt_jax.convert to_torch --workdir=runs/x --output=model.safetensors
    python -m swinsmt_jax.convert --to=nnunet --workdir=runs/x --output=Dataset001_X

Weights are .pt, .pth or .safetensors; no code in them is run. from_torch wants all
parameters of the network; --partial takes what fits, such as a pretrained encoder, and
lists the rest. The new workdir is for evaluate.py; to train from weights, give them to
train.py as --start_from. --to=nnunet writes a model folder with which nnU-Net v2
predicts, of a run of one of its networks at a spacing of its own.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import optax
from absl import flags, logging

from swinsmt_jax import checks, class_map, convert, labels, sharding
from swinsmt_jax.config import ExperimentConfig, MeshConfig, from_config_dict
from swinsmt_jax.convert import files, nnunet_writer, starting_point
from swinsmt_jax.convert.prefixes import renamed
from swinsmt_jax.runtime import record, startup
from swinsmt_jax.runtime.files import absolute
from swinsmt_jax.training import checkpoint, state
from swinsmt_jax.training.checkpoint import origin_of
from swinsmt_jax.training.workdir import locked, open_workdir

NEEDED = {  # flags of each direction
    "from_torch": ("config", "weights", "workdir"),
    "to_torch": ("workdir", "output"),
    "to_nnunet": ("workdir", "output"),
}


def from_torch(
    config: ExperimentConfig,
    *,
    weights: str,
    workdir: str,
    partial: bool,
    classes: Sequence[str] = (),
) -> None:
    """Write a workdir whose only checkpoint, of step 0, holds the weights.

    Args:
        config: of the experiment.
        weights, workdir: to read and to make.
        partial: take what fits.
        classes: names of the label ids from 1 on, or one of `class_map.VERSIONS`; empty
            takes those of `data.classes`, or else neutral ones.

    Raises:
        UserError: for weights that cannot be read or do not fit, and a workdir that
            holds checkpoints; nothing is written then.
    """
    config = _with_names(config, classes)
    found, optimizer = files.read(weights), optax.identity()
    graphdef, abstract = state.abstract_state(
        config.model,
        optimizer,
        mesh=sharding.make_mesh(MeshConfig(data=1, expert=1)),
        averaged=config.training.ema_decay > 0,
    )
    first = state.initialize(
        config.model, optimizer, seed=config.training.seed, abstract=abstract
    )
    first = state.changed(first, graphdef, lambda model: _load(model, found, partial))
    with locked(workdir):
        folder = open_workdir(workdir, config)
        with checkpoint.open_checkpoints(folder) as checkpoints:
            checks.require(
                not checkpoints.steps(),
                f"the workdir {folder} already holds checkpoints of steps "
                f"{checkpoints.steps()}; choose another --workdir.",
            )
            record.add_start(folder, {"weights": str(absolute(weights))})
            checkpoints.save(first, origin=origin_of(config, data=""))
    print(f"written to {folder}")


def _with_names(config, classes):
    """Return a config that names every class of the network, as given or neutrally."""
    given, count = tuple(classes) or config.data.classes, config.model.out_channels - 1
    if len(given) == 1 and given[0] in class_map.VERSIONS:
        given = class_map.VERSIONS[given[0]].names[1:]
    elif given:
        given = class_map.make(given, {}, where="data.classes").names[1:]
    checks.require(
        not given or len(given) == count,
        f"data.classes has {len(given)} names, but the network gives {count} classes "
        "besides the background; name them all, in the order of their ids.",
    )
    if not given:
        logging.warning(
            "The %d classes are called class_1, class_2 and so on, since weights do "
            "not name them; pass --classes=spleen,liver,..., or --classes=v2 for "
            "TotalSegmentator's.",
            count,
        )
        given = tuple(labels.names_by_id((), num_classes=count + 1).values())
    return replace(config, data=replace(config.data, classes=given))


def _load(model, found, partial):
    """Load the weights, and say what became of them."""
    if partial:
        print(starting_point.load_what_fits(model, found, partial=True))
        return ""
    try:
        convert.load_torch(model, found)
    except checks.UserError as error:
        raise checks.UserError(
            f"{error} --partial loads what fits and lists the rest."
        ) from error
    known = convert.to_torch(model)
    named, words = renamed(found, known)
    more = len(named.keys() - known.keys())
    print(
        f"{len(found) - more} parameters loaded, and all that the network has; {more} "
        f"buffers of the weights not needed{'; ' if words else ''}{words}"
    )
    return ""


def to_torch(*, workdir: str, output: str, step: str | None) -> None:
    """Write the network of a checkpoint as .safetensors with PyTorch's names."""
    config, model, info = checkpoint.load_model(workdir, step=step)
    names = starting_point.names_of(config)
    files.write(output, convert.to_torch(model, buffers=True), names=names)
    print(f"step {info['step']} written to {output}")


def to_nnunet(*, workdir: str, output: str, step: str | None) -> None:
    """Write a model folder of nnU-Net v2; see `nnunet_writer.write`."""
    config, model, info = checkpoint.load_model(workdir, step=step)
    data = config.data
    checks.require(
        bool(np.all(data.spacing)),
        f"the network of {workdir} sees each scan at its own spacing, but nnU-Net "
        "needs one; train with data.spacing.",
    )
    low, high = data.hu_range
    mean, std = data.normalization or (low, high - low)
    names = labels.names_by_id(data.class_names, num_classes=config.model.out_channels)
    folder = nnunet_writer.write(
        output,
        model,
        patch_shape=data.patch_shape,
        spacing=np.broadcast_to(data.spacing, 3).tolist(),
        batch_size=data.batch_size,
        clip=(low, high),
        mean=mean,
        std=std,
        names=(data.class_names[0], *names.values()),
    )
    print(f"step {info['step']} written to {folder}")


def main(arguments: list[str]) -> None:
    """Run the direction that the first argument names."""
    startup.start()
    options = flags.FLAGS
    given = [*arguments[1:], *([f"to_{options.to}"] if options.to else [])]
    checks.require(
        len(given) == 1 and given[0] in NEEDED,
        f"give from_torch, to_torch or --to=nnunet; see --help. Got {given}.",
    )
    for name in NEEDED[given[0]]:
        checks.require(
            bool(options[name].value), f"{given[0]} needs --{name}; see --help."
        )
    if given[0] != "from_torch":
        write = to_torch if given[0] == "to_torch" else to_nnunet
        write(workdir=options.workdir, output=options.output, step=options.step)
        return
    from_torch(
        from_config_dict(options.config),
        weights=options.weights,
        workdir=options.workdir,
        partial=options.partial,
        classes=options.classes,
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line."""

    def text(name, help):
        flags.DEFINE_string(name, None, help, flag_values=values)

    startup.define_config(values)
    text("workdir", "folder of a run; from_torch makes it")
    text("weights", ".pt, .pth or .safetensors to read")
    text("output", ".safetensors to write, or the folder of a dataset of nnU-Net")
    choices, help = ["torch", "nnunet"], "format to write"
    flags.DEFINE_enum("to", None, choices, help, flag_values=values)
    text("step", "checkpoint: a number, 'best' or 'latest'")
    help = "names of the label ids from 1 on; or v1, v2, total_v3 (TotalSegmentator)"
    flags.DEFINE_list("classes", [], help, flag_values=values)
    help = "take what fits and list the rest"
    flags.DEFINE_bool("partial", False, help, flag_values=values)
