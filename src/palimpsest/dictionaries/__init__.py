"""Sparse dictionaries: one class, its sparse codes, training, and the formats on disk.

Names are loaded on first use, so that `TrainConfig` can be read without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.dictionaries.codes import Codes, TopList
    from palimpsest.dictionaries.config import Objective, Partition, TrainConfig
    from palimpsest.dictionaries.dictionary import Dictionary
    from palimpsest.dictionaries.formats import load_dictionary
    from palimpsest.dictionaries.saelens import save_saelens
    from palimpsest.dictionaries.training.loop import (
        checkpoint_position,
        train_dictionaries,
        train_dictionary,
    )

__all__ = [
    "Codes",
    "Dictionary",
    "Objective",
    "Partition",
    "TopList",
    "TrainConfig",
    "checkpoint_position",
    "load_dictionary",
    "save_saelens",
    "train_dictionaries",
    "train_dictionary",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Codes": "codes",
        "TopList": "codes",
        "Dictionary": "dictionary",
        "Objective": "config",
        "Partition": "config",
        "TrainConfig": "config",
        "checkpoint_position": "training.loop",
        "train_dictionaries": "training.loop",
        "train_dictionary": "training.loop",
        "load_dictionary": "formats",
        "save_saelens": "saelens",
    },
)
