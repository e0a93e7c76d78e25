"""SAELens folders (version 6 and later): `cfg.json` + `sae_weights.safetensors`, read and written.

Source: `sae_lens/saes/sae.py` and its siblings (https://github.com/decoderesearch/SAELens).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.artifacts import disk
from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.dictionaries.fold import fold, fold_scale
from palimpsest.dictionaries.native import build, own_vectors
from palimpsest.dictionaries.tensors import check_shapes, read_config, read_tensors
from palimpsest.errors import ArtifactError, DictionaryError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"

ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
"""SAELens' name of an architecture: ours of the activation."""

# Block-level hooks are what the sublayer adds to the residual stream, after its output norm where there is
# one; the dotted ones are the module's raw output.
HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out_post",
    "hook_attn_out": "attn_out_post",
    "mlp.hook_out": "mlp_out",
    "attn.hook_out": "attn_out",
    "attn.hook_z": "z",
}
"""TransformerLens' name of a hook inside a block: our name of the site."""

_WRITES = {
    "relu": "standard",
    "topk": "topk",
    "batch_topk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
_RESCALED = ("topk", "batchtopk", "matryoshka_batchtopk")
_KEPT = ("context_size", "prepend_bos", "dataset_path", "neuronpedia_id", "hook_head_index", "hf_hook_name")


def site_of_hook(hook_name: str | None) -> str | None:
    """`blocks.12.hook_resid_post` to `resid_post.12`; None for a hook that has no fixed meaning."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name or "")
    point = HOOKS.get(found[2]) if found else None
    return f"{point}.{found[1]}" if found and point else None


def hook_of_site(site: str | None) -> str | None:
    """`resid_post.12` to `blocks.12.hook_resid_post`; None for a site that has no such hook."""
    point, _, layer = (site or "").rpartition(".")
    hooks = {ours: theirs for theirs, ours in HOOKS.items()}
    return f"blocks.{layer}.{hooks[point]}" if point in hooks and layer.isdigit() else None


def matches(path: Path) -> bool:
    """Whether a folder looks like a SAELens dictionary."""
    return (path / WEIGHTS_FILE).exists() or (path / CONFIG_FILE).exists()


def read(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Dictionary:
    """Read a SAELens folder; linear conventions are folded into the weights.

    Raises:
        DictionaryError: The architecture or a normalisation cannot be read exactly, or the files are damaged.
    """
    config = read_config(path / CONFIG_FILE)
    architecture = _architecture(config, path)
    weights = read_tensors(path / WEIGHTS_FILE, device)
    d_model, n_latents = _size(config, "d_in", path), _size(config, "d_sae", path)
    if (running := weights.pop("topk_threshold", None)) is not None:
        weights["threshold"] = running.to(weights["W_enc"].dtype).expand(n_latents)
    activation = ARCHITECTURES[architecture]
    _require(weights, d_model, n_latents, activation, path)
    weights["W_enc"], weights["W_dec"] = weights["W_enc"][None], weights["W_dec"][:, None]
    weights["b_dec"] = weights["b_dec"][None]
    fields = {
        "d_model": d_model,
        "n_latents": n_latents,
        "activation": activation,
        "k": config.get("k") if architecture in _RESCALED else None,
        "models": 1,
        "view": "base",
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", True)),
        "prefixes": tuple(config.get("matryoshka_widths") or ()),
    }
    scale = _input_scale(config, path)
    if architecture in _RESCALED and config.get("rescale_acts_by_decoder_norm", False):
        if running is not None:
            weights["threshold"] = running
        weights = fold(fields, weights, scale=scale)
    elif scale is not None:
        weights = fold_scale(weights, scale)
    return build(fields, weights, path, metadata=_metadata(config), dtype=dtype)


def _architecture(config: Mapping[str, Any], path: Path) -> str:
    """The architecture, once everything that could not be read exactly is refused."""
    if "metadata" not in config:
        raise DictionaryError(
            f"{path / CONFIG_FILE} is a configuration of SAELens before version 6",
            expected="a `metadata` entry",
            fix="Load and save it once with SAELens 6",
        )
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise DictionaryError(
            f"{path} has an architecture that cannot be read",
            expected=", ".join(ARCHITECTURES),
            found=architecture,
        )
    normalisation = config.get("normalize_activations", "none")
    scaled = normalisation == "expected_average_only_in" and (path / SCALER_FILE).exists()
    if normalisation != "none" and not scaled:
        why = (
            f"its scale was not saved in {SCALER_FILE}; save it with save_inference_model"
            if normalisation == "expected_average_only_in"
            else "it rescales every token, which weights cannot express"
        )
        raise DictionaryError(
            f"{path} was trained with a normalisation of its inputs that cannot be reproduced",
            expected="normalize_activations none",
            found=normalisation,
            fix=f"{normalisation}: {why}",
        )
    return architecture


def _size(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DictionaryError(f"{path / CONFIG_FILE} gives no {key}", expected="a whole number", found=value)
    return value


def _require(
    weights: Mapping[str, Tensor], d_model: int, n_latents: int, activation: str, path: Path
) -> None:
    """Check SAELens' own shapes first, so that an error shows what is in the file."""
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_model, n_latents),
        "W_dec": (n_latents, d_model),
        "b_dec": (d_model,),
    }
    check_shapes(weights, shapes | {name: (n_latents,) for name in own_vectors(activation)}, path)


