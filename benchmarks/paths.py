"""Count the files and functions that training and prediction enter.

    python -m benchmarks.paths [--config] [--quick] [--json=FILE] [--root=CHECKOUT]

The demo's network is trained on phantoms for two steps by `training.loop.train`, and
segments a scan by `load` and `Segmenter.segment`, each in a process of its own under
`sys.setprofile`, threads too. Counted are the files of `swinsmt_jax/` in which a
function runs, and these functions by qualified name: for training from the call of
`train` to its return, tracing and one checkpoint included; for prediction from `load`
to the labels. What runs while a module is imported does not count.
At commit 2c20246 these are 52 files and 458 functions, and 37 and 271 (--quick).

`--config` follows the config instead, from `main` of `swinsmt train` on, as the
source says them (see `benchmarks.config_way`; nothing is run):

- a stay is a function or class that is handed the config, a group of it, or a value
  that is made of one, those of checks.py left out; `stays_of_the_whole` are those
  among them that hold an `ExperimentConfig`, or an object with one among its fields;
- a move is a step from a function in one package to one in another, counted once; the
  scripts and the files beside the packages (checks.py, config.py, ...) are one package;
- a climb is a move into a package that the config has come through before.

At commit 2c20246 these are 98 stays (39 of the whole), 39 moves and 28 climbs.

`--root` counts in another checkout, whose modules have the names of this one.
`--quick` trains a narrower network on smaller patches, which enters the same files and
all but a few of the functions.
"""

import collections
import logging
import os
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from absl import flags

from benchmarks import ROOT, config_way, run, save, show

START = ("swinsmt_jax.commands.train", "main")
QUICK = {"feature_size": 12, "window_size": (2, 2, 2)}
PATCH = (32, 32, 32)


def entered(function, root):
    """Call a function; return the (file, function)s of the package that it enters."""
    package, seen = f"{root / 'swinsmt_jax'}{os.sep}", set()
    importing = collections.Counter()  # modules that a thread is running

    def note(frame, event, _):
        code, thread = frame.f_code, threading.get_ident()
        if code.co_name == "<module>":
            importing[thread] += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and not importing[thread]:
            seen.add(code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {
        (code.co_filename, code.co_qualname)
        for code in seen
        if code.co_filename.startswith(package)
    }


def training(root, folder, quick):
    """Train for two steps; return what is entered."""
    _prepare(root)
    from swinsmt_jax.config import from_config_dict
    from swinsmt_jax.configs import demo
    from swinsmt_jax.phantoms.dataset import write_dataset
    from swinsmt_jax.training import loop

    data = folder / "phantoms"
    write_dataset(data, train=2, val=1, test=1, spacing=12.0, seed=0)
    values = demo.get_config()
    values.data.root = str(data)
    values.training.update({"num_steps": 2, "log_every": 1})
    values.optimizer.warmup_steps = 1
    if quick:
        values.model.update(QUICK)
        values.data.patch_shape = PATCH
    config = from_config_dict(values)
    return entered(lambda: loop.train(config, workdir=folder / "run"), root)


def prediction(root, folder, _):
    """Load the network of `training` and segment a scan; return what is entered."""
    _prepare(root)
    import swinsmt_jax

    load = swinsmt_jax.load
    scan = min((folder / "phantoms").glob("*/ct.nii.gz"))
    return entered(lambda: load(folder / "run").segment(scan), root)


def _prepare(root):
    """Import from the checkout; compile quickly, since what is computed is left."""
    sys.path.insert(0, str(root))
    flags.FLAGS.mark_as_parsed()
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from swinsmt_jax.runtime import startup

    startup.start()
    logging.disable(logging.WARNING)


def paths(root, *, quick):
    """Return the numbers of files and functions of training and prediction."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in (training, prediction):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                seen = pool.submit(part, root, Path(folder), quick).result()
            name = part.__name__
            files = sorted({str(Path(file).relative_to(root)) for file, _ in seen})
            found[name] = {"files": files, "functions": len(seen)}
    return found


def main(options):
    root = Path(options.root).resolve()
    if options.config:
        headline, parts = config_way.follow(root, start=START), {}
    else:
        parts = paths(root, quick=options.quick)
        headline = {
            f"{name}_{what}": count
            for name, part in parts.items()
            for what, count in (
                ("files", len(part["files"])),
                ("functions", part["functions"]),
            )
        }
    show(headline)
    save(headline, **parts)


if __name__ == "__main__":
    flags.DEFINE_bool("config", False, "follow the config through the source")
    flags.DEFINE_string("root", str(ROOT), "checkout whose package is counted")
    run(main, quick="train a small form of the network")
