"""Training a dictionary on a model's activations, streamed from the model or read from a store."""

from typing import TYPE_CHECKING

from palimpsest.lazy import lazy_names
from palimpsest.train.config import TrainSaeConfig

if TYPE_CHECKING:
    from palimpsest.train.run import train_sae

__all__ = ["TrainSaeConfig", "train_sae"]

__getattr__ = lazy_names(__name__, {"train_sae": "run"})
