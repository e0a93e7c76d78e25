"""The PEFT method: puts layers around the sites of a model, takes them away again, merges what can be merged."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.utils.hooks import RemovableHandle

from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError, DictionaryError, SiteError
from palimpsest.models.sites import SiteMap
from palimpsest.tune.adapter.components import check_latents, check_size, make_component
from palimpsest.tune.adapter.config import LatentConfig
from palimpsest.tune.adapter.dictionaries import frozen_dictionary
from palimpsest.tune.adapter.layer import PREFIX, LatentLayer, Place, latent_layers
from palimpsest.tune.adapter.scope import Call

WRITABLE = ("resid_pre", "resid_post", "mlp_out", "mlp_out_post", "attn_out", "attn_out_post", "path")
"""Kinds of sites whose replacement reaches everything that reads them."""


class LatentTuner(BaseTuner):
    """`peft`'s tuner of method LATENT; made by `get_peft_model`, never by hand."""

    prefix = PREFIX
    tuner_layer_cls = LatentLayer
    target_module_mapping: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with its hooks."""
        return self.model(*args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        """Wrap the modules behind the sites, or add the adapter where they are wrapped already.

        peft's own search goes by module names from the outside in, and loses a module inside one that it has wrapped.

        Raises:
            SiteError: The model lacks a site, or what is written there would not reach all its readers.
            DictionaryError: A dictionary does not fit the model or is another one than the adapter was trained with.
            ConfigError: The component is too large, or the model is one that cannot be edited.
        """
        del autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        config = self._latent_config(adapter_name)
        _check_base(model)
        trained = (
            {id(one) for one in model.parameters() if one.requires_grad} if latent_layers(model) else set()
        )
        call = self._call(model)
        self._dictionaries: dict[tuple[str, str | None], Dictionary] = getattr(self, "_dictionaries", {})
        targets = _targets(config, model, self._dictionaries)
        skip = tuple(_special(model) if config.skip_ids is None else config.skip_ids)
        for site, dictionary in targets.items():
            component = make_component(
                config.component,
                dictionary,
                allowed_latents(config, site, dictionary.n_latents),
                transform=config.transform,
                rank=config.rank,
                activation=config.activation,
            )
            place = Place(site, config.scope, config.scope_tokens, skip, config.stop_gradient)
            layer = self._wrapped(model, site, call)
            if adapter_name in layer.places:
                # Where no norm stands between them, mlp_out and mlp_out_post are one module.
                raise ConfigError(
                    "Two dictionaries at one place of this model",
                    found=f"{layer.places[adapter_name].site} and {site}",
                    fix="Use an adapter for each",
                )
            layer.add(adapter_name, component, dictionary, place)
        names = {id(layer): name for name, layer in model.named_modules()}
        here = [layer for layer in latent_layers(model) if adapter_name in layer.places]
        config.target_modules = sorted(names[id(layer)].replace(".base_layer", "") for layer in here)
        call.holders = [
            layer
            for name, layer in model.named_modules()
            if hasattr(type(layer), "gradient_checkpointing")
            and any(isinstance(one, LatentLayer) for one in layer.modules())
        ]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        for parameter in model.parameters():
            if id(parameter) in trained:
                parameter.requires_grad_(True)

    def _latent_config(self, adapter_name: str) -> LatentConfig:
        config = self.peft_config[adapter_name]
        if not isinstance(config, LatentConfig):
            raise ConfigError(
                "A model with a latent adapter takes latent adapters only",
                expected="a LatentConfig",
                found=type(config).__name__,
            )
        return config

    def _call(self, model: nn.Module) -> Call:
        """What the layers of this model share; its hooks are set once."""
        known = latent_layers(model)
        if known:
            return known[0].call
        call = Call(model, PREFIX)
        inner = getattr(model, "base_model", None)
        self._hooks: list[RemovableHandle] = [
            handle
            for one in dict.fromkeys(filter(None, (model, inner)))
            for handle in (
                one.register_forward_pre_hook(call.before, with_kwargs=True),
                one.register_forward_hook(call.after, always_call=True),
            )
        ]
        return call

    def _wrapped(self, model: nn.Module, site: str, call: Call) -> LatentLayer:
        """The layer around a site's module, put there if there is none."""
        tap = SiteMap(model, object(), "the model").tap(site)
        found = tap.module
        while isinstance(found, LatentLayer) and found.side != tap.side:
            found = found.base_layer
        if isinstance(found, LatentLayer):
            return found
        names = {id(module): name for name, module in model.named_modules()}
        name = names[id(tap.module)]
        outer = name.removesuffix(".base_layer")
        around = model.get_submodule(outer)
        if isinstance(around, LatentLayer) and around.side == tap.side:
            return around
        parent, _, child = name.rpartition(".")
        layer = LatentLayer(tap.module, tap.side, call)
        self._replace_module(model.get_submodule(parent), child, layer, tap.module)
        layer.train(tap.module.training)
        return layer

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in another's place; peft's own copies weights from modules that have none."""
        del child
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            parent[int(child_name)] = new_module
        else:
            setattr(parent, child_name, new_module)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Peft's step per module, which `inject_adapter` does here."""
        raise NotImplementedError("latent adapters are put in by inject_adapter")

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Any) -> PeftConfig:
        return peft_config

    def _check_merge_allowed(self) -> None:
        """Refuse before anything is written, so that a model is never merged by half."""
        from palimpsest.tune.adapter.merge import check_place

        layers = [(layer, name) for layer in latent_layers(self.model) for name in layer.live()]
        for layer, name in layers:
            layer.constant_vector(name)
            check_place(self.model, layer.places[name].site)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """The base without its wrappers, deepest first."""
        del progressbar
        if merge:
            self._check_merge_allowed()
            for layer in latent_layers(self.model):
                layer.merge(safe_merge, adapter_names)
        inside = [name for name, one in self.model.named_modules() if isinstance(one, LatentLayer)]
        for name in sorted(inside, key=lambda one: one.count("."), reverse=True):
            parent, _, child = name.rpartition(".")
            layer: Any = self.model.get_submodule(name)
            self._replace_module(self.model.get_submodule(parent), child, layer.base_layer, layer)
        for handle in self._hooks:
            handle.remove()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def _check_base(model: nn.Module) -> None:
    quantised = getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False)
    devices = {str(one) for one in (getattr(model, "hf_device_map", None) or {}).values()}
    if any(one.device.type == "meta" for one in model.parameters()) or "disk" in devices:
        raise ConfigError(
            "Some of the model's weights are not in memory",
            expected="a model that is loaded",
            fix="Load it without device_map, or on devices with room for it",
        )
    if quantised and not any(one.is_floating_point() for one in model.parameters()):
        raise ConfigError(
            "The model has no parameter of floating point", expected="embeddings that are not quantised"
        )


