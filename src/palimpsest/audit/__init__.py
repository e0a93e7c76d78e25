"""The audit: which domains a fine-tune changed, how much, and in which latents.

`overlap` compares top-k lists, `sums` folds a stream of paired tokens, `estimate` makes intervals,
`latent_table` and `results` write findings, `run` is the stage. Importing this package costs no torch.
"""

from typing import TYPE_CHECKING

from palimpsest.audit.config import AuditConfig
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.audit.run import run_audit

__all__ = ["AuditConfig", "run_audit"]

__getattr__ = lazy_names(__name__, {"run_audit": "run"})
