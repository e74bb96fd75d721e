"""Memory and time of whole-body prediction beside the network's own.

    python -m benchmarks.inference [--quick] [--json=FILE]

A stand-in network, cheap but dependent on place, gives 118 logits a voxel. Measured are
the largest sum of host arrays while `predict_labels` runs with its sums on the host
(tracemalloc: everything but what the network itself allocates) on 300^3 and 400 x 400 x
700 voxels with windows of 128^3 and overlap 0.5, in float32 and half precision, and of
300^3 with labels on another grid, as for a resampled scan; beside what has to be
carried from one layer of windows to the next, and MONAI's whole accumulator; whether
labels are those of a whole accumulator, and how many differ where sums stay on the
device; and the time of summing up a window against that of the network (Swin SMT with 4
experts, windows of 64^3).

On an accelerator first a whole body of 300 x 300 x 500 voxels with the paper's network
in bfloat16, windows of 128^3, overlap 0.5: seconds, the network compiled before.

--quick takes 300^3 in float32 alone, and ends that scan after the window by which, as
the windows lie, most voxels wait: nothing later needs more; a small resampled scan; and
a short measurement of the time.
"""

import functools
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import memory_limit_gb, programs, run, save, show
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.configs import swin_smt_e4, swin_smt_paper
from swinsmt_jax.inference.sliding_window import predict_labels
from swinsmt_jax.inference.windows import (
    Windows,
    importance,
    padding,
    window_starts,
)

SCANS = {"300": (300, 300, 300), "400x400x700": (400, 400, 700)}
SIDE, CLASSES = 128, 118
BODY = (300, 300, 500)


class Reached(Exception):  # noqa: N818 - no error
    """The window is done by which most voxels wait."""


def stand_in(classes):
    """Return a network of one multiplication and one addition for each logit."""
    rates, offsets = np.random.default_rng(2).uniform(-1, 1, (2, classes))
    rates, offsets = jnp.float32(rates), jnp.float32(offsets)

    @jax.jit
    def predict(windows):
        place = jnp.linspace(0, 1, windows.shape[1])[:, None, None, None]
        return windows * rates + place * offsets

    return predict


def measure(
    shape,
    *,
    side,
    classes,
    accum_dtype,
    positions=None,
    accumulate="host",
    until_peak=False,
):
    """Return the labels, GB at the peak, and seconds of a prediction.

    With `until_peak`, it ends once no later window can need more memory: there are no
    labels then.
    """
    volume = np.random.default_rng(0).random((*shape, 1), np.float32)
    predict = stand_in(classes)
    jax.block_until_ready(predict(np.zeros((1, side, side, side, 1), np.float32)))
    last = fullest(volume, (side,) * 3) + 2 if until_peak else None

    def progress(done, _):
        if done == last:
            raise Reached

    labels = None
    tracemalloc.start()
    start = time.perf_counter()
    try:
        labels = predict_labels(
            predict,
            volume,
            window=(side,) * 3,
            num_classes=classes,
            positions=positions,
            accum_dtype=accum_dtype,
            accumulate=accumulate,
            progress=progress,
        )
    except Reached:
        pass
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1] / 1e9
    tracemalloc.stop()
    return labels, peak, seconds


def fullest(volume, window):
    """Return the index of the window after which the most voxels wait for others."""
    windows = Windows(volume, window, 0.5, "gaussian")
    windows.visit_last_in_turn()
    waiting, found = {}, []
    for start in windows.starts:
        for tile, ended in windows.tiles(start):
            if ended:
                waiting.pop(tile, None)
            else:
                waiting[tile] = np.prod([span.end - span.first for span in tile])
        found.append(sum(waiting.values()))
    return int(np.argmax(found))


