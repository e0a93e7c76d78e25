"""The dictionaries of adapters: frozen, loaded once for all adapters that use them, known by their weights' hash."""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.errors import DictionaryError

MEMORY = "memory:"
"""Begins the name of a dictionary that was given as an object and may exist in no file."""

_given: dict[str, Dictionary] = {}


def weights_hash(dictionary: Dictionary) -> str:
    """SHA-256 over names, shapes, types and bytes of a dictionary's weights, and over how it encodes."""
    made = dictionary
    how = (made.view, made.activation, made.k, made.apply_b_dec_to_input, made.input_norm)
    digest = hashlib.sha256(" ".join(map(str, how)).encode())
    weights = dict(dictionary.named_parameters()) | dict(dictionary.named_buffers())
    for name, tensor in sorted(weights.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f" {name} {tuple(plain.shape)} {plain.dtype} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keep_in_memory(dictionary: Dictionary) -> str:
    """Give a dictionary object a name that a configuration can hold, for this process."""
    name = MEMORY + weights_hash(dictionary)[:16]
    _given[name] = dictionary
    return name


def frozen_dictionary(
    name: str,
    dtype: str | None,
    folder: Path | None,
    known: MutableMapping[tuple[str, str | None], Dictionary],
) -> tuple[Dictionary, str]:
    """A dictionary whose weights are buffers that are never saved, and the hash of the weights as stored.

    Args:
        name: As `load_dictionary` takes it, or of `keep_in_memory`.
        dtype: Of the weights; as stored when absent.
        folder: The adapter's folder: a path that does not exist from here is tried from there.
        known: Those of the same model, by hash and type; one that is there is used, a new one is added. Models do not
            share: moving one would move the other's.

    Raises:
        DictionaryError: It cannot be read, or reads more than one model.
    """
    original = _given.get(name) if name.startswith(MEMORY) else load_dictionary(_path(name, folder))
    if original is None:
        raise DictionaryError(
            "The adapter was made with a dictionary that was in memory only",
            found=name,
            fix="Save the dictionary, and name its folder in `target_hooks` of the configuration",
        )
    if original.models != 1 or original.view not in ("base", "tuned"):
        raise DictionaryError(
            f"The dictionary {name} does not read the activations of one model",
            expected="a sparse autoencoder of one model",
            found=f"a dictionary of view {original.view}",
            fix="Train one with `palimpsest train sae`",
        )
    digest = weights_hash(original)
    key = (digest, dtype)
    made = known.get(key)
    if made is None:
        made = known[key] = _frozen(original, getattr(torch, dtype) if dtype else original.dtype)
    return made, digest


def _path(name: str, folder: Path | None) -> str:
    if folder is None or Path(name).exists():
        return name
    near = next((one for one in (folder / name, folder.parent / name) if one.exists()), None)
    return name if near is None else str(near)


def _frozen(original: Dictionary, dtype: torch.dtype) -> Dictionary:
    """A copy of the object around the same memory, with buffers in place of parameters."""
    fields = {
        name: value
        for name, value in original.describe().items()
        if name not in ("dtype", "metadata", "d_model", "n_latents")
    }
    with torch.device("meta"):
        made = Dictionary(original.d_model, original.n_latents, **fields, metadata=original.metadata)
    weights: dict[str, Tensor] = dict(original.named_parameters()) | dict(original.named_buffers())
    for name in list(dict(made.named_parameters())):
        delattr(made, name)
    for name, tensor in weights.items():
        made.register_buffer(name, tensor.detach().to(dtype), persistent=False)
    return made.eval()


__all__ = ["MEMORY", "frozen_dictionary", "keep_in_memory", "weights_hash"]
