"""A few whole documents beside the activations, by which a store is held against a live model."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PROBE = "probe.safetensors"
"""The file of a store that holds the probe."""

PROBE_DOCUMENTS = 4
"""Rows of tokens that a probe holds."""

PROBE_TOKENS = 1024
"""Tokens of a probe at most; of a longer document its beginning is kept, which a causal model reads alike."""


class Probe(NamedTuple):
    """Token rows as the model was given them, padding, BOS and special tokens included.

    Attributes:
        input_ids: Token ids, right-padded.
        attention_mask: False on padding.
        keep: Tokens whose activations the store holds.
        document: Document of each token, -1 on padding; a kept token's place in its row is its `position` in the store.
        compute: Type of the weights that the activations were computed with, as `float32`.
    """

    input_ids: Int[Tensor, "documents seq"]
    attention_mask: Bool[Tensor, "documents seq"]
    keep: Bool[Tensor, "documents seq"]
    document: Int[Tensor, "documents seq"]
    compute: str


class ProbeRows:
    """Collects the first rows of a harvest until a probe is full.

    Args:
        documents: Rows wanted.
        tokens: Tokens wanted at most, shared out evenly.
    """

    def __init__(self, documents: int = PROBE_DOCUMENTS, tokens: int = PROBE_TOKENS) -> None:
        self.documents, self.width = documents, tokens // documents
        self.compute = ""
        self._rows: list[list[Tensor]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Bool[Tensor, "batch seq"],
        keep: Bool[Tensor, "batch seq"],
        document: Int[Tensor, "batch seq"],
        compute: str,
    ) -> None:
        """Take the first rows that keep something, as far as there is room."""
        self.compute = compute
        for row in range(len(input_ids)):
            columns = [
                column[row, : self.width].cpu() for column in (input_ids, attention_mask, keep, document)
            ]
            if len(self) < self.documents and bool(columns[2].any()):
                # Padding is cut, and put back to the width of the longest row of the probe.
                length = int(columns[1].nonzero().max()) + 1
                self._rows.append([column[:length].clone() for column in columns])

    def tensors(self) -> dict[str, Tensor]:
        """The probe as tensors of one width."""
        width = max(len(row[0]) for row in self._rows)
        fills = (0, False, False, -1)
        names = ("input_ids", "attention_mask", "keep", "document")
        found = {}
        for column, (name, fill) in enumerate(zip(names, fills, strict=True)):
            dtype = torch.bool if isinstance(fill, bool) else torch.int32
            found[name] = torch.full((len(self), width), fill, dtype=dtype)
            for row, columns in enumerate(self._rows):
                found[name][row, : len(columns[column])] = columns[column]
        return found
