"""How the scripts begin and end: flags, log lines, compilation cache, users' errors."""

import contextlib
import dataclasses
import os
import re
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from logging import ERROR, WARNING, LogRecord
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, FieldReference, config_flags

from swinsmt_jax.checks import UserError, did_you_mean, printable, require
from swinsmt_jax.config import DataConfig, ExperimentConfig, from_config_dict, to_dict
from swinsmt_jax.data.augmentation import Augmentations
from swinsmt_jax.runtime import processes
from swinsmt_jax.runtime.files import absolute, read_json
from swinsmt_jax.runtime.statuses import REFUSED, Interrupted

flags.disclaim_key_flags()  # so that --help of a script lists what is defined here

CACHE = Path("~/.cache/swinsmt_jax")
ALONE = 5  # seconds that a process waits for the others to fail too
PACKAGE = Path(__file__).parents[1]
CONFIGS = PACKAGE / "configs"
RENAMED_FLAGS = {  # earlier name: name of today
    "accumulate": "accumulate_on",
    "colors": "colours",
    "nocolors": "nocolours",
}


def start(arguments: Sequence[str] = ()) -> None:
    """Show this package's log lines, and keep compiled programs between runs.

    They are kept in ~/.cache/swinsmt_jax, or where JAX_COMPILATION_CACHE_DIR says.
    `arguments` are for `only_flags`.
    """
    only_flags(arguments)
    sys.unraisablehook = _quieter(sys.unraisablehook)
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_for_users)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE.expanduser())  # of workers


def define_pool(values: flags.FlagValues, *, workers: int, help: str) -> None:
    """Define --workers, with its default and help, and --dask."""
    flags.DEFINE_integer("workers", workers, help, lower_bound=0, flag_values=values)
    help = "address of a Dask scheduler, whose workers do the work: tcp://host:8786"
    flags.DEFINE_string("dask", "", help, flag_values=values)


def pool_of(options: flags.FlagValues, *, jax_in_workers: bool = True) -> dict:
    """Return the arguments of `cluster.run_each` that --workers and --dask stand for.

    Raises:
        UserError: for both of them, and processes that would take one GPU's memory.
    """
    require(
        not options.dask or options["workers"].using_default_value,
        f"--workers={options.workers} are processes of this machine, but --dask="
        f"{options.dask} has workers of its own; leave one of them out.",
    )
    if options.dask and jax_in_workers:
        jax.config.update("jax_platforms", "cpu")  # the GPU is for the workers
    several = options.workers > 1 and jax_in_workers
    require(
        not several or jax.default_backend() == "cpu",
        f"--workers={options.workers}, but each process takes the memory of all GPUs, "
        "and one process drives them all; leave it out, or start Dask workers of one "
        "GPU each for --dask (docs/cluster.md).",
    )
    return {"workers": max(1, options.workers), "dask": options.dask}


def define_config(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define --config, whose keys are flags too."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "file with get_config(), config.json of a run, or the name of a config that "
        "comes with the package, such as demo",
        flag_values=values,
        lock_config=False,  # a file may leave out keys that have a default
        accept_new_attributes=True,  # `from_config_dict` knows and checks all keys
    )
    parser: Any = values["config"].parser
    load = parser.parse
    parser.parse = lambda text: _with_groups(_config_of(text, load), ExperimentConfig)


def config_of(path: str) -> ConfigDict:
    """Return the config of a file as --config reads it.

    Raises:
        UserError: for a file that there is not.
    """
    values = flags.FlagValues()
    define_config(values)
    parse(["", f"--config={path}"], values)
    return values.config


def _config_of(text, load):
    """Return the config that a Python file makes, or that a run has recorded."""
    if not text.endswith(".json"):
        return load(str(_config_file(text)))
    try:
        content = read_json(absolute(text))
    except ValueError as error:
        raise UserError(f"--config={text} is not JSON: {error}.") from error
    return ConfigDict(to_dict(from_config_dict(content)))


def _config_file(text: str) -> Path:
    """Return a config file, or one of the package's by its name (configs/demo.py)."""
    file, path = absolute(text), Path(text)
    if file.is_file() or path.parent not in (Path(), Path("configs")):
        return file
    packaged = {file.stem: file for file in sorted(CONFIGS.glob("*.py"))}
    hint = did_you_mean(path.stem, packaged)
    require(
        path.stem in packaged,
        f"--config={text} is not a file, and the package has no config of that name; "
        f"it has {', '.join(packaged)}.{hint}",
    )
    return packaged[path.stem]


def _with_groups(config, cls):
    """Add groups that a config file leaves out, so that flags can set their keys.

    A flag may set `data.spacing` to one number or three, whatever the file has.
    """
    if cls is DataConfig and isinstance(config, ConfigDict) and "spacing" in config:
        spacing = config.spacing
        del config.spacing
        config.spacing = FieldReference(spacing, object)
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind) and isinstance(config, ConfigDict):
            config[name] = config.get(name, ConfigDict())
            _with_groups(config[name], kind)
    return config


