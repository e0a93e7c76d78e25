"""Adding a constant vector to the weights: a bias that adds it at the same place, for every token.

Only architectures whose arithmetic is known are served. The bias must also survive `save_pretrained`: where the
configuration decides whether biases exist, it is switched on for all layers, with zeros in the others.
"""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.edits import wide
from palimpsest.errors import ConfigError

_SITE = re.compile(r"(resid_post|mlp_out|attn_out)(_post)?\.(\d+)")
_RECORD = "_palimpsest_merged"
_SWITCHED = "_palimpsest_switched"
_FIX = "Load the adapter with peft instead of merging it, or export it"


class _Family(NamedTuple):
    """Where an architecture's sublayers write.

    Attributes:
        layers: Path of the decoder layers.
        mlp: The last linear of the MLP, within a layer.
        attn: The output projection of attention.
        normed: What a sublayer writes passes a norm before it reaches the residual stream.
    """

    layers: str
    mlp: str
    attn: str
    normed: bool = False


_LLAMA = _Family("model.layers", "mlp.down_proj", "self_attn.o_proj")
_FAMILIES = {
    "gpt2": _Family("transformer.h", "mlp.c_proj", "attn.c_proj"),
    "gpt_neox": _Family("gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    "gemma2": _LLAMA._replace(normed=True),
}
_SWITCHES = ("mlp_bias", "attention_bias")


class BiasPlace(NamedTuple):
    """Where a constant vector at a site can live.

    Attributes:
        path: Path of the linear map whose bias adds the vector at the site.
        switch: Field of the configuration that must be turned on first, None where the bias exists.
        biases: Every bias that the switch makes, by path; they start at zero.
    """

    path: str
    switch: str | None = None
    biases: tuple[str, ...] = ()


class _Merged(NamedTuple):
    """What was added to one linear map; the bias is rebuilt from it, so that taking all out restores it to the bit."""

    before: Tensor
    vectors: list[tuple[str, Tensor]]


def bias_place(model: nn.Module, site: str) -> BiasPlace:
    """Find the bias that adds a vector exactly at a site and that a saved checkpoint keeps.

    Args:
        model: The transformers model, plain or with adapters in it.
        site: `resid_post.L`, `mlp_out.L` or `attn_out.L`, the last two also with `_post`.

    Raises:
        ConfigError: There is none, with the reason.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", "unknown")
    family, found = _FAMILIES.get(kind), _SITE.fullmatch(site)
    if family is None:
        raise _refusal(site, f"whether {kind} has a bias that does so is not known", sorted(_FAMILIES))
    if found is None:
        raise _refusal(site, "no bias adds to it", "resid_post.L, mlp_out.L or attn_out.L")
    point, post, layer = found[1], found[2], int(found[3])
    if layer >= config.num_hidden_layers:
        raise _refusal(site, f"the model has {config.num_hidden_layers} layers")
    if family.normed and (point == "resid_post" or post):
        raise _refusal(
            site,
            f"{kind} norms what a sublayer writes, so that no bias before the norm is a constant behind it",
        )
    path = f"{family.layers}.{layer}.{family.attn if point == 'attn_out' else family.mlp}"
    if getattr(_walk(model, path), "bias", None) is not None:
        return BiasPlace(path)
    plain = _biases(model, config)
    for switch in _SWITCHES:
        if getattr(config, switch, None) is False:
            switched = copy.deepcopy(config)
            setattr(switched, switch, True)
            more = _biases(model, switched) - plain
            if f"{path}.bias" in more:
                return BiasPlace(path, switch, tuple(sorted(more)))
    raise _refusal(
        site,
        f"{kind} has no bias in {path.rpartition('.')[2]}, and one that its configuration cannot say is lost on saving",
    )


def check_place(model: nn.Module, site: str) -> None:
    """Refuse a site where `merge_vector` would; nothing is changed.

    Raises:
        ConfigError: There is no bias for it, with the reason.
    """
    bias_place(model, site)


def merge_vector(model: nn.Module, site: str, vector: Float[Tensor, " d_model"]) -> None:
    """Add a vector at a site, for every token, to the weights.

    The vector of `resid_post.L` goes into the layer's last linear map, so `mlp_out.L` moves with it.

    Args:
        model: The transformers model; changed in place, its configuration too where biases are switched on.
        site: As in `bias_place`.
        vector: What is added.

    Raises:
        ConfigError: The model has no place for it, or it has another width.
    """
    place = bias_place(model, site)
    linear = _walk(model, place.path)
    if len(vector) != (width := _width(linear)):
        raise ConfigError(f"The vector does not fit {site}", expected=f"{width} numbers", found=len(vector))
    _switch_on(model, place)
    record: _Merged | None = getattr(linear, _RECORD, None)
    if record is None:
        record = _Merged(linear.bias.detach().clone(), [])
        setattr(linear, _RECORD, record)
    record.vectors.append((site, _as_merged(linear, vector)))
    _rebuild(linear, record)


def unmerge_vector(model: nn.Module, site: str, vector: Float[Tensor, " d_model"]) -> None:
    """Take a merged vector out again: without any, the bias is what it was, to the bit, and is gone if there was none.

    Raises:
        ConfigError: This vector was not merged at the site.
    """
    linear = _walk(model, bias_place(model, site).path)
    record: _Merged | None = getattr(linear, _RECORD, None)
    merged = [] if record is None else record.vectors
    found = [
        index
        for index, (there, one) in enumerate(merged)
        if there == site and torch.equal(one, _as_merged(linear, vector))
    ]
    if record is None or not found:
        raise ConfigError(
            f"This vector is not merged at {site}, so it cannot be taken out",
            expected="the vector as it was merged",
            found=f"{sum(there == site for there, _ in merged)} others",
        )
    del merged[found[0]]
    _rebuild(linear, record)
    if not merged:
        delattr(linear, _RECORD)
        _switch_off(model)


def forget_merges(model: nn.Module) -> None:
    """Make what is merged a part of the model: nothing can be taken out again."""
    for module in model.modules():
        if hasattr(module, _RECORD):
            delattr(module, _RECORD)
    if hasattr(model, _SWITCHED):
        delattr(model, _SWITCHED)


def _as_merged(linear: Any, vector: Tensor) -> Tensor:
    dtype, device = wide(linear.weight.dtype), linear.weight.device
    return vector.detach().to(device, dtype, copy=True)


def _refusal(site: str, reason: str, expected: object = None) -> ConfigError:
    return ConfigError(
        f"The vector at {site} cannot be merged into the weights: {reason}", expected=expected, fix=_FIX
    )


@torch.no_grad()
def _rebuild(linear: Any, record: _Merged) -> None:
    if not record.vectors:
        linear.bias.copy_(record.before)
        return
    total = record.before.to(wide(linear.weight.dtype)) + torch.stack([one for _, one in record.vectors]).sum(
        0
    )
    linear.bias.copy_(total)


def _switch_on(model: nn.Module, place: BiasPlace) -> None:
    config: Any = model.config
    if place.switch is None:
        return
    for name in place.biases:
        linear = _walk(model, name.removesuffix(".bias"))
        if not linear.weight.is_floating_point():
            raise ConfigError(
                "A quantised model's biases cannot be switched on", found=f"{linear.weight.dtype}", fix=_FIX
            )
    for name in place.biases:
        linear = _walk(model, name.removesuffix(".bias"))
        zeros = torch.zeros(_width(linear), dtype=linear.weight.dtype, device=linear.weight.device)
        linear.bias = nn.Parameter(zeros, requires_grad=False)
    setattr(config, place.switch, True)
    setattr(model, _SWITCHED, [*getattr(model, _SWITCHED, []), place])


def _switch_off(model: nn.Module) -> None:
    """Take away the biases that merges made and that none needs any more."""
    config: Any = model.config
    kept = []
    for place in getattr(model, _SWITCHED, []):
        linears = [_walk(model, name.removesuffix(".bias")) for name in place.biases]
        if any(hasattr(linear, _RECORD) for linear in linears):
            kept.append(place)
            continue
        for linear in linears:
            linear.bias = None
        setattr(config, place.switch, False)
    setattr(model, _SWITCHED, kept)


def _width(linear: Any) -> int:
    """Outputs of a linear map, whichever way round its weights lie."""
    return int(getattr(linear, "out_features", None) or linear.nf)


def _biases(model: nn.Module, config: Any) -> set[str]:
    """The biases that a model of this configuration has, without its weights."""
    with torch.device("meta"):
        made: Any = type(model)(config)
    return {name for name, _ in made.named_parameters() if name.endswith(".bias")}


def _walk(model: nn.Module, path: str) -> Any:
    """A module by its path in the plain model, whatever adapters stand around the modules on the way."""
    module: Any = model
    for part in path.split("."):
        module = getattr(_inside(module), part)
    return _inside(module)


def _inside(module: Any) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: Any = module
    while isinstance(found, BaseTunerLayer):
        found = getattr(found, "base_layer")  # noqa: B009 - declared on subclasses only
    return found
