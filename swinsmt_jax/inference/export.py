"""Write a trained network as one file that needs jax, numpy and flatbuffers.

    python -m swinsmt_jax.inference.export --workdir=runs/x --output=network.npz

`swinsmt_jax.inference.portable` reads it. The program takes
`inference.window_batch` windows of the training patch at a time, on CPU, CUDA and TPU.
It has cuDNN's attention for CUDA only if it is made on a machine that has cuDNN.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags, logging
from flax import nnx

from swinsmt_jax.config import ExperimentConfig
from swinsmt_jax.inference import portable
from swinsmt_jax.labels import names_by_id
from swinsmt_jax.ops import by_platform
from swinsmt_jax.ops.gpu import cudnn_attention
from swinsmt_jax.runtime import startup
from swinsmt_jax.runtime.files import absolute, make_folder, replacing
from swinsmt_jax.training.checkpoint import load_model


def export(
    model: nnx.Module, config: ExperimentConfig, path: Path, *, step: int = 0
) -> None:
    """Export a network with the facts that `portable.Portable` needs.

    Args:
        model: the network.
        config: of its experiment.
        path: of the .npz file, which appears when complete.
        step: of the checkpoint, for the record.
    """
    graphdef, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)

    @jax.jit
    def program(leaves, windows):
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(windows)

    names = config.data.class_names
    batch, window = config.inference.window_batch, config.data.patch_shape
    shape = (batch, *window, config.model.in_channels)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    windows = jax.ShapeDtypeStruct(shape, jnp.float32)
    allowed = map(jax.export.DisabledSafetyCheck.custom_call, cudnn_attention.TARGETS)
    with by_platform.for_every_platform(), by_platform.noting() as attention:
        lowered = jax.export.export(
            program, platforms=portable.PLATFORMS, disabled_checks=[*allowed]
        )
        exported = lowered(shapes, windows)
    how = by_platform.described(attention)
    logging.info("attention, where CUDA runs the network: %s", how)
    about = {
        "window": list(window),
        "window_batch": batch,
        "spacing": config.data.spacing,
        "orientation": config.data.orientation,
        "hu_range": list(config.data.hu_range),
        "normalization": list(config.data.normalization),
        "num_classes": config.model.out_channels,
        "class_names": names_by_id(names, num_classes=config.model.out_channels),
        "groups": config.data.seen.groups,
        "data": config.data.seen.fingerprint,
        "least": config.data.seen.least,
        "most": config.data.seen.most,
        "usual_ml": config.data.seen.usual_ml,
        "overlap": config.inference.overlap,
        "blend": config.inference.blend,
        "step": step,
        "attention_on_cuda": attention,
        "jax": jax.__version__,
    }
    with replacing(path) as partial:
        portable.save(partial, exported, leaves, about)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command line."""
    for name, help in (
        ("workdir", "folder of the training run"),
        ("output", "file to write, .npz"),
        ("step", "checkpoint: best, latest or a number"),
    ):
        flags.DEFINE_string(name, None, help, flag_values=values)
    flags.mark_flags_as_required(["workdir", "output"], flag_values=values)


def main(arguments: list[str]) -> None:
    """Export as the flags say."""
    options = flags.FLAGS
    startup.start(arguments)
    output = absolute(options.output)
    make_folder(output.parent)
    config, model, info = load_model(options.workdir, step=options.step)
    export(model, config, output, step=info["step"])
    size = output.stat().st_size / 1e6
    print(f"{options.output}: step {info['step']}, {size:,.1f} MB")


if __name__ == "__main__":
    startup.run(sys.modules[__name__], program="swinsmt_jax.inference.export")
