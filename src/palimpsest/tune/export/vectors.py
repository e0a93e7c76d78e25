"""The vectors that a constant adapter adds, read from its folder without the base's weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from palimpsest.errors import ConfigError, DictionaryError
from palimpsest.models.adapters import recorded_base
from palimpsest.models.sites import SiteMap
from palimpsest.tune.adapter.components import make_component
from palimpsest.tune.adapter.config import LatentConfig
from palimpsest.tune.adapter.dictionaries import frozen_dictionary
from palimpsest.tune.adapter.layer import InputLayer, LatentLayer, steering_vector
from palimpsest.tune.adapter.places import allowed_latents, tap_of
from palimpsest.tune.choices import COMPONENTS

_STEM = "base_model.model."

HELD = {one.side: one.adapter_layer_names[0] for one in (LatentLayer, InputLayer)}
"""Name of an adapter's numbers beside a module, by what they edit."""


@dataclass
class Vectors:
    """What an adapter adds to every token.

    Attributes:
        base: The base model as the adapter names it.
        model: The base's architecture, without weights.
        component: The adapter's component.
        by_site: The vectors, float32.
        notes: Where an export that adds them to every token differs from the adapter.
    """

    base: str
    model: Any
    component: str
    by_site: dict[str, Float[Tensor, " d_model"]]
    notes: list[str] = field(default_factory=list)

    @property
    def sites(self) -> SiteMap:
        """The base's sites."""
        return SiteMap(self.model, object(), self.base)


def read_vectors(folder: Path) -> Vectors:
    """Read the vectors of an adapter.

    Raises:
        ConfigError: It is no latent adapter, or adds something else than a constant vector.
        DictionaryError: A dictionary is absent or another one than the adapter was trained with.
    """
    config = _config(folder)
    base = recorded_base(folder, {"base_model_name_or_path": config.base_model_name_or_path})
    model = _architecture(base)
    sites = SiteMap(model, object(), base)
    weights = _weights(folder)
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}
    for name, site in config.target_hooks:
        tap = tap_of(site, sites)
        held = f"{names[id(tap.module)]}.{HELD[tap.side]}"
        if held not in weights:
            raise ConfigError(f"{folder} has no values for {site}", expected=f"values of {held}")
        found[site] = _vector(config, name, site, weights[held], sites.d_model)
    return Vectors(base, model, config.component, found, _notes(config))


def _config(folder: Path) -> LatentConfig:
    path = folder / "adapter_config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} holds no adapter", expected=path.name, found=type(error).__name__
        ) from error
    constant = " or ".join(name for name, about in COMPONENTS.items() if about.constant)
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != "LATENT":
        raise ConfigError(
            f"{folder} is no latent adapter, so there is no vector to export",
            expected=f"an adapter with component {constant}",
            found=f"peft type {kind}",
        )
    config: LatentConfig = LatentConfig.from_pretrained(str(folder))
    if not COMPONENTS[config.component].constant:
        raise ConfigError(
            f"What {config.component} adds depends on the token, so it is no vector that could be exported",
            expected=f"an adapter with component {constant}",
            found=f"{config.component}: {COMPONENTS[config.component].formula}",
            fix=f"Train one with --component {constant}, or keep the adapter: peft loads it on the base",
        )
    return config


def _architecture(base: str) -> nn.Module:
    """The base's modules without any weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"Cannot read the configuration of the adapter's base {base}",
            expected="the model that the adapter was trained on",
            found=" ".join(str(error).split())[:400],
        ) from error
    return model


def _weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The component's tensors by the module they stand around and its side."""
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"Cannot read {path}", found=" ".join(str(error).split())[:400]) from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        held, _, rest = key.removeprefix(_STEM).replace(".base_layer.", ".").rpartition(".")
        found.setdefault(held, {})[rest] = tensor
    return found


def _vector(
    config: LatentConfig, name: str, site: str, values: dict[str, Tensor], d_model: int
) -> Float[Tensor, " d_model"]:
    if config.component == "vector":
        return _fitting(values, "weight", d_model, site)
    dictionary, digest = frozen_dictionary(name, config.dictionary_dtype, config.folder, {})
    recorded = config.hashes.get(site)
    if recorded is not None and recorded != digest:
        raise DictionaryError(
            f"The dictionary {name} is another one than the adapter was trained with at {site}",
            expected=f"weights with SHA-256 {recorded[:16]}…",
            found=f"{digest[:16]}…",
        )
    component = make_component(
        config.component, dictionary, allowed_latents(config, site, dictionary.n_latents)
    )
    with torch.no_grad():
        for part, parameter in component.named_parameters():
            parameter.copy_(_fitting(values, part, len(parameter), site))
    return steering_vector(component, dictionary)


def _fitting(values: dict[str, Tensor], part: str, count: int, site: str) -> Tensor:
    found = values.get(part)
    if found is None or found.shape != (count,):
        raise ConfigError(
            f"The adapter's values at {site} do not fit its configuration",
            expected=f"{part} with {count} numbers",
            found="none" if found is None else list(found.shape),
        )
    if not bool(found.isfinite().all()):
        raise ConfigError(f"The adapter's values at {site} are not finite", found="NaN or infinity")
    return found.float()


def _notes(config: LatentConfig) -> list[str]:
    notes = []
    if config.scope != "all":
        notes.append(
            f"The adapter edits tokens of scope {config.scope} only; the exported vector is added to all."
        )
    if config.skip_ids is None:
        notes.append("The adapter leaves BOS and padding alone; the exported vector is added to them, too.")
    elif config.skip_ids:
        notes.append(
            f"The adapter leaves {len(config.skip_ids)} token ids alone; the exported vector is added to them, too."
        )
    return notes
