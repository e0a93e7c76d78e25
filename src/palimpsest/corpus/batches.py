"""From documents to batches of tensors: length-bucketed for audits, packed for dictionary training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from palimpsest.corpus.tokenize import Document, Role
from palimpsest.errors import ConfigError

_COLUMNS = 4


@dataclass(frozen=True)
class TokenBatch:
    """Sequences side by side, padded on the right.

    Attributes:
        input_ids: Token ids, long.
        attention_mask: False on padding.
        keep: Tokens to measure.
        document: Index of each token's document, -1 on padding.
        role: Value of `Role` of each token, `Role.TEMPLATE` on padding.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    keep: Bool[Tensor, "batch seq"]
    document: Int[Tensor, "batch seq"]
    role: Int[Tensor, "batch seq"]

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The batch on another device."""
        moved = (self.input_ids, self.attention_mask, self.keep, self.document, self.role)
        return TokenBatch(*(tensor.to(device, non_blocking=True) for tensor in moved))


@dataclass(frozen=True)
class Masking:
    """Which tokens `keep` marks, and what fills the rest.

    Attributes:
        pad_id: Token id on padding.
        roles: Roles to measure; None measures all but TEMPLATE.
        all_positions: Measure every token that is no padding, special and template ones too.
    """

    pad_id: int
    roles: tuple[Role, ...] | None = None
    all_positions: bool = False

    def keep(self, roles: np.ndarray, special: np.ndarray) -> np.ndarray:
        """Bool mask over tokens, of the shape of `roles` and `special`."""
        if self.all_positions:
            return np.ones(roles.shape, bool)
        chosen = roles != Role.TEMPLATE if self.roles is None else np.isin(roles, self.roles)
        return chosen & ~special


def bucketed(
    documents: Iterable[Document], masking: Masking, tokens_per_batch: int, window: int
) -> Iterator[TokenBatch]:
    """Batches of whole documents of similar length; each document appears once.

    Documents are sorted by length inside a window, longest first, so memory depends on `window` and
    `tokens_per_batch` alone. A document longer than the budget is a batch of its own.

    Args:
        documents: Any stream.
        masking: Fills `keep`.
        tokens_per_batch: Tokens of a batch at most, padding included.
        window: Documents that are held at once.
    """
    _positive(tokens_per_batch=tokens_per_batch, window=window)
    documents = iter(documents)
    while held := list(islice(documents, window)):
        held.sort(key=len, reverse=True)
        start = 0
        while start < len(held):
            size = max(1, tokens_per_batch // len(held[start]))
            rows = [_columns(document) for document in held[start : start + size]]
            yield _batch(rows, len(held[start]), masking)
            start += size


def packed(
    passes: Callable[[], Iterable[Document]],
    masking: Masking,
    block_length: int,
    *,
    batch_size: int,
    epochs: int | None,
    bos_id: int | None,
) -> Iterator[TokenBatch]:
    """Batches of full blocks cut from the documents' tokens laid end to end.

    With a BOS every block begins with one: where a document is cut, a BOS with that document's index is put
    before its rest, since models treat the first position of a sequence unlike any other. Only the last block
    of the last epoch is padded.

    Args:
        passes: Starts a pass over the documents.
        masking: Fills `keep`.
        block_length: Tokens of a block.
        batch_size: Blocks of a batch.
        epochs: Passes over the corpus; None never ends.
        bos_id: The tokenizer's BOS, or None.
    """
    _positive(block_length=block_length - (bos_id is not None), batch_size=batch_size)
    rest = np.empty((0, _COLUMNS), np.int32)
    blocks: list[np.ndarray] = []
    for _ in count() if epochs is None else range(epochs):
        for document in passes():
            rest = np.concatenate([rest, _columns(document)])
            while len(rest) >= block_length:
                block, rest = _cut_block(rest, block_length, bos_id)
                blocks.append(block)
                if len(blocks) == batch_size:
                    yield _batch(blocks, block_length, masking)
                    blocks = []
    if len(rest):
        blocks.append(_cut_block(rest, block_length, bos_id)[0])
    if blocks:
        yield _batch(blocks, block_length, masking)


def _cut_block(rest: np.ndarray, length: int, bos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    if bos_id is None or rest[0, 0] == bos_id:
        return rest[:length], rest[length:]
    bos = np.array([[bos_id, Role.TEMPLATE, 1, rest[0, 3]]], np.int32)
    return np.concatenate([bos, rest[: length - 1]]), rest[length - 1 :]


def _columns(document: Document) -> np.ndarray:
    """int32 [seq, 4]: id, role, special, document index."""
    index = np.full(len(document), document.index, np.int32)
    return np.stack([document.token_ids, document.roles, document.special, index], axis=1).astype(np.int32)


def _batch(rows: Sequence[np.ndarray], width: int, masking: Masking) -> TokenBatch:
    cells = np.empty((len(rows), width, _COLUMNS), np.int64)
    cells[:] = (masking.pad_id, Role.TEMPLATE, 1, -1)
    present = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        cells[i, : len(row)] = row
        present[i, : len(row)] = True
    keep = masking.keep(cells[..., 1], cells[..., 2].astype(bool)) & present
    ids, roles, documents = (torch.from_numpy(cells[..., column].copy()) for column in (0, 1, 3))
    return TokenBatch(ids, torch.from_numpy(present), torch.from_numpy(keep), documents, roles)


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is too small", expected="at least 1", found=size)
