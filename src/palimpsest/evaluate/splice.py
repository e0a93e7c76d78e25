"""Forward passes with another content at a site, and what that does to every prediction."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.models import LanguageModel, capture, replace
from palimpsest.models.capture import HEAD_INPUT
from palimpsest.models.sites import Head

LOGIT_BYTES = 32 << 20
"""Logits of all variants that exist at once."""


class Predictions(NamedTuple):
    """Nats per token of a model as it is and of its variants.

    Attributes:
        ce: Cross-entropy, the original's first.
        kl: KL(original ‖ variant) of the prediction.
    """

    ce: Float[Tensor, "tokens one_and_variants"]
    kl: Float[Tensor, "tokens variants"]


@torch.inference_mode()
def head_input_with(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch seq"],
    site: str,
    places: Int[Tensor, " tokens"],
    rows: Float[Tensor, "tokens d_model"],
) -> Float[Tensor, "batch seq d_head"]:
    """What the head reads when `rows` stand at flat `places` of a site; all other tokens pass through."""

    def edit(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        new = rows.to(hidden.device, hidden.dtype)
        return flat.index_copy(0, places.to(hidden.device), new).view(hidden.shape)

    ids = input_ids.to(model.device)
    with (
        model.active(),
        replace(model.sites, site, edit),
        capture(model.sites, [], head=True) as found,
    ):
        model.model(input_ids=ids, use_cache=False)
    return found[HEAD_INPUT]


@torch.inference_mode()
def predictions(
    head: Head,
    original: Float[Tensor, "tokens d_head"],
    variants: Sequence[Float[Tensor, "tokens d_head"]],
    ids: Int[Tensor, " tokens"],
) -> Predictions:
    """CE of each token and KL of each prediction, chunk by chunk; no logits of a whole batch exist.

    Args:
        head: Of the model that all head inputs come from.
        original: The head's input before each token, of the model as it is.
        variants: The same of the model with something else at the site.
        ids: The tokens that are predicted.
    """
    weight = getattr(head.module, "weight", None)
    device = original.device if weight is None else weight.device
    ids = ids.to(device)
    ce = torch.empty(len(ids), 1 + len(variants), device=device)
    kl = torch.empty(len(ids), len(variants), device=device)
    for start in range(0, len(ids), _chunk(weight, 1 + len(variants))):
        rows = slice(start, start + _chunk(weight, 1 + len(variants)))
        target = ids[rows, None]
        log_p = head.logits(original[rows].to(device)).log_softmax(-1)
        ce[rows, 0] = -log_p.gather(1, target)[:, 0]
        p = log_p.exp()
        for index, variant in enumerate(variants):
            log_q = head.logits(variant[rows].to(device)).log_softmax(-1)
            ce[rows, index + 1] = -log_q.gather(1, target)[:, 0]
            # Tokens that both rule out have log-probabilities of -inf and weigh nothing.
            kl[rows, index] = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return Predictions(ce, kl)


def _chunk(weight: Tensor | None, variants: int) -> int:
    return 256 if weight is None else max(64, LOGIT_BYTES // (4 * weight.shape[0] * variants))
