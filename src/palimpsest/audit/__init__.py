"""The audit: which domains a fine-tune changed, how much, and in which latents.

`overlap` compares top-k lists, `sums` folds a stream of paired tokens, `estimate` makes intervals,
`latent_table` and `results` write findings, `run` is the stage. Importing this package costs no torch.
"""

from typing import TYPE_CHECKING, Any

from palimpsest.audit.config import AuditConfig

if TYPE_CHECKING:
    from palimpsest.audit.run import run_audit

__all__ = ["AuditConfig", "run_audit"]


def __getattr__(name: str) -> Any:
    if name == "run_audit":
        from palimpsest.audit.run import run_audit

        return run_audit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
