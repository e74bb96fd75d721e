"""Files that PyTorch itself wrote."""

import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.convert import files

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")


def test_a_checkpoint_of_pytorch_is_read_bit_by_bit(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.BatchNorm3d(3))
    weights = dict(network.state_dict())
    weights["view"] = weights["0.weight"].permute(4, 1, 0, 2, 3)[1:]
    weights["half"] = torch.randn(5).half()
    weights["brain"] = torch.randn(5).bfloat16()
    weights["parameter"] = torch.nn.Parameter(torch.randn(2))
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "a.pt")
    found = files.read(tmp_path / "a.pt")
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        exact = tensor.detach()
        exact = exact.float() if tensor.dtype == torch.bfloat16 else exact
        np.testing.assert_array_equal(found[name].astype(exact.numpy().dtype), exact)


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match="cannot be loaded safely: .*Linear"):
        files.read(tmp_path / "module.pt")


def test_files_before_1_6_are_told(tmp_path):
    torch.save(
        {"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    with pytest.raises(UserError, match="old.pth cannot be read.*before 1.6"):
        files.read(tmp_path / "old.pth")


def test_pytorch_reads_what_is_written(tmp_path):
    from safetensors.torch import load_file

    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    files.write(tmp_path / "w.safetensors", {"w": array})
    np.testing.assert_array_equal(load_file(tmp_path / "w.safetensors")["w"], array)