def _targets(
    config: LatentConfig, model: nn.Module, known: dict[tuple[str, str | None], Dictionary]
) -> dict[str, Dictionary]:
    """The dictionary of each site, checked against the model and against the hash that the adapter recorded."""
    sites = SiteMap(model, object(), "the model")
    targets: dict[str, Dictionary] = {}
    for place, (name, wanted) in enumerate(config.target_hooks):
        dictionary, digest = frozen_dictionary(name, config.dictionary_dtype, config.folder, known)
        site = sites.canonical(wanted or _own_site(name, dictionary))
        _check_site(site, sites, dictionary, name)
        if site in targets:
            raise ConfigError("Two dictionaries at one site", found=site, fix="Use an adapter for each")
        recorded = config.hashes.get(site)
        if recorded is not None and recorded != digest:
            raise DictionaryError(
                f"The dictionary {name} is another one than the adapter was trained with at {site}",
                expected=f"weights with SHA-256 {recorded[:16]}…",
                found=f"{digest[:16]}…",
                fix="Name the right one in target_hooks of the adapter's configuration",
            )
        check_size(config.component, dictionary, config.rank, config.allow_quadratic)
        targets[site] = dictionary
        config.hashes[site] = digest
        config.target_hooks[place] = [name, site]
    return targets


def _own_site(name: str, dictionary: Dictionary) -> str:
    if dictionary.site is None:
        raise DictionaryError(
            f"The dictionary {name} does not say where it was trained",
            fix="Name the site: target_hooks=[(dictionary, 'resid_post.13')], or --site",
        )
    return dictionary.site


def _check_site(site: str, sites: SiteMap, dictionary: Dictionary, name: str) -> None:
    tap = sites.tap(site)
    kind = site.split(".")[0]
    if (
        kind not in WRITABLE
        or (tap.side == "input" and kind != "resid_pre")
        or tap.side not in ("input", "output")
    ):
        raise SiteError(
            f"An edit at {site} would not reach all that reads it",
            expected="a site of " + ", ".join(WRITABLE),
            found=f"the {tap.side} of {type(tap.module).__name__}",
        )
    if dictionary.d_model != sites.d_model:
        raise DictionaryError(
            f"The dictionary {name} has another width than the model",
            expected=f"d_model {sites.d_model}",
            found=dictionary.d_model,
            fix="Use a dictionary of this model",
        )


def allowed_latents(config: LatentConfig, site: str, n_latents: int) -> Any:
    """The latents that may change at a site, None for all."""

    def of(lists: Any) -> list[int] | None:
        found = lists.get(site) if isinstance(lists, dict) else lists
        return None if found is None else [int(one) for one in found]

    for lists in (config.latents, config.forbid):
        unknown = set(lists) - {one for _, one in config.target_hooks} if isinstance(lists, dict) else set()
        if unknown:
            raise ConfigError(
                "Latents are listed for a site that the adapter does not edit",
                expected=", ".join(str(one) for _, one in config.target_hooks),
                found=", ".join(map(str, unknown)),
            )
    chosen = check_latents(of(config.latents), n_latents, site)
    forbidden = check_latents(of(config.forbid), n_latents, site)
    if forbidden is None:
        return chosen
    left = set(range(n_latents)) if chosen is None else set(chosen.tolist())
    return check_latents(sorted(left - set(forbidden.tolist())), n_latents, site)


def _special(model: nn.Module) -> list[int]:
    """The model's BOS and padding ids."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: set[int] = set()
    for one in (text, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(one, name, None)
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(found)


__all__ = ["LatentTuner"]
