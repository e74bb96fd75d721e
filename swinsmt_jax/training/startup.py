"""What the scripts set before anything else: log lines and the compilation cache."""

from logging import ERROR, WARNING, LogRecord
from pathlib import Path

import jax
from absl import logging

CACHE = Path("~/.cache/swinsmt_jax")
PACKAGE = str(Path(__file__).parents[1])


def start() -> None:
    """Show this package's log lines, and keep compiled programs between runs.

    They are kept in ~/.cache/swinsmt_jax, or where JAX_COMPILATION_CACHE_DIR says.
    """
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_for_users)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))


def _is_for_users(record: LogRecord) -> bool:
    """Keep this package's lines, others' warnings, and the errors of orbax."""
    if record.pathname.startswith(PACKAGE):
        return True
    return record.levelno >= (ERROR if "/orbax/" in record.pathname else WARNING)
