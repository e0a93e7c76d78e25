"""How well a dictionary reconstructs, and what its reconstruction does to the model: FVE, L0, dead, CE and KL."""

from typing import TYPE_CHECKING

from palimpsest.evaluate.config import EvaluateConfig
from palimpsest.evaluate.result import Density, Evaluation, ModelEvaluation, Splice
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.evaluate.measure import evaluate_dictionary
    from palimpsest.evaluate.run import run_evaluate
    from palimpsest.evaluate.text import evaluation_batches

__all__ = [
    "Density",
    "EvaluateConfig",
    "Evaluation",
    "ModelEvaluation",
    "Splice",
    "evaluate_dictionary",
    "evaluation_batches",
    "run_evaluate",
]

__getattr__ = lazy_names(
    __name__, {"evaluate_dictionary": "measure", "run_evaluate": "run", "evaluation_batches": "text"}
)
