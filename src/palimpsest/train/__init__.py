"""Training dictionaries on activations of a model or a pair, streamed from the models or read from a store."""

from typing import TYPE_CHECKING

from palimpsest.lazy import lazy_names
from palimpsest.train.config import TrainingOptions, TrainPairConfig, TrainSaeConfig

if TYPE_CHECKING:
    from palimpsest.train.run import train_pair, train_sae, train_variants

__all__ = [
    "TrainPairConfig",
    "TrainSaeConfig",
    "TrainingOptions",
    "train_pair",
    "train_sae",
    "train_variants",
]

__getattr__ = lazy_names(__name__, {"train_pair": "run", "train_sae": "run", "train_variants": "run"})
