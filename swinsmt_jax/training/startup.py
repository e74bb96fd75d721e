"""How the scripts begin and end: log lines, compilation cache, users' errors."""

import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from logging import ERROR, WARNING, LogRecord
from pathlib import Path

import jax
from absl import logging

from swinsmt_jax.checks import UserError, require
from swinsmt_jax.training import interrupts, processes

CACHE = Path("~/.cache/swinsmt_jax")
PACKAGE = str(Path(__file__).parents[1])


def start(arguments: Sequence[str] = ()) -> None:
    """Show this package's log lines, and keep compiled programs between runs.

    They are kept in ~/.cache/swinsmt_jax, or where JAX_COMPILATION_CACHE_DIR says.
    `arguments` are for `only_flags`.
    """
    only_flags(arguments)
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_for_users)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))


def only_flags(arguments: Sequence[str]) -> None:
    """Raise `UserError` if a command line, script's name first, has more than flags."""
    require(
        len(arguments) < 2,
        f"{' '.join(arguments[1:])!r} belongs to no flag; write --flag=value, and "
        "--flag or --noflag for what is true or false.",
    )


@contextlib.contextmanager
def exit_on_user_error(script: str) -> Iterator[None]:
    """Make a `UserError` one line on stderr and exit status 2, without traceback.

    A run that ended at a signal exits with `interrupts.STATUS`.
    Of several processes, one that fails alone does not wait for the others.
    """
    try:
        yield
    except interrupts.Interrupted as error:
        if processes.is_first():
            print(f"{script}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except processes.SharedError as error:
        if processes.is_first():
            print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        if processes.several():
            processes.abandon(2)
        sys.exit(2)
    except Exception as error:
        if processes.several():
            traceback.print_exception(error)
            processes.abandon(1)
        raise


def _is_for_users(record: LogRecord) -> bool:
    """Keep this package's lines, others' warnings, and the errors of orbax."""
    if record.pathname.startswith(PACKAGE):
        return True
    return record.levelno >= (ERROR if "/orbax/" in record.pathname else WARNING)
