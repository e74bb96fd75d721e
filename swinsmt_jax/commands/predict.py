"""Segment CT scans with a trained network.

    python predict.py --workdir=runs/x --input=scan.nii.gz --output=out
    python predict.py --workdir=runs/x --input=scans/,more/s1.nii.gz --output=out \
        --statistics --preview --roi=liver,spleen
    python predict.py --nnunet=Dataset001_X/nnUNetTrainer__nnUNetPlans__3d_fullres \
        --input=scan.nii.gz --output=out

An input is a NIfTI file, a folder of .nii and .nii.gz files, or a folder with a DICOM
series, which needs the extra "dicom". Commas separate several inputs. For each scan
out/<name>.nii.gz holds the label ids on the scan's own grid, with names and colours in
its header; --masks writes out/<name>/<class>.nii.gz instead. Files appear when
complete. Existing files stay unless --overwrite is given, and a scan with all its
outputs is skipped. A scan that fails does not stop the others; the exit status is then
1, and out/summary.json gives the reason. SIGTERM and SIGUSR1 end it with status 75,
Ctrl-C with 130. Several processes with one output share the scans.
"""

import sys
from functools import partial

from absl import flags

from swinsmt_jax import checks
from swinsmt_jax.checks import DTYPES
from swinsmt_jax.inference import segmenter as prediction
from swinsmt_jax.inference.ensemble import workdirs_of
from swinsmt_jax.inference.nnunet import load_nnunet
from swinsmt_jax.inference.outputs import FORMATS, KINDS, OutputOptions
from swinsmt_jax.inference.scans import find_scans, segment_scans
from swinsmt_jax.inference.sliding_window import ACCUMULATE
from swinsmt_jax.inference.totalsegmentator import HOME, load_totalsegmentator
from swinsmt_jax.inference.windows import BLENDS
from swinsmt_jax.runtime import startup
from swinsmt_jax.runtime.files import absolute


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line; the config's values hold where a flag is not given."""

    def text(name, help):
        flags.DEFINE_string(name, None, help, flag_values=values)

    def switch(name, help):
        flags.DEFINE_bool(name, False, help, flag_values=values)

    text("workdir", "folder of the training run; A,B,C averages several")
    text("nnunet", "model folder of nnU-Net v2, instead of --workdir")
    help = "folder of TotalSegmentator's weights instead of --workdir, such as"
    text("totalsegmentator", f"{help} {HOME}; its task total, of 1.5 mm or, --fast, 3")
    help = "of --nnunet, such as 0,1; or all; every existing fold by default"
    flags.DEFINE_list("folds", [], help, flag_values=values)
    flags.DEFINE_list("input", None, "files and folders", flag_values=values)
    help = "UID of one of many DICOM series below a folder, or all"
    text("series", help)
    text("output", "folder for the results")
    text("step", "checkpoint: best (if there was validation), latest or a number")
    help = "write only these classes; others become background"
    flags.DEFINE_list("roi", [], help, flag_values=values)
    switch("masks", "a file for each class instead of one file of labels")
    help = "format of label files, if not the scan's; nii.gz for NIfTI and DICOM"
    flags.DEFINE_enum("format", None, FORMATS, help, flag_values=values)
    switch("clean", "keep the largest piece of organs and bones that are one piece")
    for name, kind in KINDS.items():
        if kind.listed:
            flags.DEFINE_list(name, [], kind.help, flag_values=values)
        elif kind.choices:
            flags.DEFINE_enum(name, None, kind.choices, kind.help, flag_values=values)
        else:
            switch(name, kind.help)
    switch("confidence", "add the network's confidence in each class to the statistics")
    switch("overwrite", "segment again and replace existing results")
    switch("fast", "overlap of windows 0.25: about a third of the time, less smooth")
    help = "average over windows and their mirror images; twice the time. With --nnunet"
    help = f"{help} it is done along the axes that the model allows unless --nomirror"
    flags.DEFINE_bool("mirror", None, help, flag_values=values)
    switch("half", "keep logits in half precision: half the memory")
    flags.DEFINE_float("overlap", None, "overlap of windows", flag_values=values)
    help = "weights of a window's voxels"
    flags.DEFINE_enum("blend", None, BLENDS, help, flag_values=values)
    help = "dtype of matrix products, if not that of the training"
    flags.DEFINE_enum("dtype", None, DTYPES, help, flag_values=values)
    help = "windows per call, over all devices"
    flags.DEFINE_integer("window_batch", None, help, flag_values=values)
    help = "where logits are summed up: in memory of the host or of the device"
    flags.DEFINE_enum("accumulate_on", None, ACCUMULATE, help, flag_values=values)
    help = "processes on a CPU that share the scans"
    startup.define_pool(values, workers=1, help=help)
    for name in ("input", "output"):
        flags.mark_flag_as_required(name, flag_values=values)


def _loader(options, **given):
    """Return what loads the network that a flag names, here or in another process."""
    names = ("workdir", "nnunet", "totalsegmentator")
    networks = [name for name in names if options[name].value]
    checks.require(
        len(networks) == 1,
        "a network is named by one of --workdir, --nnunet and --totalsegmentator, but "
        f"{len(networks)} of them are given; see --help.",
    )
    if networks == ["totalsegmentator"]:
        checks.require(
            options.overlap is None,
            f"--overlap is {options.overlap}, but the windows of --totalsegmentator "
            "overlap as TotalSegmentator's do; leave the flag out.",
        )
        given.pop("overlap", None)
        fast = options.fast or None
        folder = absolute(options.totalsegmentator)
        return partial(load_totalsegmentator, folder, fast=fast, **given)
    if networks == ["workdir"]:
        given |= {"step": options.step, "mirror": bool(options.mirror)}
        return partial(prediction.load, workdirs_of(options.workdir), **given)
    mirror, folder = options.mirror is not False, absolute(options.nnunet)
    return partial(load_nnunet, folder, folds=options.folds, mirror=mirror, **given)


def main(arguments: list[str]) -> None:
    """Segment as the flags say."""
    options = flags.FLAGS
    startup.start(arguments)
    checks.require(
        not (options.fast and options.overlap is not None),
        "--fast means --overlap=0.25; give only one of them.",
    )
    overlap = 0.25 if options.fast else options.overlap
    names = ("blend", "window_batch", "accumulate_on")
    given = {"overlap": overlap, **{name: getattr(options, name) for name in names}}
    scans = find_scans(options.input, series=options.series)
    pool = startup.pool_of(options)
    load = _loader(
        options,
        accum_dtype="float16" if options.half else "float32",
        dtype=options.dtype,
        **{name: value for name, value in given.items() if value is not None},
    )
    output_options = OutputOptions(
        roi=tuple(options.roi),
        masks=options.masks,
        format=options.format,
        clean=options.clean,
        overwrite=options.overwrite,
        confidence=options.confidence,
        **{name: getattr(options, name) for name in KINDS},
    )
    summary = segment_scans(
        load(), scans, options.output, output_options, load=load, **pool
    )
    failed = {name: s["error"] for name, s in summary.items() if "error" in s}
    done = sum("seconds" in s for s in summary.values())
    skipped = len(summary) - done - len(failed)
    print(
        f"{done} segmented, {skipped} skipped as they were there, {len(failed)} failed"
    )
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)
