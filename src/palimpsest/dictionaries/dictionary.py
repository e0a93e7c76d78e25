"""One class for every sparse dictionary: SAE, diff-SAE and crosscoder differ in dimensions only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.dictionaries.activations import THRESHOLDED, gate, select
from palimpsest.dictionaries.checks import VIEWS, check_arguments, check_finite, check_input_norm
from palimpsest.dictionaries.codes import Codes
from palimpsest.dictionaries.input_norm import normalise, restore
from palimpsest.dictionaries.layout import Layout, Options, bind
from palimpsest.display.notebook import Rich, card_from
from palimpsest.errors import DictionaryError

__all__ = ["TILE_BYTES", "VIEWS", "Dictionary"]

TILE_BYTES = 16 << 20
"""Size of the pre-activations that encoding holds at once; small enough to stay close to the caches."""


class Dictionary(Rich, nn.Module):
    """A sparse dictionary that reads the raw activations of one model, of two, or their difference.

    Encoding computes `sum over models of (x_m - b_dec_m) @ W_enc_m + b_enc` (without b_dec where
    `apply_b_dec_to_input` is false) and applies a selection rule; decoding is `codes @ W_dec + b_dec`. With an
    `input_norm` each token is normalised before and given back after.

    Attributes:
        W_enc: `[models, d_model, latents]`.
        W_dec: `[latents, models, d_model]`.
        b_enc: `[latents]`; gated has none, but `b_gate`, `r_mag` and `b_mag` of that shape.
        b_dec: `[models, d_model]`.
        threshold: `[latents]` for batch_topk (inference) and jumprelu, else None.
        prefixes: Sizes of the nested dictionaries of a Matryoshka one, else empty.
        metadata: Plain JSON about its origin: model, revision, site, tokens, corpus, recipe, metrics.
    """

    threshold: Tensor | None
    _card = card_from("palimpsest.dictionaries.card", "dictionary_card")

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        *,
        activation: str = "topk",
        k: int | float | None = None,
        models: int = 1,
        view: str = "base",
        apply_b_dec_to_input: bool = True,
        **options: Unpack[Options],
    ) -> None:
        """Random unit decoder rows and their transpose as the encoder; biases and thresholds are zero.

        Args:
            d_model: Width of the activations.
            n_latents: Number of latents.
            activation: One of relu, topk, batch_topk, jumprelu, gated.
            k: Latents per token: a whole number for topk, an average for batch_topk, else None.
            models: How many models the dictionary reads at once.
            view: base, tuned, diff or pair; pair is the only one that reads two models.
            apply_b_dec_to_input: Subtract `b_dec` before encoding.
            **options: prefixes, base_only, tuned_only, shared, input_norm and metadata, as `Options` describes them.

        Raises:
            DictionaryError: The arguments contradict each other.
        """
        super().__init__()
        check_arguments(d_model, n_latents, activation, k, models, view)
        self.layout = Layout.of(options)
        self.layout.check(n_latents, activation, models)
        self.input_norm = options.get("input_norm")
        check_input_norm(self.input_norm, d_model)
        self.d_model, self.n_latents, self.models = d_model, n_latents, models
        self.activation, self.k, self.view = activation, k, view
        self.apply_b_dec_to_input, self.prefixes = apply_b_dec_to_input, self.layout.prefixes
        self.metadata: dict[str, Any] = dict(options.get("metadata") or {})
        rows = torch.randn(n_latents, models, d_model)
        bind(rows, self.partition)
        directions = F.normalize(rows.view(n_latents, -1), dim=1)
        self.W_dec = nn.Parameter(directions.view(n_latents, models, d_model))
        self.W_enc = nn.Parameter(directions.T.contiguous().view(models, d_model, n_latents))
        self.b_dec = nn.Parameter(torch.zeros(models, d_model))
        if activation == "gated":
            self.b_gate, self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(n_latents)) for _ in range(3))
        else:
            self.b_enc = nn.Parameter(torch.zeros(n_latents))
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(n_latents))
        else:
            empty = torch.zeros(n_latents) if activation in THRESHOLDED else None
            self.register_buffer("threshold", empty)

    @classmethod
    def random(
        cls,
        d_model: int,
        n_latents: int,
        k: int,
        *,
        mean: Float[Tensor, " d_model"] | None = None,
        seed: int = 0,
    ) -> Dictionary:
        """A control: random unit directions, encoder = decoder transposed, top-k around `mean`."""
        from palimpsest.dictionaries.tied import random_directions, tied

        directions = random_directions(n_latents, d_model, seed)
        return tied(directions, k, mean=mean, recipe=f"random directions, seed {seed}")

    @classmethod
    def basis(
        cls, directions: Float[Tensor, "n d_model"], k: int, *, mean: Float[Tensor, " d_model"] | None = None
    ) -> Dictionary:
        """A control: latents 0..n-1 are the directions, n..2n-1 their negatives, top-k around `mean`.

        Args:
            directions: Orthonormal rows (principal components, or the identity for the neuron basis), so that
                reading and writing along them is a projection.
            k: Latents per token.
            mean: Subtracted before reading and added after writing; zero when absent.
        """
        from palimpsest.dictionaries.tied import tied

        return tied(torch.cat([directions, -directions]), k, mean=mean, recipe="signed basis")

    @property
    def site(self) -> str | None:
        """The address that the dictionary was trained on, if known."""
        site = self.metadata.get("site")
        return site if isinstance(site, str) else None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; inputs are cast to it."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def partition(self) -> dict[str, range]:
        """Latents by what they are bound to: base_only, tuned_only, shared and free; mostly all are free."""
        return self.layout.partition(self.n_latents)

    def decoder_norms(self) -> Float[Tensor, "latents models"]:
        """Length of each latent's decoder row in each model."""
        return self.W_dec.norm(dim=2)

    def describe(self) -> dict[str, Any]:
        """What it is, as plain values for a manifest or a table."""
        return {
            "d_model": self.d_model,
            "n_latents": self.n_latents,
            "activation": self.activation,
            "k": self.k,
            "models": self.models,
            "view": self.view,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            **self.layout.describe(),
            **({"input_norm": self.input_norm} if self.input_norm else {}),
            "dtype": str(self.dtype).removeprefix("torch."),
            "metadata": self.metadata,
        }

    def extra_repr(self) -> str:
        """One line for `repr`."""
        k = "" if self.k is None else f", k={self.k}"
        return f"d_model={self.d_model}, n_latents={self.n_latents}, {self.activation}{k}, view={self.view}"

    def flatten_input(self, x: Tensor) -> Float[Tensor, "tokens features"]:
        """Check the shape and join the models' activations side by side.

        Raises:
            DictionaryError: `x` is not [tokens, d_model] (one model) or [tokens, models, d_model].
        """
        fits = x.shape[1:] == (self.models, self.d_model) or (
            self.models == 1 and x.shape[1:] == (self.d_model,)
        )
        if x.ndim < 2 or not fits:
            short = "[tokens, d_model] or " if self.models == 1 else ""
            raise DictionaryError(
                "The activations do not have the width of the dictionary",
                expected=f"{short}[tokens, {self.models}, {self.d_model}]",
                found=f"shape {list(x.shape)}",
                fix="Use a dictionary trained on this model and site; flatten batch and sequence into tokens",
            )
        return x.reshape(x.shape[0], self.models * self.d_model)

    def encode(self, x: Float[Tensor, "tokens *models d_model"], *, check: bool = True) -> Codes:
        """Read activations into sparse codes, in tiles of tokens.

        Args:
            x: `[tokens, d_model]` for one model, `[tokens, models, d_model]` for any number; of any dtype.
            check: Refuse NaN and infinity, for which an accelerator must be waited for.

        Returns:
            Ordered codes in the dtype of the weights. Differentiable, with the selection held fixed.

        Raises:
            DictionaryError: The width is wrong.
            NumericsError: `x` holds NaN or infinity; names the first such row.
        """
        flat = self.flatten_input(x)
        if check:
            check_finite(flat)
        norm = None
        if self.input_norm is not None:
            flat, norm = normalise(flat, self.models, self.input_norm)
        tile = max(1, TILE_BYTES // (self.n_latents * self.W_enc.element_size()))
        keep_graph = torch.is_grad_enabled() and (flat.requires_grad or self.W_enc.requires_grad)
        scratch = None if keep_graph else self.W_enc.new_empty(min(tile, flat.shape[0]), self.n_latents)
        parts = []
        for rows in flat.split(tile):
            pre = self.pre_activations(rows, None if scratch is None else scratch[: rows.shape[0]])
            parts.append(select(pre, self.activation, k=self.k, threshold=self.threshold))
        codes = Codes.concatenate(parts)
        return codes if norm is None else replace(codes, norm=norm)

    def pre_activations(
        self, flat: Float[Tensor, "tokens features"], out: Tensor | None = None
    ) -> Float[Tensor, "tokens latents"]:
        """What the selection rule sees, for activations joined by `flatten_input`; one matrix product.

        For gated it is the magnitude where the gate is open and 0 elsewhere. `flat` is normalised already where
        the dictionary has an `input_norm`.

        The bias is subtracted from the activations, before the cast, and not folded into `b_enc`: that costs
        one pass over `x` (under 1 % of the product) and keeps its precision when the weights are bfloat16.
        """
        if self.apply_b_dec_to_input:
            flat = flat - self.b_dec.view(-1)
        weight = self.W_enc.view(self.models * self.d_model, self.n_latents)
        flat = flat.to(weight.dtype)
        if self.activation == "gated":
            return gate(flat @ weight, self.b_gate, self.r_mag, self.b_mag)
        if out is None:
            return torch.addmm(self.b_enc, flat, weight)
        with torch.no_grad():
            return torch.addmm(self.b_enc, flat, weight, out=out)

    def decode(self, codes: Codes) -> Float[Tensor, "tokens *models d_model"]:
        """Write codes back: the weighted sum of the decoder rows of the active latents.

        Returns:
            `[tokens, d_model]` for one model, else `[tokens, models, d_model]`.

        Raises:
            DictionaryError: The codes come from a dictionary of another size, or lack what its input_norm took out.
        """
        if codes.n_latents != self.n_latents:
            raise DictionaryError(
                "These codes come from another dictionary",
                expected=f"{self.n_latents} latents",
                found=f"{codes.n_latents}",
                fix="Decode with the dictionary that encoded",
            )
        rows = self.gather(codes.crow, codes.indices, codes.values) + self.b_dec.view(-1)
        if self.input_norm is not None:
            if codes.norm is None:
                raise DictionaryError(
                    f"These codes do not say what {self.input_norm} took out of each token",
                    fix="Decode what `encode` of this dictionary gave; codes made by hand need `norm`",
                )
            rows = restore(rows, codes.norm)
        return rows if self.models == 1 else rows.view(-1, self.models, self.d_model)

    def gather(self, crow: Tensor, indices: Tensor, values: Tensor) -> Float[Tensor, "tokens features"]:
        """Sum of decoder rows per token, without the bias; never a `[tokens, latents]` matrix."""
        weight = self.W_dec.view(self.n_latents, self.models * self.d_model)
        return F.embedding_bag(
            indices,
            weight,
            crow,
            mode="sum",
            per_sample_weights=values.to(weight.dtype),
            include_last_offset=True,
        )

    def forward(self, x: Float[Tensor, "tokens *models d_model"]) -> tuple[Tensor, Codes]:
        """Encode and decode.

        Returns:
            The reconstruction, in the shape of `x`, and the codes.
        """
        codes = self.encode(x)
        return self.decode(codes).view(x.shape), codes

    def prefix(self, n_latents: int) -> Dictionary:
        """The nested dictionary of the first latents; batch_topk keeps its threshold, topk at most k of them.

        Args:
            n_latents: One of `prefixes`.

        Returns:
            A dictionary for inference, which shares what memory it can.

        Raises:
            DictionaryError: This dictionary was not trained to be cut there.
        """
        from palimpsest.dictionaries.native import first_latents

        return first_latents(self, n_latents)

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the native format; see `palimpsest.dictionaries.native.save`."""
        from palimpsest.dictionaries.native import save

        return save(self, path, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Dictionary:
        """Read a dictionary from a folder or a hub id; see `palimpsest.dictionaries.load_dictionary`."""
        from palimpsest.dictionaries.formats.load import load_dictionary

        return load_dictionary(path, device=device, dtype=dtype, revision=revision)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        token: str | None = None,
        licence: str | None = None,
        to: str = "palimpsest",
    ) -> str:
        """Upload with a card; see `palimpsest.dictionaries.push_dictionary`."""
        from palimpsest.dictionaries.publish import push_dictionary

        return push_dictionary(self, repo_id, private=private, token=token, licence=licence, to=to)
