"""The closed form: h + (f(z) - z) · W_dec, for a handful of latents, through a dictionary of any view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest import edits
from palimpsest.dictionaries import Codes, Dictionary
from palimpsest.edits import Edit, Reading
from palimpsest.errors import ConfigError
from palimpsest.interpret.steering.changes import Change
from palimpsest.interpret.subject import PAIRED
from palimpsest.models import SIDES, Side


class LatentEdit:
    """What some changes add to the activations of one model.

    The direction of a latent is its decoder row; of a crosscoder, the row of the model that is steered.

    Attributes:
        reads_both: The other model's activations of the same tokens are needed: the codes are joint, or a token's
            scale is that of the difference.
    """

    def __init__(self, dictionary: Dictionary, side: Side, changes: Sequence[Change]) -> None:
        """Lay out the changes of a dictionary, on its device.

        Args:
            dictionary: Of any view.
            side: The model that is steered.
            changes: At least one, checked by `read_changes`.
        """
        device = dictionary.device
        self.dictionary, self.side = dictionary, side
        self._latents = torch.tensor([one.latent for one in changes], device=device)
        # In float64 until the type of the activations is known: 1 + (v - 1)·s has digits to lose.
        self._factor = torch.tensor([one.factor for one in changes], dtype=torch.float64, device=device)
        self._constant = torch.tensor([one.constant for one in changes], dtype=torch.float64, device=device)
        self._rank = torch.full((dictionary.n_latents,), -1, device=device)
        self._rank[self._latents] = torch.arange(len(changes), device=device)
        self._needs_codes = any(one.factor != 1 for one in changes)
        self._reads = self._needs_codes or dictionary.input_norm is not None
        self.reads_both = self._reads and dictionary.view in PAIRED

    def delta(
        self, own: Float[Tensor, "tokens d_model"], other: Float[Tensor, "tokens d_model"] | None = None
    ) -> Float[Tensor, "tokens d_model"]:
        """What is added to each token, in float32 or better, on the dictionary's device.

        Args:
            own: Activations of the steered model.
            other: Those of the other model, where `reads_both`.
        """
        dictionary, dtype = self.dictionary, edits.wide(own.dtype)
        own = own.to(dictionary.device)
        reading = self._reading(own, other) if self._reads else None
        change = self._constant.to(dtype).expand(len(own), -1)
        if self._needs_codes:
            assert reading is not None
            change = change + self._codes(reading.codes, dtype) * (self._factor - 1).to(dtype)
        unit = torch.eye(len(self._latents), dtype=dtype, device=own.device)
        written = edits.write(dictionary, Edit(low=(change, unit)), reading, latents=self._latents)
        assert written is not None
        if dictionary.view != "pair":
            return written
        return written.view(len(own), dictionary.models, -1)[:, SIDES.index(self.side)]

    def _reading(self, own: Tensor, other: Tensor | None) -> Reading:
        """Codes of each token, and by how much an edit grows when it is written back."""
        dictionary = self.dictionary
        if not self.reads_both:
            return edits.read(dictionary, own)
        if other is None:
            raise ConfigError("A joint code reads both models", expected="the other model's activations")
        dtype = edits.wide(own.dtype)
        other = other.to(own.device, dtype)
        base, tuned = (own.to(dtype), other) if self.side == "base" else (other, own.to(dtype))
        signal = tuned - base if dictionary.view == "diff" else torch.stack([base, tuned], 1)
        codes = dictionary.encode(signal, check=False)
        if codes.norm is None:
            return Reading(codes, own, None)
        place = 0 if dictionary.view == "diff" else SIDES.index(self.side)
        return Reading(codes, own, codes.norm.scale[:, place : place + 1])

    def _codes(self, codes: Codes, dtype: torch.dtype) -> Float[Tensor, "tokens n"]:
        """The codes of the changed latents alone."""
        place, n = self._rank[codes.indices.long()], len(self._latents)
        values = torch.where(place >= 0, codes.values.to(dtype), 0)
        flat = codes.rows() * n + place.clamp_min(0)
        return values.new_zeros(codes.tokens * n).index_add(0, flat, values).view(codes.tokens, n)


__all__ = ["LatentEdit"]
