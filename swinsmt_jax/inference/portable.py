"""A trained network as one file that runs with jax and numpy.

from swinsmt_jax.inference import portable
network = portable.load("network.npz")
labels = network.segment(hu)           # uint8; hu [X, Y, Z] on the network's grid

`python -m swinsmt_jax.inference.export` writes such files. This module and its imports
need jax, numpy, and flatbuffers, which jax.export uses to read. The file contains the
parameters and the program from `jax.export` for a batch of windows, on CPU, CUDA and
TPU. An exported network is a program: open only files that you trust. jax.export
promises to read programs for at least half a year (see its documentation), so keep the
checkpoint too.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.data import voxels
from swinsmt_jax.inference.sliding_window import predict_labels
from swinsmt_jax.ops.gpu import cudnn_attention

PLATFORMS = ("cpu", "cuda", "tpu")
NEEDED = {"window", "window_batch", "hu_range", "num_classes", "overlap", "blend"}
DIGEST = "program_sha256"


@dataclasses.dataclass(frozen=True, eq=False)
class Portable:
    """An exported network.

    Attributes:
        about: `window` and `window_batch`, `spacing` in mm, one side or three (0: that
            of the scan), `orientation`, `hu_range`, `normalization`, `class_names` by
            id, `groups` of names, `num_classes`, `data` (fingerprint of the training
            cases), `usual_ml` (volumes of classes in them), `overlap`,
            `blend`, `step`.
        exported: the program, of (parameters, windows).
        parameters: its arrays.
    """

    about: Mapping
    exported: jax.export.Exported
    parameters: Sequence[jax.Array]

    def predict(self, windows: jax.Array) -> jax.Array:
        """Return logits `[b, *window, K]` of windows `[b, *window, 1]`, scaled."""
        return self._program(self.parameters, windows)

    @functools.cached_property
    def _program(self):
        """The program, compiled once for all scans."""
        return jax.jit(self.exported.call)

    def segment(self, hu: np.ndarray) -> np.ndarray:
        """Return the class ids of a scan, uint8 `[X, Y, Z]`.

        Args:
            hu: Hounsfield units `[X, Y, Z]`, the axes to the right, front and head,
                with voxels of `about["spacing"]` mm. If that is 0, sides must lie
                between `about["least"]` and `about["most"]`, which the network saw.
                Leave out the air around the body, as training does: a window of air
                tells the network nothing.

        Raises:
            UserError: for another rank, and voxels that are not finite numbers.
        """
        hu = np.asarray(hu)
        checks.require(hu.ndim == 3, f"hu has shape {hu.shape}, but must be [X, Y, Z].")
        hu = voxels.hounsfield("hu", hu)
        low, high = self.about["hu_range"]
        image = np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1)[..., None]
        normalization = self.about.get("normalization", ())
        scale, air = voxels.normalizing((low, high), normalization)
        image = image * scale + air if normalization else image
        return predict_labels(
            self.predict,
            image,
            window=self.about["window"],
            num_classes=self.about["num_classes"],
            overlap=self.about["overlap"],
            blend=self.about["blend"],
            window_batch=self.about["window_batch"],
            fill=float(air),
        )


def save(
    path: Path, exported: jax.export.Exported, parameters: Sequence, about: Mapping
) -> None:
    """Write an exported network; arguments as the attributes of `Portable`."""
    arrays: dict[str, Any] = {
        f"parameter_{i}": np.asarray(x) for i, x in enumerate(parameters)
    }
    program = exported.serialize()
    about = {**about, DIGEST: hashlib.sha256(program).hexdigest()}
    with path.open("wb") as file:
        np.savez(
            file,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            program=np.frombuffer(program, np.uint8),
            **arrays,
        )


def load(path: str | Path) -> Portable:
    """Read an exported network; open only files that you trust.

    A program that calls code on the host is refused, except for cuDNN's attention,
    since no network needs such calls. What a program computes, and for how long, is not
    checked.

    Raises:
        UserError: for a file that is missing, damaged, or not from `inference.export`.
    """
    try:
        with Path(path).expanduser().open("rb") as stream, np.load(stream) as file:
            about = json.loads(file["about"].tobytes())
            _require_known(about)
            program = file["program"].tobytes()
            digest = hashlib.sha256(program).hexdigest()
            if about.get(DIGEST, digest) != digest:
                raise ValueError("the program is not the one that was written")
            exported = jax.export.deserialize(bytearray(program))
            count = sum(name.startswith("parameter_") for name in file.files)
            arrays = {f"parameter_{i}": file[f"parameter_{i}"] for i in range(count)}
            _require_fit(exported, [*arrays.values()], about)
            _require_no_calls(exported)
    except Exception as error:  # damaged archives and programs raise anything
        raise checks.UserError(
            f"{path} is not an exported network ({checks.one_line(error)}); make one "
            "with python -m swinsmt_jax.inference.export."
        ) from error
    checks.finite(path, arrays)
    return Portable(about, exported, [*map(jax.numpy.asarray, arrays.values())])


def _require_known(about):
    """Raise `ValueError` unless everything that `Portable` reads exists."""
    lacking = NEEDED - about.keys() if isinstance(about, dict) else NEEDED
    if lacking:
        raise ValueError(f"it does not state {', '.join(sorted(lacking))}")


def _require_no_calls(exported):
    """Raise `ValueError` for custom calls (code on the host) except those of cuDNN."""
    calls = re.findall(r"custom_call\W*([\w$.]*)", exported.mlir_module())
    strange = [call for call in calls if call not in cudnn_attention.TARGETS]
    if strange:
        raise ValueError(
            f"it calls {strange[0]}, which no network of this package does"
        )


def _require_fit(exported, arrays, about):
    """Raise `ValueError` unless the program takes these parameters and windows."""
    windows = (about["window_batch"], *about["window"])
    given = [*(array.shape for array in arrays), windows]
    *wanted, last = (tuple(x.shape) for x in exported.in_avals)
    if [*wanted, last[:-1]] != given:
        raise ValueError("the program takes other parameters or windows")