def parse(arguments: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse the command line; a `UserError` for what the flags or the config lack."""
    try:
        values.set_gnu_getopt()  # `--compare a b --split=val`
        arguments = _with_last_values([_with_new_name(text) for text in arguments])
        rest = values(arguments)
        if "config" in values and values["config"].value is not None:
            config = values.config  # raises if there was no such file
            if not isinstance(config, str):  # preprocess and plan have its name alone
                _take_batch(config, arguments)
                config.lock()
        return rest
    except SystemExit:  # of --help, which absl ends with status 1
        sys.exit(0)
    except (flags.Error, OSError) as error:
        raise UserError(f"{' '.join(str(error).split())} See --help.") from error
    except KeyError as error:  # of a group that the ConfigDict does not have
        group = str(error.args[0]).split("'")[1]
        groups = {f.name: f.name for f in dataclasses.fields(ExperimentConfig)}
        for field in dataclasses.fields(Augmentations):
            groups[field.name] = f"data.augmentations.{field.name}"
        near = f" Did you mean {groups[group]!r}?" if group in groups else ""
        raise UserError(
            f"unknown config group {group!r}; the groups are "
            f"{', '.join(groups.values())}.{near or did_you_mean(group, groups)}"
        ) from None


def _take_batch(config, arguments):
    """Let the batch that the command line gives, by device or in all, be the one."""
    names = ("batch_size", "batch_per_device")
    flags_of = {name: f"--config.data.{name}" for name in names}
    given = [
        name
        for name, flag in flags_of.items()
        if any(argument.split("=")[0] == flag for argument in arguments)
    ]
    require(
        len(given) < 2,
        f"{' and '.join(flags_of.values())} were both given; give one of them: crops "
        "per step over all devices, or on each.",
    )
    for name in given:
        (other,) = set(names) - {name}
        config.data[other] = 0


def _with_new_name(argument):
    """Return an argument with the new name of its flag, and say that it has one."""
    old = argument.partition("=")[0].lstrip("-")
    if not argument.startswith("-") or old not in RENAMED_FLAGS:
        return argument
    logging.warning("the flag --%s is now --%s", old, RENAMED_FLAGS[old])
    return argument.replace(old, RENAMED_FLAGS[old], 1)


def _with_last_values(arguments):
    """Return the arguments with the last flag of each key of the config alone.

    Of numbers the last one counts anyway, but ml_collections 1.1.0 joins tuples:
    findings/ml_collections_appends_the_tuple_of_a_flag_given_twice.sh.
    """
    groups: list[list[str]] = []  # a flag, and its value if that stands apart
    for text in arguments:
        apart = groups and re.fullmatch(r"--?config\.[^=]+", groups[-1][-1])
        if apart and not text.startswith("-"):
            groups[-1].append(text)
        else:
            groups.append([text])
    keys = [group[0].partition("=")[0].lstrip("-") for group in groups]
    last = {key: index for index, key in enumerate(keys)}
    return [
        text
        for index, (key, group) in enumerate(zip(keys, groups, strict=True))
        if not key.startswith("config.") or last[key] == index
        for text in group
    ]


def only_flags(arguments: Sequence[str]) -> None:
    """Raise `UserError` if a command line, script's name first, has more than flags."""
    require(
        len(arguments) < 2,
        f"{' '.join(arguments[1:])!r} does not belong to a flag; write "
        "--flag=value, or --flag and --noflag for true and false.",
    )


def run(command: ModuleType, *, program: str) -> None:
    """Run a command's `main` on the flags of its `define_flags`.

    Args:
        command: its docstring is what --help says.
        program: that says so in messages.
    """
    command.define_flags()
    flags.adopt_module_key_flags(command)
    sys.modules["__main__"].__doc__ = command.__doc__
    with exit_on_user_error(program):
        app.run(command.main, flags_parser=parse)


@contextlib.contextmanager
def exit_on_user_error(script: str) -> Iterator[None]:
    """Make a `UserError` one line on stderr and exit status 2, without traceback.

    So is an error of the system with a file, such as a full disk or a lack of
    permission, that nobody has put into better words. A training that ended at a signal
    exits with its status.
    Of several processes, one that fails alone does not wait for the others.
    """
    try:
        yield
    except (Interrupted, processes.SharedError) as error:
        if processes.is_first():
            print(f"{script}: {error}", file=sys.stderr)
        if processes.several():
            processes.leave(error.status)
        sys.exit(error.status)
    except (UserError, OSError) as error:
        print(f"{script}: {_words(error)}", file=sys.stderr)
        if processes.several():
            processes.leave(REFUSED, within=ALONE)
        sys.exit(REFUSED)
    except SystemExit as error:  # of a signal outside of a training's steps
        if processes.several() and error.code:
            processes.leave(int(error.code), within=ALONE)
        raise
    except Exception as error:
        if processes.several():
            traceback.print_exception(error)
            processes.abandon(1)
        raise


def _words(error):
    if isinstance(error, UserError):
        return error
    return (
        f"{error.filename or 'a file'} cannot be used: {error.strerror or error}; fix "
        "its permissions or make room, and give the same command again."
    )


def _is_for_users(record: LogRecord) -> bool:
    """Keep this package's lines, others' warnings, and the errors of orbax.

    What a file or its name holds may be in them: no terminal obeys it.
    """
    record.msg, record.args = printable(record.getMessage(), keep="\n"), ()
    if record.pathname.startswith(str(PACKAGE)):
        return True
    return record.levelno >= (ERROR if "/orbax/" in record.pathname else WARNING)


def _quieter(hook):
    """Leave out what reads that Orbax gave up have to say, hundreds at a time."""

    def quiet(event):
        frames = traceback.extract_tb(event.exc_traceback)
        if not frames or frames[-1].name != "_check_closed":  # of asyncio's event loop
            hook(event)

    return quiet
