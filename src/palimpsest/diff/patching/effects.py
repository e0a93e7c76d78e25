"""The tuned model's upper layers on edited activations of the base, and what that does to every prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.corpus import Role, TokenBatch
from palimpsest.dictionaries import kernels
from palimpsest.diff.methods import Entries, Method
from palimpsest.diff.patching.sets import Variant
from palimpsest.diff.text import Places, Texts
from palimpsest.errors import NumericsError
from palimpsest.evaluate.splice import predictions
from palimpsest.evaluate.sums import DocumentSums, DocumentTable
from palimpsest.harvest.stream import check_finite, kept_rows, paired_loss
from palimpsest.log import progress
from palimpsest.models import SIDES, ModelPair, UpperHalf

COLUMNS = ("predictions", "ce_base", "ce_tuned", "kl_base", "kl_floor")
"""Per prediction, before the KL and then the CE of every variant; the floor is KL(tuned ‖ tuned) through the upper
half: what arithmetic alone leaves."""

TOKENS_AT_ONCE = {"cpu": 2048}
MOST_TOKENS_AT_ONCE = 16_384
"""Tokens of all variants that one pass of the upper half takes: an accelerator wants many, a CPU what its caches hold
(measured: 2048 take three quarters of the time a token that 16,384 take)."""

HEADS_AT_ONCE = 16
"""Variants whose head inputs exist at once: the tuned model's own logits are computed once for so many."""

MOST_DOCUMENTS = 1 << 40


@dataclass(frozen=True)
class Step:
    """One batch as both models see it, and what the dictionary says of it.

    Attributes:
        batch: The text.
        places: The tokens that are edited.
        hidden: The base's and the tuned model's activations, on the tuned model's device.
        heads: What the base's and the tuned model's own head reads.
        raw: h_tuned - h_base at the edited places.
        entries: The dictionary's coefficients there.
        written: Σ over all latents of entry · change.
    """

    batch: TokenBatch
    places: Places
    hidden: tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]
    heads: tuple[Float[Tensor, "batch seq d_head"], Float[Tensor, "batch seq d_head"]]
    raw: Float[Tensor, "tokens d_model"]
    entries: Entries
    written: Float[Tensor, "tokens d_model"]


