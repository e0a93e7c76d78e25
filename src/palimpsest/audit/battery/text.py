"""The battery's documents: chosen once, kept as token ids, so that every later audit reads the very same tokens."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from palimpsest.artifacts import disk
from palimpsest.corpus import Corpus, Document, Role, TokenBatch
from palimpsest.corpus.batches import Masking, bucketed
from palimpsest.errors import CorpusError

MINIMUM_DOCUMENTS = 10
"""Documents below which an interval over documents says nothing."""


class Chosen(NamedTuple):
    """The documents of one corpus: audited ones and those that only nulls are trained on."""

    audited: list[Document]
    aside: list[Document]
    tokens: int
    bad_rows: int


@dataclass(frozen=True)
class BatteryText:
    """The audited documents of one corpus, readable like a `Corpus`.

    Attributes:
        name: The corpus' name.
        sources: Where the text came from.
        path: File of token ids.
        masking: Which tokens are measured.
    """

    name: str
    sources: list[str]
    path: Path
    masking: Masking

    def batches(self, tokens_per_batch: int = 4096, window: int = 512) -> Iterator[TokenBatch]:
        """Batches of whole documents of similar length, in the same order at every call."""
        return bucketed(load_documents(self.path), self.masking, tokens_per_batch, window)


def text_key(document: Document) -> bytes:
    """What two copies of a document share."""
    return hashlib.blake2b(document.token_ids.astype(np.int32).tobytes(), digest_size=16).digest()


def choose(
    corpus: Corpus,
    masking: Masking,
    *,
    share: float,
    tokens: int,
    aside_tokens: int,
    known: set[bytes] | None = None,
) -> Chosen:
    """Split a corpus' documents into audited and set-aside ones, each up to its number of tokens.

    Documents alternate in the proportion of `share`, so that both parts are spread over the whole corpus. Those in
    `known` (by `text_key`) are left out, and what is read is added to it.

    Raises:
        CorpusError: Too few documents for intervals, or a row cannot be read.
    """
    audited: list[Document] = []
    aside: list[Document] = []
    measured = held = seen = copies = 0
    full, aside_full = False, share == 0
    known = set() if known is None else known
    for document in corpus.documents():
        kept = int(masking.keep(document.roles, document.special.astype(bool)).sum())
        text = text_key(document)
        # A second copy could land in the other part: nulls would be trained on what is audited.
        copies += kept > 0 and text in known
        if kept == 0 or text in known:
            continue
        known.add(text)
        seen += 1
        to_aside = int(seen * share + 1e-9) > int((seen - 1) * share + 1e-9)
        if to_aside and held + len(document) <= aside_tokens:
            aside.append(_numbered(document, len(aside)))
            held += len(document)
        elif not to_aside and measured + kept <= tokens:
            audited.append(_numbered(document, len(audited)))
            measured += kept
        else:
            full, aside_full = full or not to_aside, aside_full or to_aside
        if full and aside_full:
            break
    if len(audited) < MINIMUM_DOCUMENTS:
        raise CorpusError(
            f"The corpus {corpus.name} has too few documents for a battery",
            expected=f"at least {MINIMUM_DOCUMENTS} audited documents",
            found=f"{len(audited)} audited ({measured} tokens), {len(aside)} set aside, "
            f"{copies} copies of others left out",
            fix="Give more documents, or raise --tokens, or lower --set-aside",
        )
    return Chosen(audited, aside, measured, corpus.stats.bad_rows)


def save_documents(path: Path, documents: list[Document]) -> None:
    """Write documents as flat arrays and their borders, atomically."""
    lengths = np.array([len(document) for document in documents], np.int64)

    def flat(field: str, dtype: type) -> np.ndarray:
        parts = [getattr(document, field) for document in documents]
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

    arrays = {
        "token_ids": flat("token_ids", np.int32),
        "roles": flat("roles", np.uint8),
        "special": flat("special", np.uint8),
        "borders": np.concatenate([[0], lengths.cumsum()]),
    }
    with disk.replacing(path) as temporary:
        save_file(arrays, temporary)


def load_documents(path: Path) -> list[Document]:
    """Documents that `save_documents` wrote."""
    arrays = load_file(path)
    borders = arrays["borders"]
    fields = (arrays["token_ids"], arrays["roles"], arrays["special"].astype(bool))
    return [
        Document(index, *(array[start:end] for array in fields))
        for index, (start, end) in enumerate(zip(borders[:-1], borders[1:], strict=True))
    ]


def packed_blocks(documents: list[Document], block_length: int, eos: int | None) -> torch.Tensor:
    """Whole blocks `[blocks, seq]` of documents laid end to end, for training; the last rest is left out."""
    parts = []
    for document in documents:
        parts.append(document.token_ids)
        if eos is not None and document.token_ids[-1] != eos:
            parts.append(np.array([eos], np.int32))
    stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    blocks = len(stream) // block_length
    return torch.from_numpy(stream[: blocks * block_length].astype(np.int64)).view(blocks, block_length)


def masking_entry(masking: Masking) -> dict[str, object]:
    """The masking as JSON."""
    roles = None if masking.roles is None else [role.name.lower() for role in masking.roles]
    return {"pad_id": masking.pad_id, "roles": roles, "all_positions": masking.all_positions}


def masking_of(entry: dict[str, object]) -> Masking:
    """The inverse of `masking_entry`."""
    roles = entry["roles"]
    chosen = None if roles is None else tuple(Role[str(role).upper()] for role in roles)  # pyright: ignore
    return Masking(int(str(entry["pad_id"])), chosen, bool(entry["all_positions"]))


def _numbered(document: Document, index: int) -> Document:
    return Document(index, document.token_ids, document.roles, document.special)
