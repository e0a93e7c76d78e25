"""What a dictionary of each view says of the step from base to tuned: directions, codes, and the change they write."""

from __future__ import annotations

from copy import deepcopy
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries import Codes, Dictionary, kernels
from palimpsest.errors import DictionaryError

Kind = Literal["crosscoder", "diff-sae", "tuned-sae", "base-sae"]
KINDS: dict[str, Kind] = {"pair": "crosscoder", "diff": "diff-sae", "tuned": "tuned-sae", "base": "base-sae"}
"""The method by the view of its dictionary."""


class Entries(NamedTuple):
    """Signed sparse coefficients of the change, in compressed rows; a latent stands at most once in a row.

    Attributes:
        crow: Where each row starts; the last entry is the number of stored entries.
        indices: The latent of each entry.
        values: How much of its `change` the latent adds to the base.
    """

    crow: Int[Tensor, " tokens_and_one"]
    indices: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]


class Method:
    """A dictionary as a description of the step from base to tuned.

    h_tuned is described as h_base + Σ_j entry_j · change_j + bias:

    - crosscoder: entry = the joint code, change = d_tuned - d_base, bias = b_dec_tuned - b_dec_base;
    - diff-SAE: entry = the code of h_tuned - h_base, change = its decoder row, bias = b_dec;
    - SAE of the tuned model or of the base: entry = code(h_tuned) - code(h_base), change = its decoder row, no bias.

    Attributes:
        kind: Which of the four.
        dictionary: The dictionary.
        direction: What Latent Scaling projects on: d_tuned for a crosscoder, else the decoder row.
        change: What one unit of a latent adds to the base.
        bias: What is added whatever fires.

    Source: Minder et al., arXiv 2504.02922, for the crosscoder; `docs/measures/patching.md`.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        """Read the directions; they share memory with the dictionary where they can.

        Raises:
            DictionaryError: A crosscoder of another number of models, or a crosscoder or diff-SAE that normalises
                each token by itself, so that it adds no fixed direction or bias to the base.
        """
        both = dictionary.view in ("pair", "diff")
        if both and (dictionary.models > 2 or dictionary.input_norm):
            raise DictionaryError(
                f"This {KINDS[dictionary.view]} cannot be read as a step from base to tuned",
                expected="at most 2 models and no input_norm",
                found=f"{dictionary.models} models, input_norm {dictionary.input_norm}",
            )
        if dictionary.dtype.itemsize < 4:
            # Sums over many tokens need more digits, and a CPU has no sparse products in half precision.
            dictionary = deepcopy(dictionary).float()
        self.kind: Kind = KINDS[dictionary.view]
        self.dictionary = dictionary
        rows, bias = dictionary.W_dec.detach(), dictionary.b_dec.detach()
        if self.kind == "crosscoder":
            self.direction = rows[:, 1].contiguous()
            self.change = rows[:, 1] - rows[:, 0]
            self.bias = bias[1] - bias[0]
        else:
            self.direction = self.change = rows[:, 0]
            self.bias = bias[0] if self.kind == "diff-sae" else torch.zeros_like(bias[0])

    @property
    def single(self) -> bool:
        """Whether the dictionary reads one model at a time."""
        return self.kind in ("tuned-sae", "base-sae")

    def signal(self, acts: Float[Tensor, "tokens models d_model"]) -> Float[Tensor, "tokens *models d_model"]:
        """What the dictionary reads: both models, their difference, or the tuned one."""
        if self.kind == "crosscoder":
            return acts
        return acts[:, 1] - acts[:, 0] if self.kind == "diff-sae" else acts[:, 1]

    def codes(self, acts: Float[Tensor, "tokens models d_model"]) -> Codes:
        """The codes that scaling and the statistics use; those of the tuned model for an SAE."""
        return self.dictionary.encode(self.signal(acts))

    def entries(
        self,
        acts: Float[Tensor, "tokens models d_model"],
        codes: Codes | None = None,
        base: Codes | None = None,
    ) -> Entries:
        """The coefficients of the change on each token.

        Args:
            acts: Of base and tuned.
            codes: What `codes(acts)` gave, where it is known already.
            base: The codes of the base, where an SAE gave them already.
        """
        own = scaled(self.codes(acts) if codes is None else codes)
        if not self.single:
            return own
        base = self.dictionary.encode(acts[:, 0]) if base is None else base
        return _difference(own, scaled(base), self.dictionary.n_latents)

    def written(
        self, entries: Entries, values: Float[Tensor, " entries"] | None = None
    ) -> Float[Tensor, "tokens d_model"]:
        """Σ_j value_j · change_j per token, without the bias; `values` replaces those of the entries."""
        weights = entries.values if values is None else values
        return kernels.row_sum(entries.crow, entries.indices.long(), weights.contiguous(), self.change)


def scaled(codes: Codes) -> Entries:
    """Codes in units of the raw activations: with an input_norm each token is written back at its own scale."""
    values = codes.values
    if codes.norm is not None:
        values = values * codes.norm.scale[:, 0].to(values.dtype)[codes.rows()]
    return Entries(codes.crow, codes.indices, values)


def _difference(left: Entries, right: Entries, n_latents: int) -> Entries:
    """Left - right with one entry for each latent of a row."""
    tokens = len(left.crow) - 1
    token = torch.arange(tokens, device=left.crow.device)
    keys = torch.cat(
        [token.repeat_interleave(one.crow.diff()) * n_latents + one.indices for one in (left, right)]
    )
    unique, place = torch.unique(keys, return_inverse=True)
    values = left.values.new_zeros(len(unique))
    values.index_add_(0, place, torch.cat([left.values, -right.values]))
    crow = torch.searchsorted(unique, torch.arange(tokens + 1, device=keys.device) * n_latents)
    return Entries(crow, unique % n_latents, values)
