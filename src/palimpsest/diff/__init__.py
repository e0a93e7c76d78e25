"""Which latents a fine-tune made, measured for all of them, and whether they cause the change."""

from typing import TYPE_CHECKING

from palimpsest.diff.config import AttributionOptions, ClassOptions, DiffConfig, PatchOptions
from palimpsest.diff.null_config import NullConfig
from palimpsest.diff.result import Attributed, Behaviour, Diff, Patching, PatchRow
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.diff.compare import Comparison, compare_runs
    from palimpsest.diff.compare_config import CompareConfig
    from palimpsest.diff.methods import Method
    from palimpsest.diff.null_model import make_null
    from palimpsest.diff.run import read_diff, run_diff

__all__ = [
    "Attributed",
    "AttributionOptions",
    "Behaviour",
    "ClassOptions",
    "CompareConfig",
    "Comparison",
    "Diff",
    "DiffConfig",
    "Method",
    "NullConfig",
    "PatchOptions",
    "PatchRow",
    "Patching",
    "compare_runs",
    "make_null",
    "read_diff",
    "run_diff",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Comparison": "compare",
        "CompareConfig": "compare_config",
        "Method": "methods",
        "compare_runs": "compare",
        "make_null": "null_model",
        "read_diff": "run",
        "run_diff": "run",
    },
)
