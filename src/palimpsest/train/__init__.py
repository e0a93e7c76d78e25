"""Training a dictionary on a model's activations, streamed from the model or read from a store."""

from typing import TYPE_CHECKING, Any

from palimpsest.train.config import TrainSaeConfig

if TYPE_CHECKING:
    from palimpsest.train.run import train_sae

__all__ = ["TrainSaeConfig", "train_sae"]


def __getattr__(name: str) -> Any:
    if name == "train_sae":
        from palimpsest.train.run import train_sae

        return train_sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
