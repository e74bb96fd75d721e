"""PyTorch state dictionaries to parameters and back, exactly."""

from swinsmt_jax.convert.starting_point import load_what_fits, read_weights
from swinsmt_jax.convert.torch_state import load_torch, to_torch

__all__ = ["load_torch", "load_what_fits", "read_weights", "to_torch"]
