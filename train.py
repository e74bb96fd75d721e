"""Train Swin SMT or Swin UNETR, or continue a run: the same command again.

    python train.py --config=configs/demo.py --workdir=runs/demo

Any value of the config is changed by its name: --config.optimizer.learning_rate=1e-3
or --config.data.patch_shape="(64, 64, 96)". The docstrings of the files in configs/ say
what they train, on what, and what to expect. The workdir then holds config.json,
metrics.jsonl, tensorboard/ and checkpoints/, for evaluate.py.
"""

import contextlib
import sys

from absl import app, flags
from ml_collections import config_flags

from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.evaluation import run
from swinsmt_jax.training import loop, startup


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line."""
    text = "file with get_config(), such as configs/demo.py"
    config_flags.DEFINE_config_file("config", None, text, flag_values=values)
    text = "folder of the run, made if missing"
    flags.DEFINE_string("workdir", None, text, flag_values=values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)


def parse(arguments: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse the command line; a `UserError` for what the flags or the config lack."""
    try:
        rest = values(arguments)
        values.config.lock()  # raises if the file could not be read
        return rest
    except (flags.Error, OSError) as error:
        raise UserError(f"{' '.join(str(error).split())} See --help.") from error
    except (AttributeError, KeyError) as error:  # of the locked ConfigDict
        while isinstance(error, Exception):
            error = error.args[0]
        raise UserError(f"unknown config key {'. '.join(error.splitlines())}") from None


@contextlib.contextmanager
def exit_on_user_error():
    """Make a user's error one line on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


@exit_on_user_error()
def main(_) -> None:
    """Train as the flags say."""
    startup.start()
    options = flags.FLAGS
    config = from_config_dict(options.config)
    loop.train(config, workdir=options.workdir, validate=run.validate)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=exit_on_user_error()(parse))
