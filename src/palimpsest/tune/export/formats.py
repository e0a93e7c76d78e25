"""The files that vectors are exported to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.errors import ConfigError
from palimpsest.tune.export.vectors import Vectors

_ARCHITECTURES = {"gpt_neox": "gptneox", "mistral": "llama"}


class Format(NamedTuple):
    """One format.

    Attributes:
        suffixes: Ends of its files' names.
        check: Refuses vectors that it cannot hold; returns notes.
        write: Writes the file.
    """

    suffixes: tuple[str, ...]
    check: Callable[[Vectors], list[str]]
    write: Callable[[Vectors, Path], None]


def _hookpoints(vectors: Vectors) -> dict[str, Tensor]:
    """The vectors by the name of the module whose output they are added to, inside the base without its head."""
    model: Any = vectors.model
    names = {id(module): name for name, module in model.base_model.named_modules()}
    found: dict[str, Tensor] = {}
    for site, vector in vectors.by_site.items():
        tap = vectors.sites.tap(site)
        if tap.side != "output" or id(tap.module) not in names:
            raise ConfigError(
                f"Steered models add to the output of a module, and {site} is none",
                expected="sites such as resid_post.13, mlp_out.13 or attn_out.13",
                fix="Export with --to vector",
            )
        found[names[id(tap.module)]] = vector
    return found


def _check_steered(vectors: Vectors) -> list[str]:
    _hookpoints(vectors)
    return []


def _write_steered(vectors: Vectors, path: Path) -> None:
    """What lm-evaluation-harness reads with `--model steered`: a pickle of tensors, numbers and text only."""
    steer = {
        name: {
            "action": "add",
            "steering_coefficient": 1.0,
            "steering_vector": vector.clone(),
            "bias": None,
            "head_index": None,
        }
        for name, vector in _hookpoints(vectors).items()
    }
    torch.save(steer, path)


def _layers(vectors: Vectors) -> dict[int, Tensor]:
    """The vectors by layer, for llama.cpp, which adds `direction.N` to what leaves layer N, counted from 0.

    Source: `llama_adapter_cvec` and `common_control_vector_load` of llama.cpp: layer 0 has no place.
    """
    found = {}
    for site, vector in vectors.by_site.items():
        name, _, layer = site.partition(".")
        if name != "resid_post" or not layer.isdigit() or int(layer) == 0:
            raise ConfigError(
                f"A control vector of llama.cpp is added to what leaves a layer, and cannot be added at {site}",
                expected="resid_post.1 or a later layer's",
                found=site,
                fix="Export with --to vector or --to steered",
            )
        found[int(layer)] = vector
    return found


def _check_gguf(vectors: Vectors) -> list[str]:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Control vectors need the gguf package", fix="Install it: pip install 'palimpsest-lm[gguf]'"
        ) from error
    _layers(vectors)
    return []


def _write_gguf(vectors: Vectors, path: Path) -> None:
    from gguf import GGUFWriter

    layers = _layers(vectors)
    kind = str(vectors.model.config.model_type)
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", _ARCHITECTURES.get(kind, kind))
    writer.add_uint32("controlvector.layer_count", max(layers))
    width = len(next(iter(layers.values())))
    # Some readers stop at the first layer that is absent.
    for layer in range(1, max(layers) + 1):
        vector = layers.get(layer, torch.zeros(width))
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vector(vectors: Vectors, path: Path) -> None:
    about = {"format": "pt", "component": vectors.component, "base": Path(vectors.base).name}
    save_file({site: vector.contiguous() for site, vector in vectors.by_site.items()}, path, metadata=about)


FORMATS = {
    "steered": Format((".pt", ".pth"), _check_steered, _write_steered),
    "gguf": Format((".gguf",), _check_gguf, _write_gguf),
    "vector": Format((".safetensors",), lambda vectors: [], _write_vector),
}
"""Every format by the name that `--to` takes."""
