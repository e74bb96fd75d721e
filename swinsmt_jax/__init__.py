"""Swin SMT in JAX: Swin UNETR with Soft Mixture-of-Experts for whole-body CT."""

import importlib

__version__ = "0.1.0"

_WHERE = {
    "Segmenter": "swinsmt_jax.inference.segmenter",
    "SwinSMTConfig": "swinsmt_jax.models.swin",
    "SwinUNETRConfig": "swinsmt_jax.models.swin",
    "create": "swinsmt_jax.models",
    "load": "swinsmt_jax.inference.segmenter",
    "load_nnunet": "swinsmt_jax.inference.nnunet",
    "load_totalsegmentator": "swinsmt_jax.inference.totalsegmentator",
    "save": "swinsmt_jax.inference.segmenter",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    """Import only the requested name: a model needs no plotting library."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
