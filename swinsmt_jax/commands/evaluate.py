"""Evaluate a trained network on a split: Dice by group, by class and by case.

    python evaluate.py --workdir=runs/demo --split=test

reads configuration and parameters from the checkpoint and segments every case with
sliding windows of the training patch's shape. It prints a table of Dice, with 95 %
bootstrap intervals over cases, and of the other metrics. It writes per_class.csv,
per_case.csv, results.json, overview.png and report.html to <workdir>/eval_<split>.

    python evaluate.py --predictions=out --data_root=data/x --output=results

evaluates label files, or folders of masks, from predict.py or any other tool in the
same way.

    python evaluate.py --nnunet=Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres \
        --data_root=data/x --output=results

evaluates a model folder of nnU-Net v2.

    python evaluate.py --fold_runs=runs/f0,runs/f1,runs/f2

puts the runs of a cross-validation side by side.

    python evaluate.py --compare runs/a runs/b

compares two evaluations case by case: differences by group with 95 % intervals,
Wilcoxon's signed-rank test with Holm's correction, and effect sizes.

Scores are kept by case until all are complete. If some cases fail, the others are
scored and the exit status is 1. SIGTERM and SIGUSR1 end it with status 75, Ctrl-C with
130. The same command continues.
"""

import dataclasses
from functools import partial

from absl import flags

from swinsmt_jax import checks, labels
from swinsmt_jax.checks import DTYPES
from swinsmt_jax.data import pipeline
from swinsmt_jax.data.meta import SPLITS
from swinsmt_jax.evaluation import compare
from swinsmt_jax.evaluation.averages import AVERAGES
from swinsmt_jax.evaluation.conventions import CONVENTIONS, convention, surface_rule
from swinsmt_jax.evaluation.evaluate_split import evaluate_split
from swinsmt_jax.evaluation.fold_table import fold_table
from swinsmt_jax.evaluation.looks import Looks
from swinsmt_jax.evaluation.metrics import chosen_metrics
from swinsmt_jax.evaluation.predictions import evaluate_predictions
from swinsmt_jax.evaluation.surface import TOLERANCE
from swinsmt_jax.inference.ensemble import load_networks, workdirs_of
from swinsmt_jax.inference.nnunet import load_nnunet
from swinsmt_jax.inference.segmenter import computing_in
from swinsmt_jax.inference.sliding_window import ACCUMULATE
from swinsmt_jax.inference.windows import BLENDS
from swinsmt_jax.runtime import distributed, processes, startup
from swinsmt_jax.runtime.files import absolute
from swinsmt_jax.training.checkpoint import load_model


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line; the config's values hold where a flag is not given."""

    def text(name, default, help):
        flags.DEFINE_string(name, default, help, flag_values=values)

    def choice(name, default, choices, help):
        flags.DEFINE_enum(name, default, choices, help, flag_values=values)

    text("workdir", None, "folder of the training run; A,B,C averages several")
    text("nnunet", None, "model folder of nnU-Net v2, instead of --workdir")
    help = "of --nnunet, such as 0,1; or all; every existing fold by default"
    flags.DEFINE_list("folds", [], help, flag_values=values)
    choice("split", "test", SPLITS, "cases to evaluate")
    text("step", None, "checkpoint: best (if there was validation), latest or a number")
    text("data_root", None, "data folder, if not that of the training")
    text("output", None, "folder for the results; by default <workdir>/eval_<split>")
    choice(
        "average",
        "over_classes",
        list(AVERAGES),
        "the average that counts as the result",
    )
    help = "what is measured of each class; by default dice,nsd,hd95,assd,volume"
    flags.DEFINE_list("metrics", None, help, flag_values=values)
    help = "mm within which surfaces count as one; 0 leaves out all metrics of surfaces"
    flags.DEFINE_float(
        "surface_tolerance", TOLERANCE, help, lower_bound=0, flag_values=values
    )
    help = "faces where the scan cuts a structure: surface or not"
    choice("cut_faces", "count", ("count", "ignore"), help)
    help = "give the numbers that another tool would give"
    text("protocol", None, f"{help}: {', '.join(CONVENTIONS)}")
    text("groups", None, "JSON file {group: [class ids or names]} for the table")
    flags.DEFINE_integer("limit", 0, "only the first cases; 0: all", flag_values=values)
    flags.DEFINE_float("overlap", None, "overlap of windows", flag_values=values)
    choice("blend", None, BLENDS, "weights of a window's voxels")
    flags.DEFINE_integer(
        "window_batch", None, "windows per call, over all devices", flag_values=values
    )
    help = "where logits are summed up: in memory of the host or of the device"
    choice("accumulate_on", None, ACCUMULATE, help)
    help = "of the dataset --data_root: a JSON file, v1, v2 or total_v3"
    text("description", "", help)
    help = "average over windows and their mirror images; twice the time"
    flags.DEFINE_bool("mirror", False, help, flag_values=values)
    choice(
        "dtype", None, DTYPES, "dtype of matrix products, if not that of the training"
    )
    help = "folder of label files <case>.nii.gz, or folders <case> of masks"
    text("predictions", None, help)
    help = "resample predictions on another grid than their scan's (nearest voxel)"
    flags.DEFINE_bool("regrid", False, help, flag_values=values)
    for name, help in (
        ("confidence", "also report the network's confidence in each class"),
        ("quality", "also check the anatomy of predictions, as predict.py --quality"),
        ("view", "also write pages of the worst cases, with truth and prediction"),
    ):
        flags.DEFINE_bool(name, False, help, flag_values=values)
    help = "processes that share the cases; 0: this one, but for --predictions one for "
    startup.define_pool(values, workers=0, help=f"{help}each CPU core, up to 8")
    help = "two runs or folders of results, to compare case by case"
    flags.DEFINE_list("compare", [], help, flag_values=values)
    help = "runs of a cross-validation, each evaluated with --split=val, for a table"
    flags.DEFINE_list("fold_runs", [], help, flag_values=values)
    distributed.define_flags(values)


