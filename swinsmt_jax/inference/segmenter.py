"""Segment scans with a trained network: files or arrays in, labels on their grid out.

from swinsmt_jax import load, save
segmenter = load("runs/x")
labels = segmenter.segment("scan.nii.gz")         # uint8, in the axes of the file
labels = segmenter.segment_array(hu, affine)      # hu [X, Y, Z], in any axes
save("labels.nii.gz", labels, like="scan.nii.gz")

Functions import the libraries for scans and checkpoints themselves. Together these take
longer than jax, and importing `load` should not wait for them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.config import ExperimentConfig, InferenceConfig, with_new_keys
from swinsmt_jax.inference import sliding_window
from swinsmt_jax.inference.ensemble import decision_of, load_networks, workdirs_of
from swinsmt_jax.inference.grid import LARGEST, Decided, Decision
from swinsmt_jax.inference.provenance import digest_of_network
from swinsmt_jax.inference.scan_reader import Progress, Scans, load_scan  # noqa: F401
from swinsmt_jax.inference.sliding_window import Predict
from swinsmt_jax.labels import names_by_id
from swinsmt_jax.models import abstract_model, split
from swinsmt_jax.models.registry import NetworkConfig
from swinsmt_jax.runtime.files import absolute

if TYPE_CHECKING:
    from swinsmt_jax.data.network_view import NetworkView
    from swinsmt_jax.data.volume import Volume


@dataclasses.dataclass(frozen=True)
class Segmenter(Scans):
    """A trained network and its view of scans; made by `load`.

    Attributes:
        config: of the experiment; `data` gives spacing and HU, `inference` the windows.
        predict: a jitted function from windows to logits.
        step: of the checkpoint, or of each of several.
        accum_dtype: "float32" or "float16", of the stored logits.
        network: hash of the parameters.
        mirror: whether `predict` averages over mirror images.
        run: the workdir, for the record.
    """

    config: ExperimentConfig
    predict: Predict
    step: int | list[int]
    accum_dtype: str = "float32"
    network: str = ""
    mirror: bool = False
    run: str = ""

    @property
    def decision(self) -> Decision:
        """How logits become labels."""
        return decision_of(self.config)

    @property
    def modality(self) -> str:
        """Modality of the scans, for notes on their values."""
        return self.config.data.modality

    @property
    def made_by(self) -> dict[str, object]:
        """Everything that decides a scan's labels, for the record."""
        config = self.config
        return {
            "network": self.network,
            "step": self.step,
            "window": list(config.data.patch_shape),
            "spacing": _plain(config.data.spacing),
            "hu_range": list(config.data.hu_range),
            "normalization": list(config.data.normalization),
            "overlap": config.inference.overlap,
            "blend": config.inference.blend,
            "dtype": config.model.dtype,
            "accum_dtype": self.accum_dtype,
            "mirror": self.mirror,
        }

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the network's label ids, without the background."""
        names = self.config.data.class_names
        return names_by_id(names, num_classes=self.config.model.out_channels)

    @property
    def usual_ml(self) -> Mapping[str, tuple[float, ...]]:
        """Usual volumes of classes in the training set."""
        return self.config.data.seen.usual_ml

    def view(self, volume: "Volume") -> "NetworkView":
        """Return the network's view of a scan in RAS orientation."""
        from swinsmt_jax.data.network_view import network_view, unlike_training

        data = self.config.data
        far = unlike_training(data.spacing, data.seen, volume.affine)
        if far:
            logging.warning("%s: %s", volume.path, far)
        return network_view(
            volume.array,
            volume.affine,
            spacing=data.spacing,
            hu_range=data.hu_range,
            normalization=data.normalization,
        )

    def decide_volume(
        self,
        volume: "Volume",
        *,
        confidence: bool = False,
        chosen: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Decided:
        """Return labels and facts about them, as `Scans.decide_volume`."""
        return decide(
            self.predict,
            self.view(volume),
            window=self.config.data.patch_shape,
            num_classes=self.config.model.out_channels,
            inference=self.config.inference,
            sharding=batch_sharding(),
            decision=self.decision._replace(
                confidence=confidence, chosen=tuple(chosen)
            ),
            accum_dtype=self.accum_dtype,
            progress=progress,
        )


Loader = TypeVar("Loader", bound=Callable)


def accepting_sums(load: Loader) -> Loader:
    """Let a function take `accum_dtype` by its earlier name, `sums`, too."""

    @functools.wraps(load)
    def with_new_name(*arguments, **options):
        if "sums" in options:
            logging.info("the argument sums is now accum_dtype")
            options["accum_dtype"] = options.pop("sums")
        return load(*arguments, **options)

    return with_new_name  # type: ignore[return-value]


@accepting_sums
def load(
    workdir: str | Path | Sequence[str | Path],
    *,
    step: int | str | None = None,
    accum_dtype: str = "float32",
    mirror: bool = False,
    dtype: str | None = None,
    **inference: Any,
) -> Segmenter:
    """Load the network of a training run.

    Args:
        workdir: of the run. For several, "A,B,C" or a list, probabilities are averaged;
            see `ensemble.load_networks`.
        step: a number, "latest" or "best"; None takes the best if any, or the latest.
        accum_dtype: "float16" halves the memory of the stored logits.
        mirror: also segment every window with right and left swapped, and average;
            takes twice the time.
        dtype: "bfloat16" or "float32", of matrix products and convolutions; None takes
            the dtype of training.
        inference: fields of `config.InferenceConfig` to change, such as overlap=0.25.

    Raises:
        UserError: as `checkpoint.load_model`, and for fields out of range.
    """
    workdirs = workdirs_of(workdir)
    read = functools.partial(_network_of, dtype=dtype)
    config, model, info = load_networks(workdirs, step=step, load=read)
    windows = with_options(config.inference, inference)
    config = dataclasses.replace(config, inference=windows)
    swap = None
    if mirror:
        names = config.data.class_names
        swap = left_right_swap(names, num_classes=config.model.out_channels)
    predict = predict_fn(model, left_right_swap=swap)
    single = isinstance(model, nnx.Module)
    digest = digest_of_network(split(model)[1] if single else model)
    run = ",".join(map(str, workdirs))
    return Segmenter(config, predict, info["step"], accum_dtype, digest, mirror, run)


def _network_of(workdir, *, step, dtype):
    from swinsmt_jax.training.checkpoint import load_model

    config, model, info = load_model(workdir, step=step)
    network, model = computing_in(dtype, config.model, model)
    return dataclasses.replace(config, model=network), model, info


def with_options(config: InferenceConfig, options: Mapping) -> InferenceConfig:
    """Return the config with some fields changed; unknown ones are a `UserError`."""
    known = {field.name for field in dataclasses.fields(config)}
    options = with_new_keys("inference", dict(options))
    for name in options:
        checks.one_of("an option of the inference", name, known)
    return dataclasses.replace(config, **options)


def save(
    path: str | Path, labels: np.ndarray, *, like: str | Path, names: dict | None = None
) -> None:
    """Write labels as NIfTI in the place and axes of a scan.

    Args:
        path: .nii.gz or .nii; the file appears when complete.
        labels: bool or integers of at most 255, as from `Segmenter.segment(like)`.
        like: the scan, a NIfTI file or a folder with a DICOM series.
        names: {label id: name} for the header, as `Segmenter.class_names`.

    Raises:
        UserError: for another suffix, dtype, value or shape.
    """
    from swinsmt_jax.data import dicom, dicom_files, label_table, nifti, voxels

    labels = voxels.label_ids(path, labels)
    path, like = absolute(path), absolute(like)
    series = dicom_files.is_dicom(like)
    scan = dicom.load_series(like) if series else nifti.grid_of(like)
    checks.require(
        labels.shape == scan.source_shape,
        f"labels for {path} have shape {labels.shape}, but {like} has "
        f"{scan.source_shape}.",
    )
    table = label_table.xml(names) if names else ""
    nifti.write(path, labels, scan.source_affine, header=scan.header, description=table)


def decide(
    predict: Predict,
    view: "NetworkView",
    *,
    window: Sequence[int],
    num_classes: int,
    inference: InferenceConfig,
    sharding: jax.sharding.Sharding | None = None,
    decision: Decision = LARGEST,
    accum_dtype: str = "float32",
    progress: Progress | None = None,
) -> Decided:
    """Return the labels of a scan on its own grid, and facts about them.

    If the network sees the scan resampled, its probabilities are interpolated to the
    scan's grid and become labels there. Voxels outside the foreground are background,
    without probabilities.

    Args:
        predict: a jitted function `[b, *window, C] -> [b, *window, K]`.
        view: the scan, from `network_view` or `nnunet_view`.
        window: the training patch, because a Soft MoE's result depends on it.
        num_classes: K.
        inference: overlap, blending, batch and place of the sums.
        sharding: of the batches of windows; their size is rounded up to fill it.
        decision, accum_dtype, progress: as in `sliding_window.decide`.
    """
    decided = sliding_window.decide(
        predict,
        view.image,
        window=window,
        num_classes=num_classes,
        overlap=inference.overlap,
        blend=inference.blend,
        convention=inference.convention,
        window_batch=_filling(inference.window_batch, sharding),
        sharding=sharding,
        positions=view.positions,
        fill=view.fill,
        decision=decision,
        accum_dtype=accum_dtype,
        accumulate=inference.accumulate_on,
        progress=progress,
    )
    return decided.each(view.on_scan)


@jax.jit
def _apply(model, windows):
    return model(windows)


@jax.jit
def _apply_mirrored(model, windows, left_right_swap):
    mirrored = jnp.flip(model(jnp.flip(windows, 1)), 1)
    return (model(windows) + mirrored[..., left_right_swap]) / 2


def predict_fn(
    model: Callable, *, left_right_swap: np.ndarray | None = None
) -> Predict:
    """Return the jitted function from windows to logits of a model, a pytree.

    With a `left_right_swap` table, logits are the mean over a window and its mirror
    image.
    """
    if left_right_swap is None:
        return lambda windows: _apply(model, windows)
    return lambda windows: _apply_mirrored(model, windows, left_right_swap)


def computing_in(
    dtype: str | None, config: NetworkConfig, model: nnx.Module
) -> tuple[NetworkConfig, nnx.Module]:
    """Return config and network for matrix products and convolutions in another dtype.

    Parameters stay as they are. None changes nothing.

    Raises:
        UserError: for a dtype that networks do not support.
    """
    if dtype is None:
        return config, model
    config = dataclasses.replace(config, dtype=dtype)
    return config, nnx.merge(abstract_model(config)[0], split(model)[1])


def left_right_swap(names: Sequence[str], *, num_classes: int) -> np.ndarray:
    """Return the id of each class's counterpart on the other side of the body, `[K]`.

    Args:
        names: of the label ids, the background first.
        num_classes: K, of the network.

    Raises:
        UserError: for a network whose classes lack counterparts.
    """
    swap = np.arange(num_classes)
    known = ClassMap(tuple(names)).left_right_swap()[:num_classes]
    swap[: len(known)] = known
    checks.require(
        bool(swap.max() < num_classes),
        f"the network gives {num_classes} classes, and some have their left or right "
        f"counterpart beyond: {np.flatnonzero(swap >= num_classes).tolist()}; "
        "predict without mirroring.",
    )
    return swap


def _plain(value):
    """Return a value that JSON reads back unchanged."""
    return list(value) if isinstance(value, tuple) else value


def batch_sharding() -> jax.sharding.Sharding | None:
    """Divide batches of windows over this process's devices; None for one device."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    axis = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=axis, devices=devices)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def _filling(wanted, sharding):
    """Round a batch of windows up so that every device of the sharding works."""
    devices = 1 if sharding is None else sharding.num_devices
    batch = -(-wanted // devices) * devices
    if batch != wanted:
        logging.log_first_n(
            logging.INFO,
            "inference.window_batch is raised from %d to %d for %d devices.",
            1,
            wanted,
            batch,
            devices,
        )
    return batch
