"""Fine-tuning through the latents of frozen dictionaries: the adapter, its training, what it did and why."""

from typing import TYPE_CHECKING

from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.tune.adapter import LatentConfig, LatentLayer, LatentTuner, answering, latent_layers
    from palimpsest.tune.config import TuneConfig
    from palimpsest.tune.explain import compare_adapters, run_explain
    from palimpsest.tune.explain_config import ExplainCompareConfig, ExplainConfig
    from palimpsest.tune.export import export_adapter
    from palimpsest.tune.run import run_tune

_HOMES = {
    "adapter": ("LatentConfig", "LatentLayer", "LatentTuner", "answering", "latent_layers"),
    "config": ("TuneConfig",),
    "explain": ("compare_adapters", "run_explain"),
    "explain_config": ("ExplainCompareConfig", "ExplainConfig"),
    "export": ("export_adapter",),
    "run": ("run_tune",),
}

__all__ = [
    "ExplainCompareConfig",
    "ExplainConfig",
    "LatentConfig",
    "LatentLayer",
    "LatentTuner",
    "TuneConfig",
    "answering",
    "compare_adapters",
    "export_adapter",
    "latent_layers",
    "run_explain",
    "run_tune",
]

__getattr__ = lazy_names(__name__, {name: module for module, names in _HOMES.items() for name in names})