def scoring(options: flags.FlagValues) -> dict:
    """Return the average, the metrics and the rule for surfaces that flags ask for.

    Raises:
        UserError: for an unknown protocol, and flags that contradict it or each other.
    """
    protocol, names = options.protocol, options.metrics
    own = convention(protocol)
    fixed = {"average": own.average, "surface_tolerance": own.tolerance}
    if protocol:
        fixed["cut_faces"] = "count"
    for name, value in fixed.items():
        given = options[name]
        checks.require(
            not value or given.using_default_value or given.value == value,
            f"--protocol={protocol} sets --{name}={value}, but --{name}="
            f"{given.value} was given too; leave one of them out.",
        )
    tolerance, chosen = options.surface_tolerance, options["surface_tolerance"]
    checks.in_range("--surface_tolerance", tolerance, 0, 1e6)
    rule = surface_rule(
        protocol,
        tolerance=None if chosen.using_default_value else tolerance,
        cut_faces=options.cut_faces == "count",
    )
    looks = Looks(options.confidence, options.quality, options.view)
    found = chosen_metrics(
        names, surface_rule=rule, protocol=protocol, confidence=looks.confidence
    )
    surfaces = [metric.name for metric in found if metric.surfaces]
    checks.require(
        bool(tolerance) or names is None or not surfaces,
        f"--surface_tolerance is 0 mm, which leaves out all metrics of surfaces, but "
        f"--metrics={','.join(names or ())} asks for {', '.join(surfaces)}; give a "
        "tolerance above 0, such as 3, or other metrics.",
    )
    return {
        "rule": own.average or options.average,
        "metrics": names,
        "surface_rule": rule if tolerance and surfaces else None,
        "protocol": protocol,
        "looks": looks,
    }


