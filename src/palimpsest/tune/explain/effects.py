"""One pass over a text: on which tokens each latent fires, how strongly, and how far the adapter moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest import edits
from palimpsest.dictionaries import Codes
from palimpsest.edits import Edit
from palimpsest.errors import ConfigError, NumericsError
from palimpsest.log import progress
from palimpsest.tune.adapter import LatentLayer, Seen, answering
from palimpsest.tune.explain.latents import Latents, Reading, summed
from palimpsest.tune.explain.texts import GROUPS, Text
from palimpsest.tune.scoring import batches, inner_model, settled


class Tokens(NamedTuple):
    """The tokens of the batch that is running.

    Attributes:
        real: Those that are no padding.
        group: Group of documents of each, those of the first half first.
    """

    real: Bool[Tensor, " tokens"]
    group: Int[Tensor, " tokens"]


class SiteSums:
    """Sums of one site, on the device of its dictionary.

    The change of a latent is exact for entries and constants. A low-rank change u Bᵀ would take [tokens, latents] to be
    summed in size, so of it the root of the second moment is taken: sqrt(b_i E[u uᵀ] b_i), which is at least the mean
    size and follows from r × r sums.

    Args:
        layer: Its layer.
        adapter: The adapter that is read.
    """

    def __init__(self, layer: LatentLayer, adapter: str) -> None:
        dictionary = layer.dictionary_of(adapter)
        n, device = dictionary.n_latents, dictionary.device
        self.layer, self.adapter, self.dictionary = layer, adapter, dictionary
        self.fires = torch.zeros(2, n, dtype=torch.long, device=device)
        self.change = torch.zeros(2, n, dtype=torch.float64, device=device)
        self.groups = torch.zeros(2 * GROUPS, n, dtype=torch.float32, device=device)
        self.tokens = torch.zeros(2 * GROUPS, dtype=torch.long, device=device)
        self.low: list[Tensor] | None = None
        self.rows: Tensor | None = None
        self.hidden: Tensor | None = None
        self.now: Tokens | None = None

    @torch.no_grad()
    def see(self, seen: Seen) -> None:
        """Fold in one forward pass; a watcher of the layer."""
        if seen.adapter != self.adapter or self.now is None:
            return
        real, group = (one.to(self.dictionary.device) for one in self.now)
        use = real if seen.edited is None else real & seen.edited.to(real.device)
        self.tokens += torch.bincount(group[use], minlength=len(self.tokens))
        weight = use.double()
        if seen.codes is not None and seen.codes.norm is not None:
            # Latents are written back as much larger as the activations were before they were normalised.
            weight = weight * seen.codes.norm.scale.reshape(-1).double()
        self._constant(seen.edit, weight, group)
        self._low(seen.edit, weight, group)
        codes = seen.codes
        if codes is None and self.hidden is not None:
            codes = edits.read(self.dictionary, self.hidden).codes
        if codes is not None:
            self._entries(codes, seen, use, weight, group)

    def _entries(self, codes: Codes, seen: Seen, use: Tensor, weight: Tensor, group: Tensor) -> None:
        token = codes.rows()
        kept = (codes.values > 0) & use[token]
        index, token = codes.indices[kept], token[kept]
        half = group[token] // GROUPS
        n = self.dictionary.n_latents
        ones = torch.ones_like(index)
        self.fires.view(-1).index_add_(0, half * n + index, ones)
        self.groups.view(-1).index_add_(0, group[token] * n + index, codes.values[kept].float())
        if seen.edit.entries is None:
            return
        change = seen.edit.entries[kept].double()
        size = change.abs()
        if seen.edit.constant is not None:
            # The constant was counted for every token; where a latent fires the two act together.
            constant = self._spread(seen.edit.constant)[index]
            size = (change + constant).abs() - constant.abs()
        self.change.view(-1).index_add_(0, half * n + index, size * weight[token])

    def _constant(self, edit: Edit, weight: Tensor, group: Tensor) -> None:
        if edit.constant is None:
            return
        size = self._spread(edit.constant).abs()
        for half in (0, 1):
            self.change[half] += size * weight[group // GROUPS == half].sum()

    def _low(self, edit: Edit, weight: Tensor, group: Tensor) -> None:
        if edit.low is None:
            return
        u, self.rows = edit.low[0].double() * weight[:, None], edit.low[1].detach()
        if self.low is None:
            self.low = [u.new_zeros(u.shape[1], u.shape[1]) for _ in range(2)]
        for half in (0, 1):
            inside = u[group // GROUPS == half]
            self.low[half] += inside.T @ inside

    def _spread(self, numbers: Float[Tensor, " n"]) -> Float[Tensor, " latents"]:
        """Numbers of the latents that may change, among all."""
        full = torch.zeros(self.dictionary.n_latents, dtype=torch.float64, device=numbers.device)
        return full.index_copy_(0, self.layer.component(self.adapter).latents, numbers.detach().double())

    def changes(self) -> Float[Tensor, "halves latents"]:
        """Σ over edited tokens of |change|."""
        if self.low is None or self.rows is None:
            return self.change
        found = self.change.clone()
        rows = self.rows.double()
        for half in (0, 1):
            count = self.tokens[half * GROUPS : (half + 1) * GROUPS].sum()
            # sqrt(E[(b u)²]) times the tokens, so that it is a sum like the others.
            moment = ((rows @ self.low[half]) * rows).sum(1).clamp(min=0) / count.clamp(min=1)
            found[half] += self._spread(moment.sqrt()) * count
        return found


@torch.inference_mode()
def read_latents(model: Any, latents: Latents, text: Text, tokens_per_batch: int) -> Reading:
    """Pass over a text once with the adapter on.

    Raises:
        ConfigError: The adapter edits none of its tokens.
        NumericsError: The model or the adapter gives NaN or infinity.
    """
    sums = [SiteSums(layer, latents.adapter) for layer in latents.layers]
    inner = inner_model(model)
    device = inner.get_input_embeddings().weight.device
    total = sum(len(row.input_ids) for row in text.rows)
    with (
        settled(model),
        _watching(sums),
        progress(f"latents on {text.name}", total, unit="tokens") as advance,
    ):
        for batch in batches(text.rows, tokens_per_batch):
            lengths = torch.tensor([len(text.rows[row].input_ids) for row in batch.rows])
            width = batch.ids.shape[1]
            real = torch.arange(width) < lengths[:, None]
            group = torch.tensor([text.groups[row] for row in batch.rows])[:, None].expand(-1, width)
            for one in sums:
                one.now = Tokens(real.reshape(-1).to(device), group.reshape(-1).to(device))
            with answering(model, batch.answer):
                # The head is not needed.
                inner.base_model(input_ids=batch.ids.to(device), use_cache=False)
            advance(int(lengths.sum()))
    return _finished(latents, sums, text)


def _finished(latents: Latents, sums: Sequence[SiteSums], text: Text) -> Reading:
    tokens = sums[0].tokens.cpu().numpy()
    if tokens.sum() == 0:
        raise ConfigError(
            f"The adapter edits no token of {text.name}",
            found=f"scope {sums[0].layer.places[latents.adapter].scope}",
            fix="Give text of the kind that it was trained on, with prompts and answers where its scope names them",
        )
    changes = summed(latents, [one.changes() for one in sums])
    groups = summed(latents, [one.groups for one in sums])
    if not (
        torch.isfinite(torch.from_numpy(changes)).all() and torch.isfinite(torch.from_numpy(groups)).all()
    ):
        raise NumericsError(
            f"The adapter gives NaN or infinity on {text.name}", fix="Train it again at a lower learning rate"
        )
    return Reading(summed(latents, [one.fires for one in sums]), changes, groups, tokens)


@contextmanager
def _watching(sums: Sequence[SiteSums]) -> Iterator[None]:
    """Let the sums see what their layers do inside the block."""
    handles: list[Any] = []
    try:
        for one in sums:
            one.layer.watchers.append(one.see)
            if one.layer.component(one.adapter).constant:
                handles.append(_hidden(one))
        yield
    finally:
        for one in sums:
            if one.see in one.layer.watchers:
                one.layer.watchers.remove(one.see)
        for handle in handles:
            handle.remove()


def _hidden(sums: SiteSums) -> Any:
    """Keep what a constant adapter, which reads nothing, is added to: its latents fire all the same."""
    keep: Callable[..., None] = partial(_keep_output if sums.layer.side == "output" else _keep_input, sums)
    if sums.layer.side == "output":
        return sums.layer.base_layer.register_forward_hook(keep)
    return sums.layer.register_forward_pre_hook(keep, with_kwargs=True)


def _keep_output(sums: SiteSums, _module: Any, _arguments: Any, output: Any) -> None:
    hidden = output if isinstance(output, Tensor) else output[0]
    sums.hidden = hidden.reshape(-1, hidden.shape[-1])


def _keep_input(sums: SiteSums, _module: Any, arguments: Any, keywords: Any) -> None:
    hidden = arguments[0] if arguments else keywords["hidden_states"]
    sums.hidden = hidden.reshape(-1, hidden.shape[-1])
