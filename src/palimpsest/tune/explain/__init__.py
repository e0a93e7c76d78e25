"""What an adapter changed, latent by latent: rankings, causes, the fewest latents that suffice, and controls."""

from typing import TYPE_CHECKING

from palimpsest.lazy import lazy_names
from palimpsest.tune.explain.result import AdapterComparison, Explanation
from palimpsest.tune.explain_config import ExplainCompareConfig, ExplainConfig

if TYPE_CHECKING:
    from palimpsest.tune.explain.causal import latents_needed
    from palimpsest.tune.explain.compare import compare_adapters, read_comparison
    from palimpsest.tune.explain.run import read_explanation, run_explain

__all__ = [
    "AdapterComparison",
    "ExplainCompareConfig",
    "ExplainConfig",
    "Explanation",
    "compare_adapters",
    "latents_needed",
    "read_comparison",
    "read_explanation",
    "run_explain",
]

__getattr__ = lazy_names(
    __name__,
    {
        "compare_adapters": "compare",
        "latents_needed": "causal",
        "read_comparison": "compare",
        "read_explanation": "run",
        "run_explain": "run",
    },
)
