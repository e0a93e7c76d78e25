"""Pair × corpus × sites → a stream of paired activations, with losses from the same forward passes.

One batch is in memory at a time. With `one_at_a_time` pairs the base's readings of every batch are spooled to
disk first, then the tuned model runs; consumers see the same stream either way.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.artifacts import disk
from palimpsest.corpus import TokenBatch
from palimpsest.dictionaries import Codes
from palimpsest.errors import NumericsError, PairError
from palimpsest.models import LanguageModel, ModelPair, Reading, Side
from palimpsest.models.sites import Head

LOGIT_BYTES = 16 << 20
"""Logits that exist at once while losses are computed."""


class BaseCodes(NamedTuple):
    """What one dictionary gave on a base that was read earlier: codes and ‖h - ĥ‖² of each token."""

    codes: Codes
    residual: Float[Tensor, " tokens"]


@dataclass(frozen=True)
class PairedTokens:
    """The measured tokens of one batch as both models saw them.

    Attributes:
        acts: `[tokens, models, d_model]` by site; models are base, tuned, or tuned alone where `base_codes`
            stand for a base whose activations were not kept.
        document: Index of each token's document; a document never spans two batches.
        position: Place of each token in its document.
        token_ids: The tokens themselves.
        context: The whole padded batch, for the text around a token (`row` indexes it).
        row: Row of `context` that each token is in.
        loss: Nats of each token given what precedes it, of base and tuned `[tokens, 2]`; NaN for a first token.
        kl: KL(tuned ‖ base) of the prediction of each token, in nats.
        base_codes: The base's cached codes by the name of their reader; empty when the base ran just now.
    """

    acts: dict[str, Float[Tensor, "tokens models d_model"]]
    document: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    token_ids: Int[Tensor, " tokens"]
    context: TokenBatch
    row: Int[Tensor, " tokens"]
    loss: Float[Tensor, "tokens 2"] | None = None
    kl: Float[Tensor, " tokens"] | None = None
    base_codes: dict[str, BaseCodes] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens are measured."""
        return self.position.shape[0]


class _SideTokens:
    """One model's share of a batch: activations and head inputs of the kept tokens only."""

    def __init__(
        self, reading: Reading, kept: Int[Tensor, " tokens"], before: Int[Tensor, " tokens"]
    ) -> None:
        self.acts = {site: kept_rows(hidden, kept) for site, hidden in reading.acts.items()}
        self.head_input = None if reading.head_input is None else kept_rows(reading.head_input, before)


