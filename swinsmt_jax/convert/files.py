"""Weights in files: PyTorch's .pt and .pth, and .safetensors.

A .pt file is a zip archive with one pickle, which names storages, and the storages' raw
bytes. The pickle is read by an interpreter that knows tensors and dictionaries and
refuses everything else, so no code of a file is ever run.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from swinsmt_jax import checks
from swinsmt_jax.runtime.files import replacing

SUFFIXES = (".pt", ".pth", ".safetensors")
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Where training scripts put the parameters, besides the epoch and the optimiser.
NESTED = ("state_dict", "network_weights", "model_state_dict", "model", "net")


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Read a state dictionary: arrays by PyTorch's names.

    Parameters that a training script put under `state_dict` or another name of `NESTED`
    are taken from there.

    Raises:
        UserError: for a missing or damaged file, one of another format, a pickle that
            holds more than tensors and plain values, and one without parameters.
    """
    path = Path(path)
    checks.one_of("the suffix of " + str(path), path.suffix, SUFFIXES)
    checks.require(path.is_file(), f"the file of weights {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            found = safetensors.numpy.load_file(path)
        else:
            found = _read_archive(path)
    except checks.UserError:
        raise
    except pickle.UnpicklingError as error:
        raise checks.UserError(
            f"{path} cannot be loaded safely: {error}. Save its state dictionary "
            "alone, torch.save(model.state_dict(), ...), or as .safetensors."
        ) from error
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise _unreadable(path, error) from error
    return _parameters(path, found)


def write(path: str | Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write a state dictionary as .safetensors, complete or not at all.

    PyTorch reads it with `safetensors.torch.load_file`.

    Raises:
        UserError: for another suffix, and a file that cannot be written.
    """
    path = Path(path)
    checks.require(
        path.suffix == ".safetensors",
        f"weights are written as .safetensors, but the output is {path}; PyTorch reads "
        "such a file with safetensors.torch.load_file.",
    )
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            safetensors.numpy.save_file(arrays, partial)
    except (OSError, SafetensorError) as error:
        raise checks.UserError(
            f"{path} cannot be written: {error}; choose another file or make room."
        ) from error


def _unreadable(path, error):
    reason = checks.one_line(error)
    return checks.UserError(
        f"{path} cannot be read as weights; it is damaged, or was written by PyTorch "
        f"before 1.6 ({reason}). Copy it again, or load and save it with a newer "
        "PyTorch."
    )


def _parameters(path, found):
    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    arrays = {}
    if isinstance(found, Mapping):
        arrays = {n: a for n, a in found.items() if isinstance(a, np.ndarray)}
    checks.require(
        bool(arrays),
        f"{path} holds no parameters, neither at its top nor under one of "
        f"{', '.join(NESTED)}.",
    )
    return arrays


def _read_archive(path):
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")
        order = folder + "byteorder"
        big = order in archive.namelist() and archive.read(order) == b"big"
        checks.require(
            not big, f"{path} was written on a big-endian machine; save it elsewhere."
        )
        reader = _Reader(io.BytesIO(archive.read(name)), archive, folder + "data/")
        return reader.load()


class _Reader(pickle.Unpickler):
    """Interprets PyTorch's pickle with a fixed list of names."""

    def __init__(self, file, archive, folder):
        super().__init__(file)
        self._archive, self._folder, self._storages = archive, folder, {}

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        raise pickle.UnpicklingError(
            f"it holds an object of {module}.{name}, which may run code when it is read"
        )

    def persistent_load(self, pid):
        _, dtype, key, _, count = pid
        if key not in self._storages:
            raw = self._archive.read(self._folder + str(key))
            self._storages[key] = np.frombuffer(raw, dtype, count)
        return self._storages[key]


def _tensor(storage, offset, shape, strides, *_):
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= storage.size or min(offset, *strides, 0) < 0:
        raise ValueError(f"a tensor of shape {tuple(shape)} ends beyond its storage")
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * storage.itemsize for s in strides]
    )
    return view  # no copy, which may be larger than the file by any factor