def evaluate(options: flags.FlagValues) -> str:
    """Evaluate as the flags say; write the files and return the table."""
    rules = scoring(options)  # what is wrong with them is said before work begins
    pool = startup.pool_of(options)
    checks.require(
        pool == {"workers": 1, "dask": ""} or not processes.several(),
        "--workers and --dask share the cases, and so do several processes of "
        "--distributed; leave one of them out.",
    )
    inference = ("overlap", "blend", "window_batch", "accumulate_on")
    given = {name: getattr(options, name) for name in inference}
    given = {name: value for name, value in given.items() if value is not None}
    if options.nnunet:
        return _evaluate_nnunet(options, given, {**rules, **pool})
    workdirs = workdirs_of(options.workdir)
    checks.require(
        bool(len(workdirs) == 1 or options.output),
        "several --workdir are evaluated as one network; give --output for it.",
    )

    read = partial(_load_runs, workdirs, step=options.step, dtype=options.dtype)
    config, model, info = read()
    config = dataclasses.replace(
        config,
        inference=dataclasses.replace(config.inference, **given),
        data=dataclasses.replace(config.data, **_data_of(options)),
    )
    classes = pipeline.class_map(config.data)
    groups = classes.groups
    if options.groups:
        groups = labels.load_groups(options.groups, names=classes.names)
    return evaluate_split(
        model,
        config,
        split=options.split,
        groups=groups,
        **rules,
        output=absolute(options.output or workdirs[0] / f"eval_{options.split}"),
        limit=options.limit,
        step=info["step"],
        mirror=options.mirror,
        load=partial(_model_of, read),
        **pool,
    )


def _load_runs(workdirs, *, step, dtype):
    """Return config, model and facts of a run, or of several as one network."""

    def load(workdir, *, step):
        config, model, info = load_model(workdir, step=step)
        network, model = computing_in(dtype, config.model, model)
        return dataclasses.replace(config, model=network), model, info

    return load_networks(workdirs, step=step, load=load)


def _model_of(read):
    return read()[1], None


def _function_of(read):
    segmenter = read()
    return segmenter.predict, segmenter


def _evaluate_nnunet(options, inference, rules):
    """Evaluate a model folder of nnU-Net on a dataset or a store of its classes."""
    checks.require(
        bool(options.data_root and options.output) and not options.workdir,
        "--nnunet needs --data_root, for scans and truth, and --output, and no "
        "--workdir.",
    )
    read = partial(
        load_nnunet,
        absolute(options.nnunet),
        folds=options.folds,
        mirror=options["mirror"].using_default_value or options.mirror,
        dtype=options.dtype,
        **inference,
    )
    segmenter = read()
    root = str(absolute(options.data_root))
    data = dataclasses.replace(segmenter.config.data, root=root)
    config = dataclasses.replace(segmenter.config, data=data)
    groups = pipeline.class_map(config.data).groups
    if options.groups:
        groups = labels.load_groups(options.groups, names=config.data.class_names)
    return evaluate_split(
        segmenter.predict,
        config,
        split=options.split,
        groups=groups,
        **rules,
        output=absolute(options.output),
        limit=options.limit,
        segmenter=segmenter,
        load=partial(_function_of, read),
    )


def _data_of(options):
    """Return what the flags change of the config's data."""
    if options.data_root:  # the training's description is of its own data
        root = str(absolute(options.data_root))
        return {"root": root, "description": options.description}
    return {"description": options.description} if options.description else {}


def main(arguments: list[str]) -> None:
    """Evaluate as the flags say, and print the table."""
    options = flags.FLAGS
    startup.start(arguments[:1] if options.compare else arguments)
    if options.predictions:
        checks.require(
            bool(options.data_root and options.output),
            "--predictions needs --data_root, for the truth, and --output.",
        )
        table = evaluate_predictions(
            absolute(options.predictions),
            root=options.data_root,
            split=options.split,
            groups=options.groups,
            description=options.description,
            **scoring(options),
            output=absolute(options.output),
            limit=options.limit,
            regrid=options.regrid,
            workers=options.workers,
            dask=startup.pool_of(options, jax_in_workers=False)["dask"],
        )
        print(table)
        return
    if options.fold_runs:
        print(fold_table(options.fold_runs, split="val"))
        return
    if options.compare:
        folders = [*options.compare, *arguments[1:]]
        checks.require(
            len(folders) == 2,
            f"--compare takes two folders, but got {', '.join(folders)}.",
        )
        first, second = folders
        found = compare.compare(first, second, split=options.split)
        print(compare.table(found, first=first, second=second))
        return
    checks.require(
        bool(options.workdir or options.nnunet),
        "--workdir or --nnunet is missing; see --help.",
    )
    distributed.start(options.output or str(options.workdir).split(",")[0])
    table = evaluate(flags.FLAGS)
    if processes.is_first():
        print(table)
