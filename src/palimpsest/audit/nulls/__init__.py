"""Innocent fine-tunes of a base, which say how far any fine-tune of that size moves each corpus.

`recipes` decides what to train, `training` trains one null in place and takes it back, `spectrum` draws random
changes with the suspect's own singular values. Importing this package costs no torch.
"""

from typing import TYPE_CHECKING

from palimpsest.audit.nulls.recipes import NullRecipe, make_recipes
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.audit.nulls.spectrum import SpectrumNull, base_deltas, bisect_alpha
    from palimpsest.audit.nulls.training import NullOutcome, trained_null

__all__ = [
    "NullOutcome",
    "NullRecipe",
    "SpectrumNull",
    "base_deltas",
    "bisect_alpha",
    "make_recipes",
    "trained_null",
]

__getattr__ = lazy_names(
    __name__,
    {
        "NullOutcome": "training",
        "SpectrumNull": "spectrum",
        "base_deltas": "spectrum",
        "bisect_alpha": "spectrum",
        "trained_null": "training",
    },
)