def _input_scale(config: Mapping[str, Any], path: Path) -> Tensor | None:
    """What their training multiplied activations by, where it was saved beside the weights."""
    if config.get("normalize_activations", "none") != "expected_average_only_in":
        return None
    scale = read_config(path / SCALER_FILE).get("scaling_factor")
    if not isinstance(scale, int | float) or not scale > 0:
        raise DictionaryError(
            f"{path / SCALER_FILE} gives no scale", expected="a number above 0", found=scale
        )
    return torch.tensor([scale], dtype=torch.float64)


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Their description in our words; what has no word of ours stays under `saelens`."""
    theirs = dict(config.get("metadata") or {})
    ours = {
        "model": theirs.get("model_name"),
        "site": site_of_hook(theirs.get("hook_name")),
        "format": "SAELens",
        "saelens": {
            "architecture": config["architecture"],
            **{name: theirs[name] for name in ("hook_name", *_KEPT) if theirs.get(name) is not None},
        },
    }
    return {name: value for name, value in ours.items() if value is not None}


def save_saelens(dictionary: Dictionary, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a single-model dictionary so that `SAE.load_from_disk` reads it; batch_topk becomes jumprelu.

    Raises:
        DictionaryError: It reads several models, or the folder already holds a dictionary.
        ArtifactError: The folder cannot be written or the disk is full.
    """
    folder = Path(path)
    if dictionary.models != 1:
        raise DictionaryError(
            "SAELens has no dictionaries that read two models", fix="Save it in the native format"
        )
    if matches(folder) and not overwrite:
        raise DictionaryError(f"{folder} already holds a dictionary", fix="Pass overwrite=True")
    architecture = _WRITES[dictionary.activation]
    tensors = {
        "W_enc": dictionary.W_enc[0],
        "W_dec": dictionary.W_dec[:, 0],
        "b_dec": dictionary.b_dec[0],
        **{name: getattr(dictionary, name) for name in own_vectors(dictionary.activation)},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"Cannot make the folder {folder}", found=error.strerror) from error
    with disk.replacing(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary)
    disk.write_bytes(folder / CONFIG_FILE, disk.to_json(_config(dictionary, architecture)))
    return folder


def _config(dictionary: Dictionary, architecture: str) -> dict[str, Any]:
    """SAELens' `cfg.json`."""
    kept = dict(dictionary.metadata.get("saelens") or {})
    kept.pop("architecture", None)
    config: dict[str, Any] = {
        "d_in": dictionary.d_model,
        "d_sae": dictionary.n_latents,
        "dtype": str(dictionary.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "sae_lens_training_version": None,
            "model_name": dictionary.metadata.get("model"),
            "hook_name": hook_of_site(dictionary.site),
            **kept,
        },
        "architecture": architecture,
    }
    if architecture == "topk":
        config |= {"k": int(dictionary.k or 0), "rescale_acts_by_decoder_norm": False}
    return config
