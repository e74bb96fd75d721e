"""Weights in files: PyTorch's .pt and .pth, and .safetensors.

A .pt file is a zip archive with one pickle, which names storages, and the storages' raw
bytes. The pickle is read by an interpreter that knows tensors and dictionaries and
refuses everything else, so no code of a file is ever run.
"""

import collections
import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from swinsmt_jax import checks
from swinsmt_jax.runtime.files import absolute, replacing, writable

CLASSES = "classes"  # of the metadata of .safetensors
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
MAX_PICKLE = 2**23  # bytes; a network's names and shapes take less than one million
# What stands beside weights, such as the best score as a number of numpy's.
BESIDE = (
    *("numpy.core.multiarray.scalar", "numpy.dtype", "_codecs.encode"),
    "torch.device",
)
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
    return _parameters(path, read_document(path))


def read_document(path: str | Path) -> object:
    """Read all that a file of weights holds, such as a training script's dictionary.

    Raises:
        UserError: as `read`.
    """
    path = absolute(path)
    checks.one_of("the suffix of " + str(path), path.suffix, SUFFIXES)
    checks.require(path.is_file(), f"the file of weights {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        return _read_archive(path)
    except checks.UserError:
        raise
    except pickle.UnpicklingError as error:
        raise checks.UserError(
            f"{path} cannot be loaded safely: {error}. Save its state dictionary "
            "alone, torch.save(model.state_dict(), ...), or as .safetensors."
        ) from error
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise _unreadable(path, error) from error


def class_names(path: str | Path) -> tuple[str, ...]:
    """Return the names of label ids that `write` put into a file; () without them."""
    try:
        with safetensors.safe_open(absolute(path), "np") as file:
            return tuple(json.loads((file.metadata() or {})[CLASSES]))
    except (SafetensorError, KeyError, ValueError, TypeError):
        return ()


def write(
    path: str | Path, state_dict: Mapping[str, np.ndarray], *, names: Sequence[str] = ()
) -> None:
    """Write a state dictionary as .safetensors, complete or not at all.

    PyTorch reads it with `safetensors.torch.load_file`. Its header keeps `names`, of
    the label ids.

    Raises:
        UserError: for another suffix, and a file that cannot be written.
    """
    path = absolute(path)
    checks.require(
        path.suffix == ".safetensors",
        f"weights are written as .safetensors, but the output is {path}; PyTorch reads "
        "such a file with safetensors.torch.load_file.",
    )
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            about = {CLASSES: json.dumps(names)} if names else None
            safetensors.numpy.save_file(arrays, partial, about)
    except (OSError, SafetensorError) as error:
        raise checks.UserError(
            f"{path} cannot be written: {error}; choose another file or make room."
        ) from error


def write_document(path: str | Path, document: Mapping) -> None:
    """Write a dictionary as `torch.load` reads it, complete or not at all.

    Args:
        path: of the file, .pt or .pth.
        document: of strings, numbers, None, lists, tuples, dictionaries and arrays;
            one array under several names is stored once.

    Raises:
        UserError: for a file that cannot be written.
    """
    path, storages = absolute(path), dict[str, Any]()
    pickled = b"\x80\x02" + b"".join(_pickled(document, storages)) + b"."
    with writable(path), replacing(path) as partial:
        with zipfile.ZipFile(partial, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/byteorder", "little")
            for number, array in storages.values():
                data = np.ascontiguousarray(array).data
                archive.writestr(f"archive/data/{number}", data)
            archive.writestr("archive/version", "3\n")


def _pickled(value, storages):
    """Yield the pickle of a value; tensors are rebuilt by PyTorch from storages."""
    if value is None or isinstance(value, bool):
        yield {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int):
        yield b"J" + struct.pack("<i", value)
    elif isinstance(value, float):
        yield b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode()
        yield b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(value, Mapping):
        items = (part for item in value.items() for part in item)
        yield b"}(" + b"".join(b"".join(_pickled(i, storages)) for i in items) + b"u"
    elif isinstance(value, list | tuple):
        first, last = (b"(", b"t") if isinstance(value, tuple) else (b"](", b"e")
        yield first + b"".join(b"".join(_pickled(i, storages)) for i in value) + last
    else:
        number, _ = storages.setdefault(id(value), (len(storages), value))
        kind = next(k for k, dtype in STORAGES.items() if dtype == value.dtype)
        strides = tuple(
            s // value.itemsize for s in np.ascontiguousarray(value).strides
        )
        yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
        yield from _pickled("storage", storages)
        yield f"ctorch\n{kind}\n".encode()
        for part in (str(number), "cpu", value.size):
            yield from _pickled(part, storages)
        yield b"tQ"  # names the storage
        for part in (0, value.shape, strides, False):
            yield from _pickled(part, storages)
        yield b"ccollections\nOrderedDict\n)RtR"  # hooks, of which there are none


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
        checks.require(
            archive.getinfo(name).file_size <= MAX_PICKLE,
            f"{path} describes its tensors in more than {MAX_PICKLE / 1e6:.0f} MB.",
        )
        content = archive.read(name)
        _require_small_places(content)
        return _Reader(io.BytesIO(content), archive, folder + "data/").load()


def _require_small_places(content):
    """Raise `ValueError` for places of objects that would take absurd memory."""
    for opcode, place, _ in pickletools.genops(content):
        if "PUT" in opcode.name and place > len(content):
            raise ValueError(f"an object is remembered at place {place}")


class _Ignored:
    """Replaces objects beside the weights, and does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


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
            return _Kind(name)
        if (module, name) == ("torch", "Size"):
            return tuple
        if f"{module.replace('._core', '.core')}.{name}" in BESIDE:
            return _Ignored
        raise pickle.UnpicklingError(
            f"it holds an object of {module}.{name}, which may run code when it is read"
        )

    def persistent_load(self, pid):
        _, kind, key, _, count = pid
        if type(kind) is not _Kind or type(key) is not str:
            raise ValueError("a storage is named in an unknown way")
        _require_sizes(count)
        if key not in self._storages:
            dtype = np.dtype(STORAGES[kind.name])
            member = self._archive.getinfo(self._folder + key)
            stored = member.compress_type == zipfile.ZIP_STORED
            if not stored or member.file_size < count * dtype.itemsize:
                raise ValueError(f"the storage {key} is compressed, or too short")
            raw = self._archive.read(member)
            self._storages[key] = np.frombuffer(raw, dtype, count)
        return self._storages[key]


class _Kind(NamedTuple):
    """A type of storages; nothing that a pickle could call."""

    name: str


def _require_sizes(*numbers):
    """Raise `ValueError` unless all are plain ints, no others that count in a way."""
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"{numbers!r:.100} are not sizes")


def _tensor(storage, offset, shape, strides, *_):
    if type(storage) is not np.ndarray or {type(shape), type(strides)} != {tuple}:
        raise ValueError("a tensor is described in an unknown way")
    _require_sizes(offset, *shape, *strides)
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= storage.size:
        raise ValueError(f"a tensor of shape {tuple(shape)} ends beyond its storage")
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * storage.itemsize for s in strides]
    )
    return view  # no copy, which may be larger than the file by any factor
