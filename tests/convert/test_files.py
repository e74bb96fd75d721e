import io
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.convert import files


class Tensor:
    """Pickles as PyTorch's tensors do: a view of a storage in the archive."""

    def __init__(self, storage, offset, shape, strides):
        self.arguments = storage, offset, shape, strides, False, {}

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array


@pytest.fixture
def save(monkeypatch):
    """Write a .pt file in PyTorch's format, without PyTorch."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name, dtype in files.STORAGES.items():
        storage = type(name, (), {"__module__": "torch", "dtype": np.dtype(dtype)})
        setattr(torch, name, storage)

    def rebuild(*_):
        raise AssertionError("only its name is used")

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            name = next(
                n for n, d in files.STORAGES.items() if np.dtype(d) == value.array.dtype
            )
            kind = getattr(torch, name)
            return "storage", kind, value.key, "cpu", value.array.size

    def write(path, content, storages=(), protocol=2):
        file = io.BytesIO()
        Pickler(file, protocol).dump(content)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", file.getvalue())
            archive.writestr("archive/byteorder", "little")
            for storage in storages:
                archive.writestr(f"archive/data/{storage.key}", storage.array.tobytes())
        return path

    return write


def test_tensors_come_back_with_their_strides(tmp_path, save):
    numbers = Storage("0", np.arange(24, dtype=np.float32))
    counts = Storage("1", np.array([7], np.int64))
    content = {
        "whole": Tensor(numbers, 0, (2, 3, 4), (12, 4, 1)),
        "transposed part": Tensor(numbers, 1, (3, 2), (4, 12)),
        "scalar": Tensor(counts, 0, (), ()),
        "empty": Tensor(numbers, 24, (0, 4), (4, 1)),
    }
    found = files.read(save(tmp_path / "a.pt", content, [numbers, counts]))
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(found["whole"], whole)
    np.testing.assert_array_equal(found["transposed part"], whole[:, :, 1].T)
    assert found["scalar"] == 7 and found["empty"].shape == (0, 4)


def test_parameters_are_found_inside_a_training_checkpoint(tmp_path, save):
    numbers = Storage("0", np.ones(3, np.float32))
    content = {
        "epoch": 3,
        "state_dict": {"w": Tensor(numbers, 0, (3,), (1,))},
        "optimizer": {"lr": 0.1},
    }
    found = files.read(save(tmp_path / "a.pth", content, [numbers]))
    assert list(found) == ["w"] and found["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_numpy_beside_the_weights_are_passed_over(tmp_path, save, protocol):
    numbers = Storage("0", np.ones(3, np.float32))
    content = {
        "best_acc": np.float32(0.7),
        "network_weights": {"w": Tensor(numbers, 0, (3,), (1,))},
        "logging": {"mean_fg_dice": [np.float64(0.1), np.int64(3)]},
    }
    path = save(tmp_path / "a.pth", content, [numbers], protocol=protocol)
    assert {n: a.tolist() for n, a in files.read(path).items()} == {"w": [1, 1, 1]}


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_code_in_a_file_is_not_run(tmp_path, save, capsys):
    path = save(tmp_path / "a.pt", {"w": Evil()})
    with pytest.raises(UserError, match="cannot be loaded safely.*builtin.*print"):
        files.read(path)
    assert capsys.readouterr().out == ""


def test_a_tensor_beyond_its_storage_is_refused(tmp_path, save):
    numbers = Storage("0", np.ones(3, np.float32))
    content = {"w": Tensor(numbers, 0, (4,), (1,))}
    with pytest.raises(UserError, match="a.pt cannot be read.*beyond its storage"):
        files.read(save(tmp_path / "a.pt", content, [numbers]))


def test_a_tensor_takes_no_more_memory_than_its_storage(tmp_path, save):
    number = Storage("0", np.ones(1, np.float32))
    content = {"w": Tensor(number, 0, (10**12,), (0,))}
    found = files.read(save(tmp_path / "a.pt", content, [number]))
    assert found["w"].shape == (10**12,)


@pytest.mark.parametrize(
    "offset, value, words",
    [(8, 1, "encrypted"), (10, 99, "compression"), (10, 8, "decompressing")],
)
def test_a_damaged_archive_is_refused(tmp_path, save, offset, value, words):
    number = Storage("0", np.ones(1, np.float32))
    path = save(tmp_path / "a.pt", {"w": Tensor(number, 0, (1,), (1,))}, [number])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = value  # of data.pkl
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.pt cannot be read as weights.*{words}"):
        files.read(path)


@pytest.mark.parametrize("damage", [b"\x80\x02h\xff.", b"\x80\x02U", b"", b"\x80\x7f."])
def test_a_damaged_pickle_is_refused(tmp_path, damage):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", damage)
    with pytest.raises(UserError, match=r"a.pt cannot be (read|loaded)"):
        files.read(tmp_path / "a.pt")


def test_safetensors_come_back_bit_by_bit(tmp_path, rng):
    numbers = rng.random((2, 3), np.float32)
    arrays = {
        "turned": numbers.T,
        "part": numbers[:, ::-2],
        "scalar": numbers[1, 1:2][0],
    }
    arrays |= {"repeated": np.broadcast_to(numbers[0], (4, 3)), "b": np.arange(3)}
    files.write(tmp_path / "new" / "w.safetensors", arrays)
    found = files.read(tmp_path / "new" / "w.safetensors")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_what_is_no_file_of_weights_is_told(tmp_path, save):
    for name in ("half.pt", "half.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 half a file")
        with pytest.raises(UserError, match=f"{name} cannot be read as weights"):
            files.read(tmp_path / name)
    with pytest.raises(UserError, match="none.pt does not exist"):
        files.read(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"suffix of .*a.onnx is '.onnx', but must be"):
        files.read(tmp_path / "a.onnx")
    with pytest.raises(UserError, match="holds no parameters"):
        files.read(save(tmp_path / "a.pt", {"epoch": 3}))
    files.write(tmp_path / "empty.safetensors", {})
    with pytest.raises(UserError, match="empty.safetensors holds no parameters"):
        files.read(tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="written as .safetensors, but .*a.pt"):
        files.write(tmp_path / "a.pt", {})


class Call:
    """Pickles as a call of a type of storages, which makes no number of it."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def __reduce__(self):
        return getattr(sys.modules["torch"], self.name), (self.value,)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (Call("CharStorage", 1),)},
        {"strides": (Call("IntStorage", 1),)},
        {"offset": Call("LongStorage", 0)},
        {"shape": (True,)},
        {"shape": (1.0,)},
        {"strides": [1]},
        {"strides": (-1,)},
        {"offset": -1},
        {"offset": 2**64},
        {"shape": (2,)},
    ],
)
def test_sizes_are_plain_numbers_within_the_storage(tmp_path, save, change):
    number = Storage("0", np.ones(1, np.float32))
    given = {"offset": 0, "shape": (1,), "strides": (1,)} | change
    content = {"w": Tensor(number, given["offset"], given["shape"], given["strides"])}
    with pytest.raises(UserError, match=r"a.pt cannot be"):
        files.read(save(tmp_path / "a.pt", content, [number]))


@pytest.mark.parametrize("size, compression", [(3, 0), (4, zipfile.ZIP_DEFLATED)])
def test_storages_are_uncompressed_and_as_long_as_they_say(
    tmp_path, save, size, compression
):
    number = Storage("0", np.ones(1, np.float32))
    path = save(tmp_path / "a.pt", {"w": Tensor(number, 0, (1,), (1,))})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(size), compress_type=compression)
    with pytest.raises(UserError, match="storage 0 is compressed, or too short"):
        files.read(path)


def test_a_pickle_gets_no_memory_for_a_place_that_it_names(tmp_path):
    place = (10**6).to_bytes(4, "little")  # of 16 bytes each
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}r" + place + b".")
    with pytest.raises(UserError, match="an object is remembered at place 1000000"):
        files.read(tmp_path / "x.pt")
