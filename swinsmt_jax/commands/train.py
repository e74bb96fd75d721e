"""Train a network; the same command continues a run.

    python train.py --config=configs/demo.py --workdir=runs/demo

Flags change values of the config by name: --config.optimizer.learning_rate=1e-3. The
files in configs/ say what they train, on which data, and what to expect. The workdir
then holds config.json, run.json, metrics.jsonl, tensorboard/ and checkpoints/ for
evaluate.py.

SIGTERM and Ctrl-C finish the step, save, and exit with status 75 and 130. Status 2
means an error that you can fix, described in one line. docs/training.md explains
resuming, faults, memory, other weights and profiles, docs/multi_node.md several hosts.
"""

import dataclasses
import functools

from absl import flags
from ml_collections import ConfigDict

from swinsmt_jax.config import from_config_dict
from swinsmt_jax.convert import nnunet_finetune, starting_point
from swinsmt_jax.data import pipeline
from swinsmt_jax.evaluation import pictures, validation
from swinsmt_jax.runtime import distributed, signals, startup, xla_flags
from swinsmt_jax.training import loop


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line."""
    startup.define_config(values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    help = (
        "weights to begin a new run with: a workdir, a model folder of nnU-Net, .pt, "
    )
    help += ".pth or .safetensors"
    flags.DEFINE_string("start_from", None, help, flag_values=values)
    help = "also start if little of --start_from fits: another width, no encoder"
    flags.DEFINE_bool("partial", False, help, flag_values=values)
    help = "noise on experts that --start_from copies, as a share of their deviation"
    flags.DEFINE_float("upcycle_noise", 0.0, help, 0.0, 1.0, flag_values=values)
    help = "fold of a cross-validation, from 0 on; sets data.fold"
    flags.DEFINE_integer("fold", None, help, lower_bound=0, flag_values=values)
    help = "steps to trace into <workdir>/profile"
    flags.DEFINE_integer("profile", 0, help, lower_bound=0, flag_values=values)
    distributed.define_flags(values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)


def _start_from(path, config):
    """Read weights for a network of the classes of the config's data."""
    data = pipeline.settled(config.data, num_classes=config.model.out_channels)
    named = dataclasses.replace(config, data=data)
    return starting_point.start_from(
        path,
        names=starting_point.names_of(named),
        partial=flags.FLAGS.partial,
        noise=flags.FLAGS.upcycle_noise,
    )


def main(arguments: list[str]) -> None:
    """Train as the flags say."""
    startup.start(arguments)
    training = flags.FLAGS.config.get("training")
    if isinstance(training, ConfigDict) and training.get("deterministic"):
        xla_flags.set_deterministic()
    distributed.start(flags.FLAGS.workdir)
    if nnunet_finetune.is_of_plan(flags.FLAGS.config):
        planned = nnunet_finetune.planned
        config = planned(flags.FLAGS.config, flags.FLAGS.start_from)
    else:
        config = from_config_dict(flags.FLAGS.config)
    if flags.FLAGS.fold is not None:
        data = dataclasses.replace(config.data, fold=flags.FLAGS.fold)
        config = dataclasses.replace(config, data=data)
    start_from = None
    if flags.FLAGS.start_from:
        start_from = functools.partial(_start_from, flags.FLAGS.start_from, config)
    with signals.listening_if_distributed():
        loop.train(
            config,
            workdir=flags.FLAGS.workdir,
            validate=functools.partial(validation.validate, draw=pictures.panel),
            profile_steps=flags.FLAGS.profile,
            start_from=start_from,
        )
