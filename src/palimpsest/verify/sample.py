"""The activations that a verification works on: one forward pass per text and model reads all sites."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.corpus import Document
from palimpsest.corpus.batches import Masking
from palimpsest.errors import SiteError
from palimpsest.evaluate.views import EvaluatedSide, Source
from palimpsest.harvest.stream import kept_places, read_side
from palimpsest.log import progress
from palimpsest.models import LanguageModel
from palimpsest.verify.text import batches

NEAR = ("resid_post", "resid_mid", "resid_pre", "mlp_out", "mlp_out_post", "attn_out", "attn_out_post")
"""Points that are tried in the layers around the named one."""

REACH = 2
"""Layers on either side of it."""

TOKENS_PER_BATCH = 4096
"""Padded tokens of a forward pass."""


@dataclass(frozen=True)
class Sample:
    """Measured tokens of one text.

    Attributes:
        document: Index of each token's document, on the CPU.
        position: Its place in the sequence, on the CPU.
        acts: By side and site, in float32 on the dictionary's device.
    """

    document: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    acts: dict[tuple[str, str], Float[Tensor, "tokens d_model"]]

    def rows(self, chosen: Int[Tensor, " rows"] | Bool[Tensor, " tokens"]) -> "Sample":
        """Some of the tokens."""
        acts = {key: value[chosen.to(value.device)] for key, value in self.acts.items()}
        return Sample(self.document[chosen], self.position[chosen], acts)


@dataclass(frozen=True)
class Text:
    """Documents with the mask that says which of their tokens are measured."""

    documents: Sequence[Document]
    masking: Masking

    @property
    def measured(self) -> int:
        """Tokens that are measured."""
        return sum(int(self.masking.keep(one.roles, one.special).sum()) for one in self.documents)


def model_of(source: Source, side: EvaluatedSide) -> LanguageModel:
    """A model by its side; a pair that holds one at a time loads it and drops the other."""
    if isinstance(source, LanguageModel) or side == "model":
        assert isinstance(source, LanguageModel)
        return source
    return source.side(side)


def read_text(
    source: Source,
    text: Text,
    wanted: Mapping[EvaluatedSide, Sequence[str]],
    device: torch.device,
    *,
    every: int = 1,
    whole: Sequence[str] = (),
) -> tuple[Sample, Sample]:
    """Run each model once over a text and keep the measured tokens at several sites.

    Args:
        source: The model or the pair.
        text: What is read.
        wanted: Sites by side.
        device: Where the activations are kept.
        every: Of the sites of the second sample, one token in so many is kept.
        whole: Sites whose every measured token is kept as well, for the first sample.

    Returns:
        Every token at the sites of `whole`, and one token in `every` at all sites.
    """
    full: dict[tuple[str, str], list[Tensor]] = {}
    thin: dict[tuple[str, str], list[Tensor]] = {}
    document: list[Tensor] = []
    position: list[Tensor] = []
    with progress("reading text for the dictionary") as advance:
        for number, (side, sites) in enumerate(wanted.items()):
            model = model_of(source, side)
            for batch in batches(text.documents, text.masking, TOKENS_PER_BATCH):
                kept, _ = kept_places(batch)
                if len(kept) == 0:
                    continue
                for site, acts in read_side(model, batch, list(sites)).items():
                    rows = acts.to(device, torch.float32)
                    if site in whole:
                        full.setdefault((side, site), []).append(rows)
                    thin.setdefault((side, site), []).append(rows[::every].clone() if every > 1 else rows)
                if number == 0:
                    document.append(batch.document.reshape(-1)[kept])
                    position.append(kept % batch.input_ids.shape[1])
                advance(len(kept))
    everything = Sample(
        torch.cat(document), torch.cat(position), {key: torch.cat(rows) for key, rows in full.items()}
    )
    few = Sample(
        torch.cat([one[::every] for one in document]),
        torch.cat([one[::every] for one in position]),
        {key: torch.cat(rows) for key, rows in thin.items()},
    )
    return everything, few


def neighbouring_sites(model: LanguageModel, site: str, width: int) -> list[str]:
    """Sites that a dictionary may have been trained at instead: those of the layers around, and every layer's end.

    The ends of layers come first, so that of two names of one tensor (`resid_pre.3`, `resid_post.2`) the better
    known stays. Sites that the model lacks, or that have another width, are left out.
    """
    layers = model.sites.n_layers
    place = re.fullmatch(r"[a-z_]+\.(\d+)", site)
    around = range(layers) if place is None else range(int(place[1]) - REACH, int(place[1]) + REACH + 1)
    named = [f"resid_post.{layer}" for layer in range(layers)]
    near = [f"{point}.{layer}" for point in NEAR for layer in around if 0 <= layer < layers]
    found = []
    for name in dict.fromkeys(named + (near if place else [])):
        try:
            model.sites.tap(name)
        except SiteError:
            continue
        if name != site:
            found.append(name)
    if not found:
        return []
    acts = model.read(torch.zeros(1, 1, dtype=torch.long), found).acts
    return [name for name in found if name in acts and acts[name].shape[-1] == width]