class Harvester:
    """Streams paired activations of several corpora at several sites.

    Args:
        pair: The two models.
        sites: Addresses to read; an empty list reads losses only.
        loss: Run the whole model and measure each token's loss; without it the forward stops at the deepest site.
        kl: Also measure KL(tuned ‖ base) of each prediction.
        spool: Folder for the base's readings of a `one_at_a_time` pair.

    Raises:
        PairError: A `one_at_a_time` pair without a spool folder.
    """

    def __init__(
        self,
        pair: ModelPair,
        sites: Sequence[str],
        *,
        loss: bool = True,
        kl: bool = False,
        spool: Path | None = None,
    ) -> None:
        if pair.one_at_a_time and spool is None:
            raise PairError("A pair that holds one model at a time needs a folder for the base's readings")
        self.pair, self.sites, self.loss, self.kl, self._spool = pair, list(sites), loss, kl, spool
        self._heads: dict[Side, Head] = {}

    def record(self, name: str, batches: Iterable[TokenBatch]) -> Iterator[int]:
        """Run the base of a `one_at_a_time` pair over a corpus and spool its readings; yields token counts.

        Call it for every corpus before the first `stream`, so that each model is loaded once.
        """
        folder = self._folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        for index, batch in enumerate(batches):
            kept, before = kept_places(batch)
            side = self._read("base", batch, kept, before)
            tensors = {f"acts.{site}": acts for site, acts in side.acts.items()}
            if side.head_input is not None:
                tensors["head_input"] = side.head_input
            with disk.replacing(folder / f"{index:06d}.safetensors") as temporary:
                save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary)
            yield len(kept)

    def stream(self, name: str, batches: Iterable[TokenBatch]) -> Iterator[PairedTokens]:
        """Yield the measured tokens of each batch; batches without any are left out.

        Raises:
            NumericsError: A model gives NaN or infinity; names the model, site and document.
        """
        for index, batch in enumerate(batches):
            kept, before = kept_places(batch)
            if len(kept) == 0:
                continue
            base = (
                self._spooled(name, index)
                if self.pair.one_at_a_time
                else self._read("base", batch, kept, before)
            )
            tuned = self._read("tuned", batch, kept, before)
            yield self._paired(batch, kept, base, tuned)

    @torch.inference_mode()
    def _read(self, side: Side, batch: TokenBatch, kept: Tensor, before: Tensor) -> _SideTokens:
        model = self.pair.side(side)
        self._heads[side] = model.head
        reading = model.read(batch.input_ids, self.sites, head=self.loss or self.kl)
        tokens = _SideTokens(reading, kept, before)
        for site, acts in tokens.acts.items():
            check_finite(acts, f"{side} model", site, batch, kept)
        if tokens.head_input is not None:
            check_finite(tokens.head_input, f"{side} model", "its head", batch, before)
        return tokens

    @torch.inference_mode()
    def _paired(self, batch: TokenBatch, kept: Tensor, base: _SideTokens, tuned: _SideTokens) -> PairedTokens:
        seq = batch.input_ids.shape[1]
        ids, document = (field.reshape(-1)[kept] for field in (batch.input_ids, batch.document))
        acts = {
            site: torch.stack([base.acts[site].to(tuned.acts[site].device), tuned.acts[site]], 1)
            for site in self.sites
        }
        loss, kl = (None, None) if base.head_input is None else self._losses(base, tuned, ids, kept % seq > 0)
        return PairedTokens(acts, document, kept % seq, ids, batch, kept // seq, loss, kl)

    def _losses(
        self, base: _SideTokens, tuned: _SideTokens, ids: Tensor, predicted: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Losses and KL chunk by chunk, so that `[tokens, vocab]` never exists for a whole batch."""
        assert base.head_input is not None and tuned.head_input is not None
        heads, inputs = (self._heads["base"], self._heads["tuned"]), (base.head_input, tuned.head_input)
        loss, kl = torch.empty(len(ids), 2), None
        if self.kl:
            loss, kl = paired_loss(heads, inputs, ids)
            kl[~predicted] = torch.nan
        else:
            for model, (head, head_input) in enumerate(zip(heads, inputs, strict=True)):
                loss[:, model] = token_loss(head, head_input, ids)
        loss[~predicted] = torch.nan
        return loss, kl

    def _folder(self, name: str) -> Path:
        assert self._spool is not None
        # A corpus may be called "../x": its name never becomes a path.
        return self._spool / hashlib.sha256(name.encode()).hexdigest()[:16]

    def _spooled(self, name: str, index: int) -> _SideTokens:
        tensors = load_file(self._folder(name) / f"{index:06d}.safetensors")
        side = _SideTokens.__new__(_SideTokens)
        side.acts = {site: tensors[f"acts.{site}"] for site in self.sites}
        side.head_input = tensors.get("head_input")
        return side


def activations(
    model: LanguageModel, batches: Iterable[TokenBatch], site: str
) -> Iterator[Float[Tensor, "tokens models d_model"]]:
    """One model's activations at one site, the kept tokens of each batch; the forward stops at the site."""
    for batch in batches:
        yield read_side(model, batch, [site])[site][:, None]


def read_side(
    model: LanguageModel, batch: TokenBatch, sites: Sequence[str]
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """One model's activations of the kept tokens of one batch, by site.

    Raises:
        NumericsError: The model gives NaN or infinity.
    """
    kept, _ = kept_places(batch)
    found = {
        site: kept_rows(hidden, kept) for site, hidden in model.read(batch.input_ids, sites).acts.items()
    }
    for site, acts in found.items():
        check_finite(acts, model.name, site, batch, kept)
    return found


def kept_places(batch: TokenBatch) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Flat places of the measured tokens, and of the tokens that predict them."""
    kept = batch.keep.reshape(-1).nonzero().squeeze(1)
    return kept, (kept - 1).clamp_min(0)


def kept_rows(
    hidden: Float[Tensor, "batch seq d_model"], kept: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens d_model"]:
    """The rows of flat places."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept.to(hidden.device))


def token_loss(
    head: Head, head_input: Float[Tensor, "tokens d_model"], ids: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Nats of each token given the head's input before it, on the CPU; logits exist for one chunk at a time."""
    loss = torch.empty(len(ids))
    chunk = _chunk(head)
    for start in range(0, len(ids), chunk):
        rows = slice(start, start + chunk)
        logits = head.logits(_on_head(head_input[rows], head))
        found = torch.nn.functional.cross_entropy(logits, ids[rows].to(logits.device), reduction="none")
        loss[rows] = found.cpu()
    return loss


def paired_loss(
    heads: tuple[Head, Head],
    inputs: tuple[Float[Tensor, "tokens d_model"], Float[Tensor, "tokens d_model"]],
    ids: Int[Tensor, " tokens"],
) -> tuple[Float[Tensor, "tokens 2"], Float[Tensor, " tokens"]]:
    """Nats of each token for base and tuned and KL(tuned ‖ base), on the CPU; logits exist for one chunk at a time."""
    loss, kl = torch.empty(len(ids), 2), torch.empty(len(ids))
    chunk = _chunk(heads[0])
    for start in range(0, len(ids), chunk):
        rows = slice(start, start + chunk)
        both = []
        for model, (head, head_input) in enumerate(zip(heads, inputs, strict=True)):
            logits = head.logits(_on_head(head_input[rows], head))
            found = torch.nn.functional.cross_entropy(logits, ids[rows].to(logits.device), reduction="none")
            loss[rows, model] = found.cpu()
            both.append(logits)
        kl[rows] = _divergence(*both)
    return loss, kl


def _chunk(head: Head) -> int:
    weight = getattr(head.module, "weight", None)
    return max(64, LOGIT_BYTES // (4 * weight.shape[0])) if weight is not None else 256


def _on_head(head_input: Tensor, head: Head) -> Tensor:
    weight = getattr(head.module, "weight", head_input)
    return head_input.to(weight.device)


def _divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(tuned ‖ base) per row over the vocabulary both have."""
    shared = min(base.shape[-1], tuned.shape[-1])
    log_tuned = tuned[:, :shared].log_softmax(-1)
    log_base = base[:, :shared].to(tuned.device).log_softmax(-1)
    p = log_tuned.exp()
    # Tokens that both models rule out have log-probabilities of -inf and weigh nothing.
    return torch.where(p > 0, p * (log_tuned - log_base), 0.0).sum(-1).cpu()


def check_finite(acts: Tensor, who: str, site: str, batch: TokenBatch, kept: Tensor) -> None:
    """Refuse NaN and infinity, naming the document and the token.

    Raises:
        NumericsError: There is one.
    """
    # One sum tells a clean batch; the guilty row is looked for only then.
    if torch.isfinite(acts.sum(dtype=torch.float32)):
        return
    bad = (~torch.isfinite(acts)).any(-1).nonzero()
    if len(bad) == 0:
        return
    place = int(kept[int(bad[0])])
    raise NumericsError(
        f"The {who} gives NaN or infinity at {site}",
        expected="finite activations",
        found=f"document {int(batch.document.reshape(-1)[place])}, token {place % batch.input_ids.shape[1]}",
        fix="Load the models in float32 or bfloat16 instead of float16, and check the checkpoint",
    )
