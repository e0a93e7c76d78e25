"""Sparse dictionaries: one class, its sparse codes, training, and the formats on disk.

Names are loaded on first use, so that `TrainConfig` can be read without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palimpsest.dictionaries.codes import Codes, TopList
    from palimpsest.dictionaries.config import TrainConfig
    from palimpsest.dictionaries.dictionary import Dictionary
    from palimpsest.dictionaries.formats import load_dictionary
    from palimpsest.dictionaries.saelens import save_saelens
    from palimpsest.dictionaries.train import checkpoint_position, train_dictionary

__all__ = [
    "Codes",
    "Dictionary",
    "TopList",
    "TrainConfig",
    "checkpoint_position",
    "load_dictionary",
    "save_saelens",
    "train_dictionary",
]

_HOMES = {
    "Codes": "codes",
    "TopList": "codes",
    "Dictionary": "dictionary",
    "TrainConfig": "config",
    "checkpoint_position": "train",
    "train_dictionary": "train",
    "load_dictionary": "formats",
    "save_saelens": "saelens",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
