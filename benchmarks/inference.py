"""Memory and time of whole-body prediction beside the network's own.

    python -m benchmarks.inference [--quick] [--json=FILE]

A stand-in network, cheap but dependent on place, gives 118 logits a voxel. Measured are
the largest sum of host arrays while `predict_labels` runs (tracemalloc: everything but
what the network itself allocates) on 300^3 and 400 x 400 x 700 voxels with windows of
128^3 and overlap 0.5, in float32 and half precision, beside what has to be carried from
one layer of windows to the next, and MONAI's whole accumulator; whether labels are
those of a whole accumulator; and the time of summing up a window against that of the
network (Swin SMT with 4 experts, windows of 64^3). --quick takes 16 classes, small
scans and windows, and no network of time.
"""

import json
import platform
import time
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import command_line, define_file
from configs import swin_smt_e4
from swinsmt_jax import models
from swinsmt_jax.config import from_config_dict
from swinsmt_jax.inference import predict_labels
from swinsmt_jax.ops import patches


def stand_in(classes):
    """Return a network of one multiplication and one sine for each logit."""
    rates = jnp.arange(1, classes + 1, dtype=jnp.float32)

    @jax.jit
    def predict(windows):
        place = jnp.linspace(0, 1, windows.shape[1])[:, None, None, None]
        return jnp.sin((windows + 0.1 * place) * rates)

    return predict


def measure(shape, *, side, classes, sums):
    """Return the labels, GB at the peak, and seconds of a prediction."""
    volume = np.random.default_rng(0).random((*shape, 1), np.float32)
    predict = stand_in(classes)
    jax.block_until_ready(predict(np.zeros((1, side, side, side, 1), np.float32)))
    tracemalloc.start()
    start = time.perf_counter()
    labels = predict_labels(
        predict, volume, window=(side,) * 3, num_classes=classes, sums=sums
    )
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1] / 1e9
    tracemalloc.stop()
    return labels, peak, seconds


def carried_gb(shape, *, side, classes):
    """Return what two layers of windows have in common, in float32."""
    cross = np.prod(sorted(shape)[:2])
    return classes * (side // 2) * float(cross) * 4 / 1e9


def accumulated(predict, volume, *, window, num_classes, overlap):
    """Return the labels by one accumulator of the whole volume."""
    pad = patches.padding(volume.shape[:3], window)
    padded = np.pad(volume, (*pad, (0, 0)))
    weight = patches.importance(window, blend="gaussian")[..., None]
    total = np.zeros((*padded.shape[:3], num_classes), np.float32)
    for start in patches.window_starts(padded.shape[:3], window, overlap=overlap):
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
            labels = predict_labels(predict, volume, **options)
            if not np.array_equal(labels, accumulated(predict, volume, **options)):
                return False
    return True


def overhead_ratio():
    """Return time per window beside the network's, as a share of the network's."""
    config = from_config_dict(swin_smt_e4.get_config()).model
    model = models.create(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    window = np.zeros((1, 64, 64, 64, 1), np.float32)
    apply = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    jax.block_until_ready(apply(params, window))
    start = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(apply(params, window))
    network = (time.perf_counter() - start) / 3
    shape = (128, 128, 192)
    *_, seconds = measure(shape, side=64, classes=config.out_channels, sums="float32")
    windows = 3 * 3 * 5
    return seconds / windows / network


def main(_):
    options = flags.FLAGS
    small = options.quick
    side, classes = (32, 16) if small else (128, 118)
    scans = {"300": (300, 300, 300), "400x400x700": (400, 400, 700)}
    if small:
        scans = {"300": (75, 75, 75), "400x400x700": (100, 100, 175)}
    headline = {"labels_identical": labels_identical(side=16, classes=9)}
    rows = []
    for name, shape in ((n, s) for n, s in scans.items() if n in options.scans):
        found = {}
        for sums in options.sums:
            labels, peak, seconds = measure(
                shape, side=side, classes=classes, sums=sums
            )
            found[sums] = labels
            changed = float((labels != found[options.sums[0]]).mean())
            row = {
                "shape": shape,
                "sums": sums,
                "peak_gb": peak,
                "carried_gb": carried_gb(shape, side=side, classes=classes),
                "whole_gb": classes * float(np.prod(shape)) * 4 / 1e9,
                "seconds": seconds,
                "changed": changed,
            }
            rows.append(row)
            print(
                "{shape} {sums}: peak {peak_gb:.3f} GB, carried {carried_gb:.3f} GB, "
                "whole {whole_gb:.3f} GB, {seconds:.1f} s, {changed:.2%} of the labels "
                "differ from the first".format(**row),
                flush=True,
            )
            if sums == "float32":
                headline[f"peak_gb_{name}"] = peak
    headline["overhead_ratio"] = None if small else overhead_ratio()
    print(json.dumps(headline, indent=1))
    if options.json:
        report = {
            "headline": headline,
            "rows": rows,
            "machine": f"{platform.machine()} {jax.devices()[0].device_kind}",
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "command": command_line(),
        }
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "small scans, few classes")
    define_file("json", "also write the figures to this file")
    flags.DEFINE_list("scans", ["300", "400x400x700"], "sizes to measure")
    help = "precisions of the sums; differences are told against the first"
    flags.DEFINE_list("sums", ["float32", "float16"], help)
    app.run(main)
