"""The weights of a dictionary in training: one row per latent, for the encoder as for the decoder.

Rows make every sparse product and both weight gradients a gather of whole rows. `Dictionary` keeps the encoder
with one column per latent, as the field does; the two layouts meet in `fields_and_weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palimpsest.dictionaries import kernels
from palimpsest.dictionaries.config import FIXED, TrainConfig
from palimpsest.errors import ConfigError

FIRST_THRESHOLD = 0.1
"""Where jumprelu's thresholds start, for activations of norm sqrt(d_model)."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Trainable tensors, for activations that were scaled; float32 masters.

    Attributes:
        enc: Encoder rows, models side by side.
        dec: Decoder rows, models side by side.
        b_enc: Encoder bias.
        b_dec: Decoder bias, subtracted from the input too.
        threshold: For jumprelu, else None.
        models: How many models a row spans.
    """

    enc: Float[Tensor, "latents features"]
    dec: Float[Tensor, "latents features"]
    b_enc: Float[Tensor, " latents"]
    b_dec: Float[Tensor, " features"]
    threshold: Float[Tensor, " latents"] | None
    models: int

    @classmethod
    def blank(cls, config: TrainConfig, models: int, d_model: int) -> Weights:
        """Seeded random directions; the caller's generator is not touched.

        The encoder is the decoder's transpose. Both models of a pair start with the same direction
        (crosscoder_learning's `same_init_for_all_layers`), each decoder norm 1/2, so that no latent is
        bound to one model before training has bound it.
        """
        generator = torch.Generator().manual_seed(config.seed)
        rows = F.normalize(
            torch.randn(config.n_latents, d_model, generator=generator, dtype=torch.float32, device="cpu"),
            dim=1,
        )
        rows = rows.to(config.device)
        made = cls(
            enc=rows.repeat(1, models),
            dec=rows.repeat(1, models) / models,
            b_enc=rows.new_zeros(config.n_latents),
            b_dec=rows.new_zeros(models * d_model),
            threshold=rows.new_full((config.n_latents,), FIRST_THRESHOLD)
            if config.activation == "jumprelu"
            else None,
            models=models,
        )
        made._bind(config)
        for tensor in made.named().values():
            tensor.requires_grad_(True)
        return made

    def _bind(self, config: TrainConfig) -> None:
        """Start the bound latents where their bonds hold."""
        bonds = config.partition
        if bonds.total and self.models != 2:
            raise ConfigError(
                "Only a pair has latents of one model or shared ones",
                expected="activations of two models",
                found=f"{self.models} per token",
            )
        for rows, other in self.forbidden(config):
            self.enc[rows, other] = 0
            self.dec[rows, other] = 0
        one_sided = slice(0, bonds.base_only + bonds.tuned_only)
        self.dec[one_sided] *= 2

    def forbidden(self, config: TrainConfig) -> list[tuple[slice, slice]]:
        """Blocks (latents, features) of encoder and decoder that stay zero: the model a latent may not see."""
        bonds, half = config.partition, self.dec.shape[1] // 2
        blocks = [
            (slice(0, bonds.base_only), slice(half, None)),
            (slice(bonds.base_only, bonds.base_only + bonds.tuned_only), slice(0, half)),
        ]
        return [(rows, other) for rows, other in blocks if rows.stop > rows.start]

    def shared(self, config: TrainConfig) -> slice:
        """The latents with one decoder direction for both models."""
        bonds = config.partition
        start = bonds.base_only + bonds.tuned_only
        return slice(start, start + bonds.shared)

    def named(self) -> dict[str, Tensor]:
        """The trainable tensors by name."""
        tensors = {"enc": self.enc, "dec": self.dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        return tensors if self.threshold is None else tensors | {"threshold": self.threshold}

    def norms(self) -> Float[Tensor, "latents models"]:
        """Decoder norms per model, with their gradient."""
        return self.dec.view(len(self.dec), self.models, -1).norm(dim=2)

    @torch.no_grad()
    def constrain_gradients(self, config: TrainConfig) -> None:
        """Keep gradients inside the constraints: unit rows of one model, bonds of a pair."""
        assert self.dec.grad is not None and self.enc.grad is not None
        if self.models == 1:
            kernels.project_rows_(self.dec.grad, self.dec)
        for rows, other in self.forbidden(config):
            self.enc.grad[rows, other] = 0
            self.dec.grad[rows, other] = 0
        shared = self.shared(config)
        if shared.stop > shared.start:
            halves = self.dec.grad[shared].view(shared.stop - shared.start, 2, -1)
            halves.copy_(halves.mean(dim=1, keepdim=True).expand_as(halves))

    @torch.no_grad()
    def constrain(self, config: TrainConfig) -> None:
        """Bring the rows of one model back to unit norm; a pair's norms are free, selection weighs them."""
        if self.models == 1:
            kernels.normalise_rows_(self.dec)
        shared = self.shared(config)
        if shared.stop > shared.start:
            # Both halves took the same step; the optimiser may have rounded them differently.
            halves = self.dec[shared].view(shared.stop - shared.start, 2, -1)
            halves[:, 1] = halves[:, 0]
        if self.threshold is not None:
            self.threshold.clamp_(min=0)

    def fields_and_weights(self, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `Dictionary` is built from, still for scaled activations."""
        latents, features = self.dec.shape
        d_model = features // self.models
        bonds = config.partition
        fields = {
            "d_model": d_model,
            "n_latents": latents,
            "activation": config.activation,
            "k": config.k if config.activation in FIXED else None,
            "models": self.models,
            "view": "pair" if self.models > 1 else config.view,
            "apply_b_dec_to_input": True,
            "prefixes": tuple(config.prefixes),
            "base_only": bonds.base_only,
            "tuned_only": bonds.tuned_only,
            "shared": bonds.shared,
        }
        weights = {
            "W_enc": self.enc.detach().T.reshape(self.models, d_model, latents),
            "W_dec": self.dec.detach().view(latents, self.models, d_model),
            "b_enc": self.b_enc.detach(),
            "b_dec": self.b_dec.detach().view(self.models, d_model),
        }
        if self.threshold is not None:
            weights["threshold"] = self.threshold.detach()
        return fields, weights
