"""What the weights alone say: a fingerprint per model and the size of the change per layer."""

import copy
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palimpsest.models.pair import LanguageModel, ModelPair

FINGERPRINT_VALUES = 1024
"""Values of each tensor that enter a fingerprint, evenly spaced."""

EDITORS = frozenset({"latent_"})
"""Prefixes of adapters that edit activations and leave every weight as it is."""

SETTINGS = (
    "component",
    "transform",
    "activation",
    "scope",
    "scope_tokens",
    "skip_ids",
    "latents",
    "forbid",
    "dictionary_dtype",
    "hashes",
)
"""What decides such an adapter's edits beside its parameters; `hashes` are those of its dictionaries."""

LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")


class LayerDelta(NamedTuple):
    """Frobenius norms of a layer's weights and of their change; `layer` None is what belongs to no layer."""

    layer: int | None
    norm_base: float
    norm_delta: float

    @property
    def relative(self) -> float:
        """Change relative to the layer's weights."""
        return self.norm_delta / self.norm_base if self.norm_base else float("nan")


@torch.inference_mode()
def fingerprint(model: LanguageModel) -> str:
    """SHA-256 over names, shapes and a sample of every parameter, adapters included; independent of files.

    Of an adapter that edits activations its settings and the hashes of its dictionaries count, too.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.model.named_parameters()):
        if not model.adapter_on and is_adapter(name, model.adapter_prefix):
            continue
        flat = parameter.detach().reshape(-1)
        # Odd, so that samples of a power-of-two matrix do not all lie in one column.
        step = max(1, flat.numel() // FINGERPRINT_VALUES) | 1
        sample = flat[::step][:FINGERPRINT_VALUES].float().cpu().contiguous()
        digest.update(f"{plain_name(name)}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    if edits_activations(model):
        configs = sorted(model.model.peft_config.items())
        told = [{field: getattr(config, field, None) for field in SETTINGS} for _, config in configs]
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def edits_activations(model: LanguageModel) -> bool:
    """Whether this side of a pair reads through an adapter that edits activations, so that no weight differs."""
    return model.adapter_on and model.adapter_prefix in EDITORS


@torch.inference_mode()
def weight_deltas(pair: ModelPair) -> list[LayerDelta]:
    """Per layer, ‖W_base‖ and ‖W_tuned − W_base‖ (Frobenius over all its tensors).

    Tensors of another shape in the tuned model (added vocabulary) are compared on the shared rows.
    """
    sums: dict[int | None, list[float]] = {}

    def add(name: str, weight: Tensor, delta: Tensor) -> None:
        found = LAYER.search(f".{name}")
        row = sums.setdefault(int(found[1]) if found else None, [0.0, 0.0])
        row[0] += float(weight.detach().double().square().sum())
        row[1] += float(delta.detach().double().square().sum())

    if pair.kind == "adapter":
        adapter_deltas(pair.tuned, add)
    else:
        with pair.both() as (base, tuned):
            others = dict(tuned.model.named_parameters())
            for name, weight in base.model.named_parameters():
                other = others.get(name)
                if other is None or other.dim() != weight.dim():
                    continue
                shared = tuple(slice(0, min(a, b)) for a, b in zip(weight.shape, other.shape, strict=True))
                add(name, weight, other[shared].to(weight.device).float() - weight[shared].float())
    rows = [LayerDelta(layer, a**0.5, b**0.5) for layer, (a, b) in sums.items()]
    return sorted(rows, key=lambda row: (row.layer is None, row.layer or 0))


def adapter_deltas(tuned: LanguageModel, add: Callable[[str, Tensor, Tensor], None]) -> None:
    """Base weights of an adapted model, with the change of every module that the adapter merges into."""
    parameters = dict(tuned.model.named_parameters())
    modules: dict[str, Any] = {} if edits_activations(tuned) else dict(tuned.model.named_modules())
    for name, weight in parameters.items():
        if is_adapter(name, tuned.adapter_prefix):
            continue
        owner = modules.get(name.removesuffix(".weight").removesuffix(".base_layer"))
        saved = parameters.get(name.replace(".original_module.", ".modules_to_save.default."))
        wrapped = ".base_layer." in name and name.endswith(".weight")
        if wrapped and owner is not None and weight.is_floating_point() and hasattr(owner, "merge"):
            # Merging a copy is right for every kind of adapter; a stated delta need not be additive.
            merged = copy.deepcopy(owner).float()
            merged.merge()
            delta = merged.get_base_layer().weight - weight.float()
        elif wrapped and owner is not None and hasattr(owner, "get_delta_weight"):  # quantised
            delta = torch.stack([owner.get_delta_weight(key) for key in owner.active_adapters]).sum(0)
        elif ".original_module." in name and saved is not None:
            delta = saved.float() - weight.float()
        else:
            delta = torch.zeros(1)
        add(name, weight, delta)


def adapter_prefix(peft_model: Any) -> str:
    """What the parameters of a PEFT model's adapter begin with."""
    return getattr(peft_model.base_model, "prefix", "lora_")


def is_adapter(name: str, prefix: str | None) -> bool:
    """Whether a parameter belongs to the adapter whose parameters begin with `prefix`."""
    if prefix is None:
        return False
    return any(part.startswith((prefix, "modules_to_save", "trainable_tokens_")) for part in name.split("."))


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers that an adapter puts around modules."""
    for wrapper in (".base_layer", ".original_module", ".token_adapter"):
        name = name.replace(wrapper, "")
    return name
