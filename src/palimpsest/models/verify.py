"""Invariants that certify a site map on the loaded model itself, in two short forward passes."""

import torch

from palimpsest.errors import NumericsError, SiteError
from palimpsest.models.capture import HEAD_INPUT, capture
from palimpsest.models.pair import LanguageModel

PROBE_TOKENS = 8


@torch.inference_mode()
def verify_sites(model: LanguageModel) -> None:
    """Check `resid_post[l] == resid_pre[l + 1]`, and that norm and head turn the last one into the logits.

    Raises:
        SiteError: When an invariant fails, that is when the addresses of this architecture cannot be trusted.
        NumericsError: When the model's logits are not finite.
    """
    sites = model.sites
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % max(model.text_config.vocab_size, 1)
    chain = _residual_chain(model)
    last = f"resid_post.{sites.n_layers - 1}"
    with model.active():
        with capture(sites, chain, head=True, stop=False) as found:
            logits = model.model(input_ids=ids, use_cache=False).logits
        # First, because NaN differs from itself in every comparison below.
        if not torch.isfinite(logits).all():
            raise NumericsError(
                f"{model.name} gives logits that are not finite",
                found="NaN or infinity on a short probe",
                fix="Check the checkpoint, or load it in float32 or bfloat16 instead of float16",
            )
        for layer in range(sites.n_layers - 1):
            after, before = f"resid_post.{layer}", f"resid_pre.{layer + 1}"
            if after in found and before in found and not _equal(found[after], found[before]):
                raise SiteError(
                    f"The sites of {model.name} cannot be trusted",
                    expected=f"{after} to be what enters layer {layer + 1}",
                    found="different tensors",
                    fix="Report the architecture; a raw module path (path.…) still works",
                )
        head_input = found[HEAD_INPUT]
        rebuilt = sites.head.logits(head_input.flatten(0, 1)).view(logits.shape)
        normed = sites.final_norm(found[last]) if last in found else head_input
    if not close(rebuilt, logits.float()) or not close(normed, head_input):
        raise SiteError(
            f"The head of {model.name} cannot be trusted",
            expected="final norm and head to turn the last residual into the model's logits",
            found="other values",
            fix="Report the architecture; `--no-loss` audits still need no head, but this model's sites are unsure",
        )


def _residual_chain(model: LanguageModel) -> list[str]:
    chain = []
    for layer in range(model.sites.n_layers):
        for point in ("resid_pre", "resid_post"):
            site = f"{point}.{layer}"
            try:
                model.sites.tap(site)
            except SiteError:
                continue
            chain.append(site)
    return chain


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.device))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of the narrower type, relative to the largest value."""
    tolerance = 1e-4 if min(a.dtype.itemsize, b.dtype.itemsize) >= 4 else 3e-2
    a, b = a.float(), b.to(a.device).float()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6))
