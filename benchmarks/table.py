"""The networks of the paper's comparison: size, operations, memory, speed.

    python -m benchmarks.table [--quick] [--json=FILE] [--markdown=FILE] [--plot=FILE]
    python -m benchmarks.table --measured=FILE [--trained=FILE] [--plot=FILE] ...

A row for each of the configs: parameters; GFLOP of a forward pass at 128^3, counted
from the program (see `runtime.operations`); compiled memory, arguments and temporaries,
of the forward pass and of the loss with its gradient at --side; patches/s of both at
--timed_side where --limit_gb lets them run. Batch 1, float32, nothing rematerialised;
--as_configured keeps the config's dtype and rematerialisation ("auto" at its most), and
`gradient_temporaries_gb` in the JSON is memory without the arguments. Networks of a
fixed input shape are made for the side measured. --quick compiles and runs the forward
pass at 64^3 alone, of the first network alone. --measured takes the rows from the JSON
of an earlier run. What the authors of Swin SMT report stands in a table of its own.
--plot draws operations and memory; the authors' Dice against their parameters and
seconds; and with --trained=FILE the Dice that `benchmarks.compare --json=FILE`
measured.
"""

import dataclasses
import importlib
import json
import time
from pathlib import Path

import jax
from absl import flags

from benchmarks import define_file, programs, report, run, write
from benchmarks.table_format import markdown, picture
from swinsmt_jax import checks, models
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.evaluation import published_results
from swinsmt_jax.models.registry import AUTO, NetworkConfig
from swinsmt_jax.runtime import operations

NETWORKS = {
    "unetr": "UNETR",
    "swin_unetr_s": "Swin UNETR S",
    "swin_unetr_b": "Swin UNETR B",
    "swin_unetr_l": "Swin UNETR L",
    "nnformer": "nnFormer",
    "unest": "UNesT",
    "dints": "DiNTS",
    "ux_net": "3D UX-Net",
    "repux_net": "3D RepUX-Net",
    "universal_model": "Universal Model",
    "nnunet_plain": "nnU-Net",
    "nnunet_resenc_m": "nnU-Net ResEnc M",
    "nnunet_resenc_l": "nnU-Net ResEnc L",
    "swin_smt_e4": "Swin SMT, 4 experts",
    "swin_smt_e8": "Swin SMT, 8 experts",
    "swin_smt_e16": "Swin SMT, 16 experts",
    "swin_smt_paper": "Swin SMT, 32 experts",
}
FULL_SIDE = 128  # of the operations


def model_of(name: str, side: int, *, as_configured: bool = False) -> NetworkConfig:
    """Return the network of a config, made for cubes of this side."""
    module = importlib.import_module(f"swinsmt_jax.configs.{name}")
    config = from_config_dict(module.get_config()).model
    fields = {field.name for field in dataclasses.fields(config)}
    changes = dict.fromkeys(fields & {"img_size", "crop_size"}, side)
    if not as_configured:
        changes |= {"dtype": "float32", "remat": ()}
    elif config.remat == AUTO:  # at its most
        config = programs.with_all_recomputed(config)
    return dataclasses.replace(config, **changes)


def measure(name, *, side, timed_side, limit_gb, gradient, as_configured):
    """Measure one network; a side of 0 leaves out what it is for."""
    module = importlib.import_module(f"swinsmt_jax.configs.{name}")
    own = from_config_dict(module.get_config())
    counted = model_of(name, FULL_SIDE)
    row = {
        "name": name,
        "parameters": models.count_parameters(own.model),
        "forward_gflop": operations.forward_operations(counted, (FULL_SIDE,) * 3) / 1e9,
        "side": side,
        "timed_side": timed_side,
    }
    for what in ("forward", "gradient") if gradient else ("forward",):
        if side:
            start = time.perf_counter()
            config = model_of(name, side, as_configured=as_configured)
            compiled = programs.lower(config, side, what=what).compile()
            row[f"{what}_gb"] = programs.gigabytes(compiled)
            temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e9
            row[f"{what}_temporaries_gb"] = temporaries
            row[f"{what}_compile_s"] = time.perf_counter() - start
        if timed_side:
            config = model_of(name, timed_side, as_configured=as_configured)
            lowered = programs.lower(config, timed_side, what=what)
            _, seconds = programs.seconds_within(lowered, limit_gb=limit_gb, repeats=2)
            row[f"{what}_patches_per_s"] = seconds and 1 / seconds
        jax.clear_caches()
    return row


def main(options):
    trained = read("trained")["rows"] if options.trained else ()
    found = read("measured") if options.measured else measure_all(options)
    keep(found)
    text = markdown(found["rows"], NETWORKS, device=device_of(found["machine"]))
    print(text)
    if options.markdown:
        Path(options.markdown).write_text(text)
    if options.plot:
        figure = picture(found["rows"], NETWORKS, trained=trained)
        figure.savefig(options.plot, dpi=110)


def device_of(machine: dict | str) -> str:
    """Return what a report was measured on, in words."""
    return machine if isinstance(machine, str) else machine["processor"]


def measure_all(options):
    """Measure the networks of --networks and return their report."""
    for name in options.networks:
        checks.one_of("an entry of --networks", name, NETWORKS)
    rows, found = [], {}
    for name in options.networks:
        compiles = not (options.quick and rows)
        row = measure(
            name,
            side=options.side if not options.quick else 64 * compiles,
            timed_side=options.timed_side * compiles,
            limit_gb=options.limit_gb,
            gradient=options.gradient and not options.quick,
            as_configured=options.as_configured,
        )
        print(json.dumps(row), flush=True)
        rows.append(row)
        found = report({row["name"]: row["parameters"] for row in rows}, rows=rows)
        keep(found)
    return found


def read(flag):
    """Return the report in the file that a flag names."""
    path = Path(flags.FLAGS[flag].value)
    checks.require(
        path.is_file(),
        f"--{flag} is {str(path)!r}, but must be a file that --json wrote; "
        "see benchmarks/results.",
    )
    return json.loads(path.read_text())


def keep(found):
    """Write what was measured, and what the authors report, to the file of --json."""
    write(flags.FLAGS.json, found | {"reported": published_results.ROWS})


if __name__ == "__main__":
    flags.DEFINE_list("networks", list(NETWORKS), "configs to measure")
    flags.DEFINE_integer("side", FULL_SIDE, "of the patch for compiled memory; 0: none")
    flags.DEFINE_integer("timed_side", 64, "of the patch that is timed; 0: none")
    flags.DEFINE_bool("gradient", True, "also compile and time the gradient")
    flags.DEFINE_float("limit_gb", 10.0, "run what needs no more memory")
    flags.DEFINE_bool("as_configured", False, "keep the config's dtype and remat")
    define_file("markdown", "also write the table to this file")
    define_file("plot", "also draw the figures into this file")
    flags.DEFINE_string("measured", None, "JSON of this script, instead of measuring")
    flags.DEFINE_string("trained", None, "JSON of benchmarks.compare, to be drawn too")
    run(main, quick="compile one forward pass at 64^3 alone")
