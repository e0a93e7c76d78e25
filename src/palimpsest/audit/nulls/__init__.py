"""Innocent fine-tunes of a base, which say how far any fine-tune of that size moves each corpus.

`recipes` decides what to train, `training` trains one null in place and takes it back, `suspect` reads random changes
with the suspect's own singular values (`palimpsest.models.spectrum`). Importing this package costs no torch.
"""

from typing import TYPE_CHECKING

from palimpsest.audit.nulls.recipes import NullRecipe, make_recipes
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.audit.nulls.training import NullOutcome, trained_null

__all__ = [
    "NullOutcome",
    "NullRecipe",
    "make_recipes",
    "trained_null",
]

__getattr__ = lazy_names(
    __name__,
    {
        "NullOutcome": "training",
        "trained_null": "training",
    },
)
