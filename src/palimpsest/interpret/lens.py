"""The logit lens of decoder rows: which tokens a latent promotes and suppresses, in the base and in the tuned model.

Source: nostalgebraist, interpreting GPT: the logit lens (2020); read off decoder rows by Bloom, Lin, Understanding SAE
features with the logit lens (2024). See `docs/measures/meaning.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.interpret.subject import Subject
from palimpsest.log import progress
from palimpsest.models import LanguageModel, Side

TOP = 10
"""Tokens that are named at each end."""

LOGIT_BYTES = 64 << 20
"""Logits that exist at once."""

BESIDE = ("z", "value", "attn_in", "mlp_in", "mlp_pre", "mlp_act", "final_norm")
"""Sites that are no part of the residual stream, also where they are as wide: heads' outputs, what a norm left."""


@dataclass
class LensTable:
    """The tokens at the ends, by latent in the order asked for; ids and logits `[latents, top]`.

    Attributes:
        promoted: Of each model, the highest first.
        suppressed: Of each model, the lowest first.
        changed: Tokens whose logit differs most between the models, tuned - base, the largest difference first;
            None with one model.
    """

    promoted: dict[Side, tuple[Tensor, Tensor]] = field(default_factory=dict)
    suppressed: dict[Side, tuple[Tensor, Tensor]] = field(default_factory=dict)
    changed: tuple[Tensor, Tensor] | None = None


class Lens:
    """One model's way from a direction in its residual stream to logits, with the norm's division left out.

    Logits are centred over the vocabulary: a shift of all of them changes no prediction.

    Args:
        model: The model.
        vocab: Tokens that count: those of the tokenizer, without a head's padding rows.
    """

    def __init__(self, model: LanguageModel, vocab: int) -> None:
        self.vocab = min(vocab, head_rows(model))
        self.gain, self._centres = norm_gain(model)
        head = model.head.module
        self._multiplier = model.head.multiplier
        # No more of the model is kept than is needed: a pair that holds one at a time must be able to drop it.
        plain = type(head) is torch.nn.Linear
        self._weight = head.weight.detach()[: self.vocab].float() if plain else None
        self._wrapped = None if plain else model

    @torch.inference_mode()
    def logits(
        self, rows: Float[Tensor, "latents d_model"], vocab: int | None = None
    ) -> Float[Tensor, "latents vocab"]:
        """Logits of each direction at its own length, in float32; of the first `vocab` tokens where that is given."""
        rows = rows.to(self.gain.device, torch.float32)
        if self._centres:
            rows = rows - rows.mean(1, keepdim=True)
        rows = rows * self.gain
        if self._wrapped is None:
            assert self._weight is not None
            found = rows @ self._weight.T
        else:
            head, rows = self._wrapped.head.module, rows.to(self._wrapped.dtype)
            with self._wrapped.active():
                # A bias moves every direction's logits alike.
                found = (head(rows) - head(torch.zeros_like(rows[:1])))[:, : self.vocab].float()
        found = found[:, :vocab]
        found = found - found.mean(1, keepdim=True)
        return found if self._multiplier is None else found * self._multiplier


def head_rows(model: LanguageModel) -> int:
    """Rows of the unembedding."""
    weight = getattr(model.head.module, "weight", None)
    return int(weight.shape[0]) if weight is not None else int(model.text_config.vocab_size)


@torch.inference_mode()
def norm_gain(model: LanguageModel) -> tuple[Float[Tensor, " d_model"], bool]:
    """What the final norm multiplies each coordinate by after the division, and whether it takes the mean out.

    Asked of the norm itself, on a vector of mean 0 and size 1, since families store their weights differently (Gemma
    keeps w - 1).
    """
    norm, d_model = model.sites.final_norm, model.sites.d_model
    parameter = next(iter(norm.parameters()), None)
    device = model.device if parameter is None else parameter.device
    probe = torch.ones(d_model, device=device)
    probe[1::2] = -1
    if d_model % 2:
        probe[-3:] = torch.tensor([2.0, -1.0, -1.0], device=device)
    probe = probe / probe.square().mean().sqrt()
    with model.active():
        seen = [norm(one[None].to(model.dtype))[0].float() for one in (probe, -probe, probe + 1)]
    # The difference of both signs leaves the norm's bias out.
    gain = (seen[0] - seen[1]) / (2 * probe)
    centres = torch.allclose(seen[2], seen[0], rtol=0.05, atol=0.05 * float(gain.abs().mean()))
    return gain, centres


def can_read(subject: Subject) -> str | None:
    """Why the lens says nothing of this dictionary, or None where it does."""
    width, site = subject.model(subject.sides[0]).sites.d_model, subject.site
    if site.split(".")[0] in BESIDE and subject.dictionary.d_model == width:
        return f"No logit lens: {site} is no part of the residual stream, which the head reads."
    if subject.dictionary.d_model != width:
        return f"No logit lens: {subject.site} is {subject.dictionary.d_model} wide, the residual stream {width}."
    return None


def lens_table(subject: Subject, latents: Int[Tensor, " latents"], vocab: int, top: int = TOP) -> LensTable:
    """Read the decoder rows of some latents through each model's head.

    An SAE's row and a diff-SAE's go through both heads, a crosscoder's two rows each through its own model's.

    Args:
        subject: The dictionary and its models.
        latents: Which latents.
        vocab: Tokens that count, as many as the tokenizer has.
        top: How many tokens are named at each end.
    """
    rows = subject.dictionary.W_dec.detach()
    lenses: dict[Side, Lens] = {side: Lens(subject.model(side), vocab) for side in subject.sides}
    shared = min(lens.vocab for lens in lenses.values())
    top = min(top, shared)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with progress("logit lens", len(latents), unit="latents") as advance:
        for chosen in _pieces(latents, shared * len(lenses)):
            logits = {
                side: lens.logits(rows[chosen, place if rows.shape[1] > 1 else 0], shared)
                for place, (side, lens) in enumerate(lenses.items())
            }
            for side, one in logits.items():
                for name, largest in (("promoted", True), ("suppressed", False)):
                    values, ids = one.topk(top, largest=largest)
                    parts.setdefault(f"{name}/{side}", []).append((ids.cpu(), values.cpu()))
            if len(lenses) > 1:
                change = logits["tuned"].to(logits["base"].device) - logits["base"]
                ids = change.abs().topk(top).indices
                parts.setdefault("changed", []).append((ids.cpu(), change.gather(1, ids).cpu()))
            advance(len(chosen))
    joined = {
        name: (torch.cat([ids for ids, _ in found]), torch.cat([values for _, values in found]))
        for name, found in parts.items()
    }
    table = LensTable(changed=joined.get("changed"))
    for side in lenses:
        if f"promoted/{side}" in joined:
            table.promoted[side] = joined[f"promoted/{side}"]
            table.suppressed[side] = joined[f"suppressed/{side}"]
    return table


def _pieces(latents: Int[Tensor, " latents"], width: int) -> Iterator[Int[Tensor, " some"]]:
    yield from latents.split(max(16, LOGIT_BYTES // (4 * max(width, 1))))
