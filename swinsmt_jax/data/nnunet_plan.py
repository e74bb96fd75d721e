"""Scans and labels of a model folder of nnU-Net v2: plans.json, dataset.json.

Triples in plans.json follow the network's axes: nnU-Net reads an array with the file's
axes reversed, and applies `transpose_forward`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinsmt_jax import checks

PLANS, DATASET = "plans.json", "dataset.json"
READERS = {  # whether they bring the axes to the closest RAS first
    "SimpleITKIO": False,
    "NibabelIO": False,
    "NibabelIOWithReorient": True,
}
RESAMPLING = "resample_data_or_seg_to_shape"
CHANNELS = "foreground_intensity_properties_per_channel"
ONLY = {  # keys of a configuration that have one value here
    "preprocessor_name": "DefaultPreprocessor",
    "resampling_fn_data": RESAMPLING,
    "resampling_fn_probabilities": RESAMPLING,
    "previous_stage": None,  # of a cascade
}
KNOWN = {
    *ONLY,
    *("architecture", "normalization_schemes", "patch_size", "spacing", "batch_size"),
    *("resampling_fn_data_kwargs", "resampling_fn_probabilities_kwargs"),
    *("use_mask_for_norm", "inherits_from", "next_stage", "next_stage_names"),
    # What only planning and training need.
    *(
        "data_identifier",
        "median_image_size_in_voxels",
        "batch_dice",
        "num_pool_per_axis",
    ),
    *("resampling_fn_seg", "resampling_fn_seg_kwargs"),
    # Of before there was a key `architecture`.
    *("UNet_class_name", "UNet_base_num_features", "unet_max_num_features"),
    *("n_conv_per_stage_encoder", "n_conv_per_stage_decoder"),
    *("pool_op_kernel_sizes", "conv_kernel_sizes"),
}


@dataclass(frozen=True)
class Normalization:
    """The normalisation of voxels before resampling.

    Attributes:
        scheme: "CTNormalization" with the numbers below, or "ZScoreNormalization" with
            the scan's own.
        low, high: HU to which a CT is clipped.
        mean, std: of a CT, in HU.
        masked: whether z-scores use only the voxels other than 0, holes included.
    """

    scheme: str
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    masked: bool = False


@dataclass(frozen=True)
class Plan:
    """nnU-Net's view of a scan, and its network's outputs.

    Attributes:
        patch_shape: window in voxels.
        spacing: in mm.
        batch_size: of the training.
        transpose: axes of the array that was read, in the network's order.
        reoriented: whether that array is in RAS orientation.
        modality: of the scans.
        normalization: of voxels.
        order: of the spline that resamples images.
        separate: whether to resample slices separately; None lets spacings decide.
        separate_back: the same for logits.
        names: of the label ids, the background first.
        regions: label ids of the channels of overlapping regions; empty for classes.
        channels: of the network's output.
        network: class name and arguments, as `convert.nnunet_folder` reads them.
    """

    patch_shape: tuple[int, ...]
    spacing: tuple[float, ...]
    batch_size: int
    transpose: tuple[int, ...]
    reoriented: bool
    modality: str
    normalization: Normalization
    order: int
    separate: bool | None
    separate_back: bool | None
    names: tuple[str, ...]
    regions: tuple[int, ...]
    channels: int
    network: Mapping[str, Any]


def read(folder: Path, configuration: str) -> Plan:
    """Read the plan of a configuration, such as 3d_fullres.

    Raises:
        UserError: for missing or damaged files, and for unsupported features: 2-D and
            cascades, several channels, other readers, normalisations and resamplings,
            and unknown keys.
    """
    plans, dataset = read_json(folder / PLANS), read_json(folder / DATASET)
    try:
        with checks.named(folder / PLANS):
            values = _configuration(plans, configuration)
            names, regions, channels = labels_of(dataset, where=folder / DATASET)
            (image, back) = (
                _resampling(values.get(f"resampling_fn_{what}_kwargs", {}), what, most)
                for what, most in (("data", 5), ("probabilities", 1))
            )
            patch, spacing = (tuple(values[key]) for key in ("patch_size", "spacing"))
            checks.require(
                len(patch) == len(spacing) == 3,
                f"the configuration {configuration} has a patch of {list(patch)}; only "
                "networks of 3-D patches are supported.",
            )
            reader = plans.get("image_reader_writer", "SimpleITKIO")
            checks.one_of("image_reader_writer", reader, READERS)
            transpose = tuple(plans.get("transpose_forward", (0, 1, 2)))
            checks.require(
                sorted(transpose) == [0, 1, 2],
                f"transpose_forward is {list(transpose)}, but must order 0, 1 and 2.",
            )
            return Plan(
                patch_shape=tuple(map(int, patch)),
                spacing=tuple(map(float, spacing)),
                batch_size=int(values.get("batch_size", 2)),
                transpose=transpose,
                reoriented=READERS[reader],
                modality=_modality(dataset, folder / DATASET),
                normalization=_normalization(plans, values),
                order=image[0],
                separate=image[1],
                separate_back=back[1],
                names=names,
                regions=regions,
                channels=channels,
                network=_network(values),
            )
    except checks.UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"the key {error} is missing" if type(error) is KeyError else error
        raise checks.UserError(
            f"{folder / PLANS} and {DATASET} cannot be read as those of nnU-Net v2: "
            f"{reason}; copy the model folder again."
        ) from error


def read_json(path: Path) -> dict:
    """Read a JSON object with its keys in the file's order.

    Raises:
        UserError: for a file that is missing or contains something else.
    """
    checks.require(
        path.is_file(),
        f"{path} does not exist; a model folder of nnU-Net v2 has {PLANS}, {DATASET} "
        "and fold_0/checkpoint_final.pth.",
    )
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise checks.UserError(
            f"{path} cannot be read as JSON: {checks.one_line(error)}."
        ) from error
    checks.require(
        isinstance(found, dict),
        f"{path} holds a {type(found).__name__}, not an object.",
    )
    return found


def labels_of(
    dataset: Mapping, *, where: object
) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """Return the names of label ids, the ids of regions, and the number of outputs.

    Without regions, label files contain channel numbers: the ids in rising order. With
    regions, which have several ids, channels follow the order of the keys, and
    `regions_class_order` gives their ids.

    Args:
        dataset: content of dataset.json.
        where: its place, for messages.

    Raises:
        UserError: for labels without a background, and regions without an order.
    """
    given = {k: _ids(v, where) for k, v in dataset["labels"].items()}
    ignored = given.pop("ignore", ())
    checks.require(
        any(0 in ids for ids in given.values()),
        f"{where} has labels without the background, which is 0.",
    )
    if not any(len(ids) > 1 for ids in [*given.values(), ignored]):
        by_id = {ids[0]: name for name, ids in reversed([*given.items()])}
        names = tuple(by_id[i] for i in sorted(by_id))
        return names, (), len(names)
    channels = [name for name, ids in given.items() if set(ids) != {0}]
    order = dataset.get("regions_class_order", ())
    checks.require(
        isinstance(order, Sequence)
        and len(order) == len(channels)
        and all(type(i) is int and 0 < i < 256 for i in order),
        f"{where} has {len(channels)} regions, but regions_class_order is {order!r}; "
        "it must have a label id for each of them.",
    )
    written = dict(zip(order, channels, strict=True))
    all_names = [written.get(i, f"label_{i}") for i in range(1, max(order) + 1)]
    return ("background", *all_names), tuple(order), len(channels)


def _ids(value, where):
    ids = tuple(value) if isinstance(value, list) else (value,)
    checks.require(
        len(ids) > 0 and all(type(i) is int and i >= 0 for i in ids),
        f"{where} has the label {value!r}, but labels are ids or lists of ids.",
    )
    return ids


def _configuration(plans, name):
    """Return the values of a configuration; missing ones come from its parent."""
    known = plans["configurations"]
    checks.one_of("the configuration of the checkpoint", name, known)
    values, seen = dict(known[name]), [name]
    while "inherits_from" in values:
        parent = values.pop("inherits_from")
        checks.one_of(f"inherits_from of {seen[-1]}", parent, set(known) - {*seen})
        values, seen = {**known[parent], **values}, [*seen, parent]
    for key in values:
        checks.one_of(f"a key of the configuration {name}", key, sorted(KNOWN))
    for key, only in ONLY.items():
        checks.require(
            values.get(key, only) == only,
            f"{key} of the configuration {name} is {values.get(key)!r}, but only "
            f"{only!r} is supported.",
        )
    manager = plans.get("label_manager", "LabelManager")
    checks.one_of("label_manager", manager, ("LabelManager",))
    return values


def _modality(dataset, where):
    names = (
        dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    )
    checks.require(
        len(names) == 1,
        f"{where} has {len(names)} channels ({checks.listed(names.values())}), but "
        "only networks of one are supported.",
    )
    (name,) = names.values()
    return str(name)


def _normalization(plans, values):
    schemes, masks = values["normalization_schemes"], values["use_mask_for_norm"]
    (scheme,), (masked,) = schemes, masks
    allowed = ("CTNormalization", "ZScoreNormalization")
    checks.one_of("normalization_schemes", scheme, allowed)
    if scheme == "ZScoreNormalization":
        return Normalization(scheme, masked=bool(masked))
    key = CHANNELS if CHANNELS in plans else f"{CHANNELS.rsplit('_', 2)[0]}_by_modality"
    of = plans[key]["0"]
    low, high, mean, std = (
        float(of[k]) for k in ("percentile_00_5", "percentile_99_5", "mean", "std")
    )
    checks.require(
        low < high and 0 <= std < float("inf"),
        f"{key} clips to [{low:g}, {high:g}] with a deviation of {std:g}.",
    )
    return Normalization(scheme, low, high, mean, max(std, 1e-8))


def _resampling(values, what, most):
    """Return order and `force_separate_z` from the arguments of a resampling."""
    for key in values:
        known = ("is_seg", "order", "order_z", "force_separate_z")
        checks.one_of(f"a key of resampling_fn_{what}_kwargs", key, known)
    order, along = values.get("order", 3), values.get("order_z", 0)
    allowed = (1,) if most == 1 else range(most + 1)
    checks.one_of(f"the order of resampling_fn_{what}", order, allowed)
    checks.one_of(f"order_z of resampling_fn_{what}", along, (0,))
    forced = values.get("force_separate_z")
    checks.one_of(
        f"force_separate_z of resampling_fn_{what}", forced, (None, True, False)
    )
    return order, forced


def _network(values):
    """Return class name and arguments; older plans keep them at the top level."""
    if "architecture" in values:
        return {
            "class": values["architecture"]["network_class_name"],
            **values["architecture"]["arch_kwargs"],
        }
    blocks = values["n_conv_per_stage_encoder"]
    residual = values["UNet_class_name"] == "ResidualEncoderUNet"
    first, most = values["UNet_base_num_features"], values["unet_max_num_features"]
    return {
        "class": values["UNet_class_name"],
        "n_stages": len(blocks),
        "features_per_stage": [min(first * 2**i, most) for i in range(len(blocks))],
        "kernel_sizes": values["conv_kernel_sizes"],
        "strides": values["pool_op_kernel_sizes"],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": blocks,
        "n_conv_per_stage_decoder": values["n_conv_per_stage_decoder"],
    }