class Patcher:
    """Edits the base's activations and runs the tuned model on from there.

    Attributes:
        method: The dictionary.
        pair: The models.
        upper: The tuned model above the site.
        texts: Where the batches come from.
    """

    def __init__(
        self, method: Method, pair: ModelPair, site: str, texts: Texts, mean: Float[NDArray, " d_model"]
    ) -> None:
        """Prepare the upper half; `mean` is the vector that the set `mean` adds.

        Raises:
            SiteError: Nothing can be written at the site.
        """
        self.method, self.pair, self.texts = method, pair, texts
        self.upper = UpperHalf(pair.tuned, site)
        self._device = method.dictionary.device
        self._mean = torch.from_numpy(mean).to(self._device, torch.float32)

    @torch.inference_mode()
    def read(self, batch: TokenBatch) -> Step:
        """One forward pass of each model.

        Raises:
            NumericsError: A model or the dictionary gives NaN or infinity.
        """
        places, site = self.texts.places(batch), self.upper.site
        hidden, heads, acts = [], [], []
        for side in SIDES:
            reading = self.pair.side(side).read(batch.input_ids, [site], head=True)
            rows = kept_rows(reading.acts[site], places.flat)
            check_finite(rows, f"{side} model", site, batch, places.flat)
            assert reading.head_input is not None
            hidden.append(reading.acts[site].to(self.pair.tuned.device))
            heads.append(reading.head_input)
            acts.append(rows.to(self._device, torch.float32))
        entries = self.method.entries(torch.stack(acts, 1))
        written = self.method.written(entries).float()
        check_finite(written + self.method.bias, "dictionary", site, batch, places.flat)
        return Step(
            batch, places, (hidden[0], hidden[1]), (heads[0], heads[1]), acts[1] - acts[0], entries, written
        )

    def change(self, step: Step, variant: Variant) -> Float[Tensor, "tokens d_model"]:
        """What a variant adds at the edited places: to the base, or with its sign turned to the tuned model."""
        added = self._added(step, variant)
        return -added if variant.removed else added

    def _added(self, step: Step, variant: Variant) -> Float[Tensor, "tokens d_model"]:
        if variant.latents is not None:
            return self._of_latents(step.entries, variant).float()
        bias = self.method.bias.float()
        match variant.name:
            case "bias":
                return bias.expand_as(step.raw)
            case "all":
                return step.written
            case "all+bias":
                return step.written + bias
            case "raw":
                return step.raw
            case "error":
                return step.raw - step.written - bias
            case "mean":
                return self._mean.expand_as(step.raw)
            case "template":
                return step.raw * step.places.template.to(self._device)[:, None]
        return torch.zeros_like(step.raw)

    def _of_latents(self, entries: Entries, variant: Variant) -> Float[Tensor, "tokens d_model"]:
        latents = torch.from_numpy(variant.latents).to(self._device)
        rank = torch.full((self.method.dictionary.n_latents,), -1, device=self._device)
        rank[latents] = torch.arange(len(latents), device=self._device)
        place = rank[entries.indices.long()]
        values = torch.where(place >= 0, entries.values, 0.0)
        if variant.scramble is None:
            return self.method.written(entries, values)
        change = self.method.change[latents]
        generator = torch.Generator().manual_seed(variant.scramble)
        noise = torch.randn(change.shape, generator=generator).to(change)
        directions = change.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(noise, dim=1)
        return kernels.row_sum(entries.crow, place.clamp_min(0), values, directions)

    @torch.inference_mode()
    def run(
        self, step: Step, variants: Sequence[Variant], rows: Int[Tensor, " rows"]
    ) -> list[Float[Tensor, "rows d_head"]]:
        """What the tuned model's head reads at flat places `rows`, for each variant.

        Tokens that are not edited keep the activations of the model that is edited: the base's where something is
        added, the tuned model's where something is removed.
        """
        batch, seq, d_model = step.hidden[0].shape
        places = step.places.flat.to(step.hidden[0].device)
        ends = torch.stack(step.hidden).view(2, -1, d_model)
        at = ends[:, places].float()
        heads: list[Tensor] = []
        size = max(1, TOKENS_AT_ONCE.get(ends.device.type, MOST_TOKENS_AT_ONCE) // ends.shape[1])
        for start in range(0, len(variants), size):
            chunk = variants[start : start + size]
            hidden = ends[[int(one.removed) for one in chunk]]
            for new, variant in zip(hidden, chunk, strict=True):
                new[places] = (at[int(variant.removed)] + self.change(step, variant).to(at.device)).to(
                    new.dtype
                )
            found = self.upper.run(step.batch.input_ids, hidden.view(-1, seq, d_model))
            heads += [kept_rows(one, rows) for one in found.split(batch)]
        return heads

    @torch.inference_mode()
    def nats(
        self, step: Step, variants: Sequence[Variant], predicted: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens columns"]:
        """The columns of `COLUMNS` and of every variant, for the predictions of the tokens at flat places."""
        before, ids = predicted - 1, step.batch.input_ids.reshape(-1)[predicted]
        heads = (self.pair.base.head, self.pair.tuned.head)
        own = (kept_rows(step.heads[0], before), kept_rows(step.heads[1], before))
        loss, base_kl = paired_loss(heads, own, ids)
        again = kept_rows(self.upper.run(step.batch.input_ids, step.hidden[1]), before)
        kl = [predictions(heads[1], own[1], [again], ids).kl]
        ce = []
        for start in range(0, len(variants), HEADS_AT_ONCE):
            patched = self.run(step, variants[start : start + HEADS_AT_ONCE], before)
            found = predictions(heads[1], own[1], patched, ids)
            kl.append(found.kl)
            ce.append(found.ce[:, 1:])
        fixed = torch.stack([torch.ones(len(ids)), loss[:, 0], loss[:, 1], base_kl], 1)
        return torch.cat([fixed.to(kl[0].device), *kl, *ce], 1)


def predicted_places(
    places: Places, batch: TokenBatch, first: int
) -> tuple[Int[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Flat places of the measured tokens that something predicts, and which are among the first of an answer."""
    seq = batch.input_ids.shape[1]
    chosen = places.flat[places.measured & (places.flat % seq > 0)]
    answer = batch.role == Role.ASSISTANT
    place = torch.arange(seq).expand_as(batch.role)
    outside = torch.where(answer, -1, place).cummax(1).values
    early = answer & (place - outside <= first)
    return chosen, early.reshape(-1)[chosen]


def measure(
    patcher: Patcher,
    batches: Sequence[tuple[int, TokenBatch]],
    variants: Sequence[Variant],
    positions: Iterable[str],
    first: int,
) -> tuple[dict[str, DocumentTable], bool]:
    """Sums per document of the columns of `Patcher.nats`, by positions, and whether the models differ at the site.

    Documents are numbered `corpus · MOST_DOCUMENTS + document`.

    Raises:
        NumericsError: NaN or infinity; names the document.
    """
    sums = {name: DocumentSums(len(COLUMNS) + 2 * len(variants)) for name in positions}
    moved = False
    with progress("Patching", sum(batch.tokens for _, batch in batches)) as advance:
        for corpus, batch in batches:
            step = patcher.read(batch)
            moved = moved or bool(step.raw.any())
            predicted, early = predicted_places(step.places, batch, first)
            if len(predicted):
                columns = patcher.nats(step, variants, predicted)
                document = batch.document.reshape(-1)[predicted]
                _check(columns, document, variants)
                for name, table in sums.items():
                    rows = early if name == "first" else torch.ones_like(early)
                    table.add(document[rows] + corpus * MOST_DOCUMENTS, columns[rows.to(columns.device)])
            advance(batch.tokens)
    return {name: table.finish() for name, table in sums.items()}, moved


def _check(
    columns: Float[Tensor, "tokens columns"], document: Int[Tensor, " tokens"], variants: Sequence[Variant]
) -> None:
    # One sum tells a clean batch; the guilty column is looked for only then.
    if torch.isfinite(columns.sum()):
        return
    bad = (~torch.isfinite(columns)).nonzero()
    if len(bad) == 0:
        return
    # The models themselves come first: what they break, every variant breaks too.
    row, column = bad[bad[:, 1].argmin()].tolist()
    variant = variants[(column - len(COLUMNS)) % len(variants)].name if column >= len(COLUMNS) else None
    raise NumericsError(
        "The predictions of a model are NaN or infinite"
        if variant is None
        else f"The tuned model gives NaN or infinity on the patched activations of '{variant}'",
        found=f"document {int(document[row])}",
        fix="Load the models in float32 or bfloat16 instead of float16, and check checkpoint and dictionary",
    )