def carried_gb(shape, *, side, classes, accum_dtype):
    """Return what two layers of windows have in common, in the dtype of the sums."""
    cross = np.prod(sorted(shape)[:2])
    return classes * (side // 2) * float(cross) * np.dtype(accum_dtype).itemsize / 1e9


def accumulated(predict, volume, *, window, num_classes, overlap):
    """Return the labels by one accumulator of the whole volume."""
    pad = padding(volume.shape[:3], window)
    padded = np.pad(volume, (*pad, (0, 0)))
    weight = importance(window, blend="gaussian")[..., None]
    total = np.zeros((*padded.shape[:3], num_classes), np.float32)
    for start in window_starts(padded.shape[:3], window, overlap=overlap):
        box = tuple(slice(s, s + n) for s, n in zip(start, window, strict=True))
        total[box] += weight * predict(padded[box][None])[0]
    inner = tuple(
        slice(a, a + n) for (a, _), n in zip(pad, volume.shape[:3], strict=True)
    )
    return total[inner].argmax(-1)


def labels_identical(*, side, classes):
    """Whether labels are those of the argmax of a whole accumulator."""
    rng, predict = np.random.default_rng(1), stand_in(classes)
    sizes = [(2.5, 2, 1.2), (0.7, 1.5, 3.1), (1, 1, 1), (1.9, 2.6, 0.5), (2.7, 3.2, 2)]
    for size in sizes:
        shape = tuple(int(part * side) for part in size)
        volume = rng.random((*shape, 1), np.float32)
        for overlap in (0.25, 0.5, 0.7):
            options = {
                "window": (side,) * 3,
                "num_classes": classes,
                "overlap": overlap,
            }
            labels = predict_labels(predict, volume, accumulate="host", **options)
            if not np.array_equal(labels, accumulated(predict, volume, **options)):
                return False
    return True


def differing_on_device(*, side, classes):
    """Return the share of labels that differ where sums stay on the device."""
    volume = np.random.default_rng(1).random((3 * side, 2 * side, side + 5, 1))
    host, device = (
        predict_labels(
            stand_in(classes),
            volume.astype(np.float32),
            window=(side,) * 3,
            num_classes=classes,
            accumulate=place,
        )
        for place in ("host", "device")
    )
    return float((host != device).mean())


def compiled_network(values, window_batch, side):
    """Return a config, and its compiled network with random parameters."""
    config = from_config_dict(values).model
    apply, shapes = programs.program(config, side, what="forward", batch=window_batch)
    params, image, label = programs.random_arguments(shapes)
    jax.block_until_ready(apply(params, image, label))
    return config, functools.partial(apply, params, label=label)


def overhead_ratio(*, quick):
    """Return time per window beside the network's, as a share of the network's."""
    config, network = compiled_network(swin_smt_e4.get_config(), 1, 64)
    window, repeats = np.zeros((1, 64, 64, 64, 1), np.float32), 1 if quick else 3
    times = programs.seconds_of(network, window, repeats=repeats, warm=0)
    seconds_of_network = sum(times) / repeats
    shape, windows = (128, 128, 192), 3 * 3 * 5
    if quick:
        shape, windows = (128, 96, 96), 3 * 2 * 2
    *_, seconds = measure(
        shape,
        side=64,
        classes=config.out_channels,
        accum_dtype="float32",
        accumulate="auto",
    )
    return seconds / windows / seconds_of_network


def whole_body(*, limit_gb):
    """Return the row of a whole body with the paper's network in bfloat16.

    A window's logits take a gigabyte: so many are predicted at once as an eighth of the
    device's memory holds, at most four.
    """
    batch = next(n for n in (4, 2, 1) if n == 1 or n * 8 <= limit_gb)
    values = swin_smt_paper.get_config()
    values.model.update({"dtype": "bfloat16", "remat": ()})
    config, network = compiled_network(values, batch, SIDE)
    volume = np.random.default_rng(0).random((*BODY, 1), np.float32)
    seconds = []
    while len(seconds) < 2 and sum(seconds) < 20:  # the first compiles the sums
        start = time.perf_counter()
        predict_labels(
            network,
            volume,
            window=(SIDE,) * 3,
            num_classes=config.out_channels,
            overlap=0.5,
            window_batch=batch,
        )
        seconds.append(time.perf_counter() - start)
    return {
        "shape": BODY,
        "network": "swin_smt_paper",
        "dtype": "bfloat16",
        "window_batch": batch,
        "seconds": min(seconds),
        "first_seconds": seconds[0],
    }


def row_of(name, shape, *, side, accum_dtype, **options):
    """Measure a scan; return its row and labels."""
    labels, peak, seconds = measure(
        shape, side=side, classes=CLASSES, accum_dtype=accum_dtype, **options
    )
    row = {
        "scan": name,
        "shape": shape,
        "accum_dtype": accum_dtype,
        "peak_gb": peak,
        "carried_gb": carried_gb(
            shape, side=side, classes=CLASSES, accum_dtype=accum_dtype
        ),
        "whole_gb": CLASSES * float(np.prod(shape)) * 4 / 1e9,
        "seconds": seconds,
        "complete": labels is not None,
    }
    print(
        "{scan} {accum_dtype}: peak {peak_gb:.3f} GB, carried {carried_gb:.3f} GB, "
        "whole {whole_gb:.3f} GB, {seconds:.1f} s".format(**row),
        flush=True,
    )
    return row, labels


def other_grid(shape):
    """Return positions of a grid that is coarser by a fifth."""
    return [np.linspace(0, n - 1, int(0.8 * n)) for n in shape]


def main(options):
    quick, rows = options.quick, []
    figures = {f"peak_gb_{name}": None for name in SCANS}

    def keep():
        save(figures, rows=rows)

    if jax.default_backend() != "cpu":
        rows.append(whole_body(limit_gb=memory_limit_gb()))
        print("whole body: {seconds:.1f} s".format(**rows[-1]), flush=True)
        figures["whole_body_300x300x500_s"] = rows[-1]["seconds"]
        keep()
    figures["labels_identical"] = labels_identical(side=16, classes=9)
    figures["labels_differ_on_device"] = differing_on_device(side=16, classes=9)
    figures["overhead_ratio"] = overhead_ratio(quick=quick)
    keep()
    for name in options.scans if not quick else {"300"} & set(options.scans):
        first = None
        for accum_dtype in ["float32"] if quick else options.accum_dtype:
            row, labels = row_of(
                name, SCANS[name], side=SIDE, accum_dtype=accum_dtype, until_peak=quick
            )
            if labels is not None:
                first = labels if first is None else first
                row["changed"] = float((labels != first).mean())
            rows.append(row)
            if accum_dtype == "float32":
                figures[f"peak_gb_{name}"] = row["peak_gb"]
            keep()
    if "300" in options.scans:
        side, shape = (32, (48, 48, 80)) if quick else (SIDE, SCANS["300"])
        name = "x".join(map(str, shape)) + " resampled"
        row, _ = row_of(
            name, shape, side=side, accum_dtype="float32", positions=other_grid(shape)
        )
        rows.append(row)
        figures["peak_gb_300_resampled"] = None if quick else row["peak_gb"]
    keep()
    show(figures)


if __name__ == "__main__":
    flags.DEFINE_list("scans", list(SCANS), "sizes to measure")
    help = "precisions of the sums; differences are told against the first"
    flags.DEFINE_list("accum_dtype", ["float32", "float16"], help)
    run(main, quick="300^3 in float32 alone")
