"""Train Swin SMT or Swin UNETR, or continue a run: the same command again.

    python train.py --config=configs/demo.py --workdir=runs/demo

Any value of the config is changed by its name:

    python train.py --config=configs/demo.py --workdir=runs/fast \\
        --config.optimizer.learning_rate=1e-3 --config.data.patch_shape="(64, 64, 64)"

The docstrings of the files in configs/ say what they train, on what, and what to
expect. A workdir holds config.json, checkpoints/ (the latest two and the best by
validation Dice), metrics.jsonl and tensorboard/; evaluate.py reads it.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.evaluation import run
from swinsmt_jax.training import loop, startup

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file with get_config(), such as configs/demo.py", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, made if missing")
flags.mark_flags_as_required(["config", "workdir"])


def parse(arguments: list[str]) -> list[str]:
    """Parse the command line; a key that the config lacks is a user's error."""
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError) as error:
        reason = error if isinstance(error, flags.Error) else error.args[0]
        _refuse(f"{reason}\nSee python train.py --help")


def main(_) -> None:
    """Train as the config says; a user's error is one line and exit status 2."""
    startup.start()
    try:
        config = from_config_dict(CONFIG.value)
        loop.train(config, workdir=WORKDIR.value, validate=run.validate)
    except UserError as error:
        _refuse(error)


def _refuse(reason) -> None:
    print(f"train.py: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
