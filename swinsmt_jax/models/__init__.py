"""The networks: one file or folder each, registered by name in `registry`."""

import importlib

_WHERE = dict.fromkeys(
    (
        *("Network", "abstract_model", "count_parameters", "create", "merge_buffers"),
        *("split", "split_buffers"),
    ),
    "swinsmt_jax.models.network",
)
__all__ = [*_WHERE]


def __getattr__(name: str):
    """Import flax only when a network is requested; the configs do not need it."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
