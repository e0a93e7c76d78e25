"""Fine-tuning through the latents of frozen dictionaries: the adapter, its training, what it did and why."""

from typing import TYPE_CHECKING

from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.tune.adapter import LatentConfig, LatentLayer, LatentTuner, answering, latent_layers
    from palimpsest.tune.config import TuneConfig
    from palimpsest.tune.run import run_tune

_HOMES = {
    "adapter": ("LatentConfig", "LatentLayer", "LatentTuner", "answering", "latent_layers"),
    "config": ("TuneConfig",),
    "run": ("run_tune",),
}

__all__ = [
    "LatentConfig",
    "LatentLayer",
    "LatentTuner",
    "TuneConfig",
    "answering",
    "latent_layers",
    "run_tune",
]

__getattr__ = lazy_names(__name__, {name: module for module, names in _HOMES.items() for name in names})
