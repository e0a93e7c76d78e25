r"""How every token of a tokenizer is shown: with its own spaces, and with bytes that are no text written as \xNN."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Byte by the character that byte-level tokenizers write for it.

    Printable bytes stand for themselves; the others follow from U+0100 on. Source: GPT-2's `bytes_to_unicode`, as
    the Hugging Face tokenizers library documents it for its ByteLevel pre-tokenizer.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(rest)}


ALPHABET = _byte_alphabet()


def token_texts(tokenizer: Any, ids: Sequence[int] | None = None) -> list[str]:
    """Tokens as text that is fit for UTF-8; a number in brackets for an id without a token.

    Args:
        tokenizer: Of the model.
        ids: The tokens; every id up to the tokenizer's last by default.
    """
    wanted = range(id_count(tokenizer)) if ids is None else ids
    if ids is None:
        pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    else:
        pieces = {number: tokenizer.convert_ids_to_tokens(number) for number in {*ids}}
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    byte_level = is_byte_level(tokenizer)
    return [_text(number, pieces.get(number), added, byte_level) for number in wanted]


def id_count(tokenizer: Any) -> int:
    """Ids up to the last one that has a token: more than there are tokens, where some ids have none."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def is_byte_level(tokenizer: Any) -> bool:
    """Whether pieces are written in the alphabet of bytes."""
    decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    if "ByteLevel" in decoder or "Metaspace" in decoder or "▁" in decoder:
        return "ByteLevel" in decoder
    # Without a description: a space is Ġ there, and ▁ with SentencePiece.
    marks = [sum(piece.startswith(mark) for piece in tokenizer.get_vocab()) for mark in ("Ġ", "▁")]
    return marks[0] > marks[1]


def _text(number: int, piece: str | None, added: dict[int, str], byte_level: bool) -> str:
    if number in added:
        return _valid(added[number])
    if piece is None:
        return f"⟨{number}⟩"
    if byte_level and all(char in ALPHABET for char in piece):
        return bytes(ALPHABET[char] for char in piece).decode("utf-8", "backslashreplace")
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)]).decode("utf-8", "backslashreplace")
    return _valid(piece if byte_level else piece.replace("▁", " "))


def _valid(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
