"""What tells wanted text from other text at the sites of dictionaries: differences of means, and single latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries import Codes, Dictionary
from palimpsest.errors import ConfigError
from palimpsest.log import progress
from palimpsest.models import LanguageModel
from palimpsest.tune.config import ObjectiveOptions
from palimpsest.tune.data import TuneData
from palimpsest.tune.measure import answer
from palimpsest.tune.rows import TextRow, evenly
from palimpsest.tune.scoring import Batch, batches


class Sides(NamedTuple):
    """Two kinds of text.

    Attributes:
        wanted: What the fine-tune should make likelier; the tokens with labels are read.
        other: What it is told from.
    """

    wanted: list[TextRow]
    other: list[TextRow]


@dataclass
class Means:
    """One kind of text at one site, in float64 on the CPU.

    Attributes:
        total: Sum of the activations, `[d_model]`.
        norms: Sum of their lengths.
        tokens: How many there were.
        latents: Sum over documents of each latent's mean activation, `[latents]`.
        squares: The same of its square.
        documents: How many there were.
    """

    total: Float[Tensor, " d_model"]
    norms: float
    tokens: int
    latents: Float[Tensor, " latents"]
    squares: Float[Tensor, " latents"]
    documents: int

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """The mean activation of a token."""
        return self.total / max(1, self.tokens)


class Contrast(NamedTuple):
    """Both kinds of text at one site."""

    wanted: Means
    other: Means

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The difference of the two means, wanted minus other, of length 1."""
        difference = self.wanted.mean - self.other.mean
        return difference / difference.norm().clamp(min=torch.finfo(difference.dtype).tiny)

    @property
    def norm(self) -> float:
        """Mean length of a token's activation in both kinds of text."""
        tokens = self.wanted.tokens + self.other.tokens
        return (self.wanted.norms + self.other.norms) / max(1, tokens)

    def standardised(self) -> Float[Tensor, " latents"]:
        """Of each latent: the difference of its mean activations per document over their common deviation.

        0 for a latent that never fires; as large as can be where neither kind of text has any deviation.
        """
        (mean, variance), (mean0, variance0) = (_moments(one) for one in self)
        deviation = ((variance + variance0) / 2).sqrt()
        difference = mean - mean0
        return torch.where(
            difference == 0, 0.0, difference / deviation.clamp(min=torch.finfo(deviation.dtype).tiny)
        )


def sides(objective: ObjectiveOptions, data: TuneData, most: int) -> Sides:
    """The two kinds of text that an objective's training data holds.

    sft: the data and general text; pairs: chosen and rejected answers; kto: wanted and unwanted answers; unlearn: what
    is to be kept and what is to be forgotten.

    Args:
        objective: The objective.
        data: The run's data; only what is trained on, and general text.
        most: Rows of each kind, evenly spaced.

    Raises:
        ConfigError: The objective has no two kinds of text, or one of them is empty.
    """
    rows = data.train
    match objective.objective:
        case "sft":
            found = Sides(rows, data.general)
        case "unlearn":
            found = Sides(data.retain, rows)
        case "kto":
            texts = [(answer(row.prompt, row.answer), row.label) for row in rows]
            found = Sides(
                [one for one, wanted in texts if wanted], [one for one, wanted in texts if not wanted]
            )
        case "grpo":
            found = Sides([], [])
        case _:
            found = Sides(
                [answer(row.prompt, row.chosen) for row in rows],
                [answer(row.prompt, row.rejected) for row in rows],
            )
    if not found.wanted or not found.other:
        raise ConfigError(
            f"{objective.objective} holds no two kinds of text to tell apart",
            expected="--general with sft, pairs, verdicts of both kinds, or --retain",
            fix="Leave diffmean and best-latent out of --methods",
        )
    return Sides(evenly(found.wanted, most), evenly(found.other, most))


@torch.inference_mode()
def read_contrast(
    language: LanguageModel, dictionaries: Mapping[str, Dictionary], texts: Sides, tokens_per_batch: int
) -> dict[str, Contrast]:
    """Read both kinds of text at every site.

    Args:
        language: The base.
        dictionaries: By site.
        texts: What is read.
        tokens_per_batch: Padded tokens of one forward pass.
    """
    found: dict[str, list[Means]] = {site: [] for site in dictionaries}
    for rows in texts:
        for site, means in _read(language, dictionaries, rows, tokens_per_batch).items():
            found[site].append(means)
    return {site: Contrast(*both) for site, both in found.items()}


def _read(
    language: LanguageModel, dictionaries: Mapping[str, Dictionary], rows: Sequence[TextRow], tokens: int
) -> dict[str, Means]:
    made = {site: _nothing(dictionary) for site, dictionary in dictionaries.items()}
    with progress("reading for the contrast", len(rows), "rows") as advance:
        for batch in batches(rows, tokens):
            # A place predicts the labelled token behind it, which is the one that is read.
            places = batch.places + 1
            acts = language.read(batch.ids, list(dictionaries)).acts
            for site, dictionary in dictionaries.items():
                hidden = acts[site].flatten(0, 1)[places.to(acts[site].device)]
                codes = dictionary.encode(hidden.to(dictionary.device)).to("cpu")
                _add(made[site], hidden.double().cpu(), codes, batch)
            advance(len(batch.rows))
    return made


def _nothing(dictionary: Dictionary) -> Means:
    zeros = torch.zeros(dictionary.n_latents, dtype=torch.float64)
    return Means(torch.zeros(dictionary.d_model, dtype=torch.float64), 0.0, 0, zeros, zeros.clone(), 0)


def _add(means: Means, hidden: Float[Tensor, "tokens d_model"], codes: Codes, batch: Batch) -> None:
    owner = torch.from_numpy(batch.owner)
    documents, member, sizes = owner.unique(return_inverse=True, return_counts=True)
    means.total += hidden.sum(0)
    means.norms += float(hidden.norm(dim=1).sum())
    means.tokens += len(hidden)
    means.documents += len(documents)
    latent, mean = _per_document(codes, member, sizes)
    means.latents.index_add_(0, latent, mean)
    means.squares.index_add_(0, latent, mean.square())


def _per_document(
    codes: Codes, member: Int[Tensor, " tokens"], sizes: Int[Tensor, " documents"]
) -> tuple[Int[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """The mean activation of each latent in each document that it fires in; [documents, latents] is never there."""
    document = member[codes.rows()]
    pairs, place = (document * codes.n_latents + codes.indices).unique(return_inverse=True)
    total = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, place, codes.values.double())
    return pairs % codes.n_latents, total / sizes[pairs // codes.n_latents]


def _moments(means: Means) -> tuple[Tensor, Tensor]:
    n = max(1, means.documents)
    mean = means.latents / n
    return mean, (means.squares / n - mean.square()).clamp(min=0) * n / max(1, n - 1)
