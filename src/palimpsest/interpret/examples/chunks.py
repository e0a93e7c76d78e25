"""Pieces of the corpus as the latents saw it: tokens, and codes ordered by latent, on disk until the end of a run.

Everything after the forward passes reads these: statistics while they are made, examples, windows and token counts
once all of them are there. An interrupted run reads the finished ones instead of running the models again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from palimpsest.artifacts import disk
from palimpsest.corpus import TokenBatch
from palimpsest.dictionaries import Codes
from palimpsest.errors import NumericsError

CHUNK_TOKENS = 1 << 16
CHUNK_ENTRIES = 3 << 20
"""A chunk is closed when it holds this many tokens or codes: about 200 MB while it is put in order."""


@dataclass(frozen=True)
class Batch:
    """What the models left of one batch.

    Attributes:
        tokens: The text.
        measured: Places of the measured tokens in the flattened batch.
        codes: Of each stored signal.
    """

    tokens: TokenBatch
    measured: Int[NDArray, " tokens"]
    codes: tuple[Codes, ...]

    @property
    def entries(self) -> int:
        """Stored codes."""
        return sum(len(one.values) for one in self.codes)


@dataclass(frozen=True)
class Chunk:
    """Whole documents of one corpus with their codes.

    Attributes:
        corpus: Number of the corpus.
        batches: How many batches it was made of.
        ids: Every token, unmeasured ones too, document after document.
        role: Value of `Role` of each token.
        measured: Which of them the dictionary read.
        starts: First token of each document; the last entry is the number of tokens.
        document: Number of each document in its corpus.
        content: A hash of each document's tokens.
        pointer: First entry of each latent; the last entry is the number of entries.
        slot: The token of each entry, ascending within a latent.
        signals: Each stored signal of each entry, 0 where it does not fire.
    """

    corpus: int
    batches: int
    ids: Int[NDArray, " slots"]
    role: Integer[NDArray, " slots"]
    measured: Bool[NDArray, " slots"]
    starts: Int[NDArray, " documents_and_one"]
    document: Int[NDArray, " documents"]
    content: Int[NDArray, " documents"]
    pointer: Int[NDArray, " latents_and_one"]
    slot: Int[NDArray, " entries"]
    signals: tuple[Float[NDArray, " entries"], ...]

    @property
    def value(self) -> Float[NDArray, " entries"]:
        """What examples are chosen by."""
        return value_of(self.signals)

    def save(self, path: Path) -> None:
        """Write it; it is there as a whole or not at all."""
        arrays = {name: getattr(self, name) for name in ("ids", "role", "starts", "document", "content")}
        arrays |= {"measured": self.measured.astype(np.uint8), "pointer": self.pointer, "slot": self.slot}
        arrays |= {f"signal{place}": one for place, one in enumerate(self.signals)}
        arrays["about"] = np.array([self.corpus, self.batches], np.int64)
        with disk.replacing(path) as temporary:
            save_file({key: np.ascontiguousarray(one) for key, one in arrays.items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> Chunk:
        """Read what `save` wrote."""
        return _chunk(load_file(path))

    @classmethod
    def load_latents(cls, path: Path, first: int, last: int) -> Chunk:
        """The tokens, and the codes of the latents `first` … `last - 1` only; `pointer` begins with `first`."""
        with safe_open(path, framework="np") as handle:
            names = list(handle.keys())
            pointer = handle.get_slice("pointer")[first : last + 1]
            begin, end = int(pointer[0]), int(pointer[-1])
            arrays = {}
            for name in names:
                if name != "slot" and not name.startswith("signal"):
                    arrays[name] = handle.get_tensor(name)
                elif begin < end:
                    arrays[name] = handle.get_slice(name)[begin:end]
                else:
                    # Of a tensor without elements no slice can be taken, not even an empty one.
                    arrays[name] = np.zeros(0, np.int32 if name == "slot" else np.float32)
        return _chunk(arrays | {"pointer": pointer - begin})


def _chunk(arrays: dict[str, NDArray]) -> Chunk:
    corpus, batches = arrays["about"].tolist()
    signals = tuple(arrays[key] for key in sorted(key for key in arrays if key.startswith("signal")))
    names = ("ids", "role", "starts", "document", "content", "pointer", "slot")
    plain = {name: arrays[name] for name in names}
    return Chunk(corpus, batches, measured=arrays["measured"].astype(bool), signals=signals, **plain)


def value_of(signals: Sequence[Float[NDArray, " entries"]]) -> Float[NDArray, " entries"]:
    """What examples are chosen by: the first of one or three signals, the larger of two (an SAE on two models)."""
    return np.maximum(signals[0], signals[1]) if len(signals) == 2 else signals[0]


def make_chunk(corpus: int, batches: Sequence[Batch], n_latents: int) -> Chunk:
    """Put the codes of some batches in order of their latents.

    Raises:
        NumericsError: The dictionary gives NaN or infinity.
    """
    text = [_text(batch.tokens) for batch in batches]
    joined = {
        key: np.concatenate([one[key] for one in text]) for key in ("ids", "role", "document", "content")
    }
    starts = np.concatenate([[0], np.concatenate([one["lengths"] for one in text]).cumsum()])
    slots, offset = [], 0
    for batch, one in zip(batches, text, strict=True):
        slots.append(one["place"][batch.measured] + offset)
        offset += len(one["ids"])
    slot_of_row = np.concatenate(slots).astype(np.int32)
    measured = np.zeros(offset, bool)
    measured[slot_of_row] = True
    codes = [_joined([batch.codes[place] for batch in batches]) for place in range(len(batches[0].codes))]
    pointer, row, signals = by_latent(codes, n_latents)
    return Chunk(
        corpus,
        len(batches),
        measured=measured,
        starts=starts.astype(np.int64),
        pointer=pointer,
        slot=slot_of_row[row],
        signals=signals,
        **joined,
    )


def _text(batch: TokenBatch) -> dict[str, NDArray]:
    """The tokens of a batch without padding, and where each place of the batch is among them."""
    there = batch.attention_mask.numpy()
    ids, lengths = batch.input_ids.numpy()[there].astype(np.int32), there.sum(1)
    ends = lengths.cumsum()
    content = [
        int.from_bytes(
            blake2b(ids[end - length : end].tobytes(), digest_size=8).digest(), "little", signed=True
        )
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]
    return {
        "ids": ids,
        "role": batch.role.numpy()[there].astype(np.uint8),
        "lengths": lengths,
        "document": batch.document.numpy()[:, 0].astype(np.int32),
        "content": np.array(content, np.int64),
        "place": there.reshape(-1).cumsum() - 1,
    }


class _Rows:
    """Positive codes in compressed rows."""

    def __init__(self, crow: NDArray, indices: NDArray, values: NDArray) -> None:
        self.crow, self.indices, self.values = crow, indices, values

    @property
    def lengths(self) -> NDArray:
        """Entries of each row."""
        return np.diff(self.crow)


def _joined(parts: Sequence[Codes]) -> _Rows:
    codes = Codes.concatenate(parts)
    crow, values = codes.crow.cpu().numpy(), codes.values.float().cpu().numpy()
    indices = codes.indices.int().cpu().numpy()
    if not np.isfinite(values.sum(dtype=np.float64)):
        raise NumericsError(
            "The dictionary gives codes that are NaN or infinite", fix="Check its weights, or train it again"
        )
    positive = values > 0
    if not positive.all():
        kept = np.concatenate([[0], positive.cumsum()])
        crow, indices, values = kept[crow], indices[positive], values[positive]
    return _Rows(crow, indices, values)


def by_latent(
    signals: Sequence[_Rows], n_latents: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[NDArray[np.float32], ...]]:
    """Rows of several signals as columns: entries by latent and then by row, one entry for all signals.

    Returns:
        Where each latent starts, the row of each entry, and each signal's value there.
    """
    from scipy.sparse import csr_matrix

    count, rows = len(signals), len(signals[0].crow) - 1
    lengths = np.stack([one.lengths for one in signals], 1).reshape(-1)
    # One row per token and signal, so that what one latent says of one token ends up side by side.
    crow = np.concatenate([[0], lengths.cumsum()])
    indices, values = np.empty(crow[-1], np.int32), np.empty(crow[-1], np.float32)
    for place, one in enumerate(signals):
        if count == 1:
            indices, values = one.indices, one.values
            break
        target = np.repeat(crow[place:-1:count] - one.crow[:-1], one.lengths)
        target += np.arange(len(one.values))
        indices[target], values[target] = one.indices, one.values
    columns = csr_matrix((values, indices, crow), shape=(rows * count, n_latents)).tocsc()
    pointer, place = np.asarray(columns.indptr, np.int64), np.asarray(columns.indices, np.int64)
    values = np.asarray(columns.data, np.float32)
    if count == 1:
        return pointer, place, (values,)
    row, signal = np.divmod(place, count)
    first = np.ones(len(row), bool)
    first[1:] = row[1:] != row[:-1]
    first[pointer[:-1][pointer[:-1] < len(row)]] = True
    entry = first.cumsum() - 1
    found = []
    for which in range(count):
        own = np.zeros(int(entry[-1]) + 1 if len(entry) else 0, np.float32)
        mine = signal == which
        own[entry[mine]] = values[mine]
        found.append(own)
    ends = np.concatenate([[0], first.cumsum()])
    return ends[pointer], row[first], tuple(found)
