"""PyTorch state dictionaries to parameters and back, exactly."""

from swinsmt_jax.convert.torch_state import load_torch, to_torch

__all__ = ["load_torch", "to_torch"]
