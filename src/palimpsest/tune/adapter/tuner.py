"""The PEFT method: puts layers around the sites of a model, takes them away again, merges what can be merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError, PairError
from palimpsest.tune.adapter.components import make_component
from palimpsest.tune.adapter.config import LatentConfig
from palimpsest.tune.adapter.layer import PREFIX, InputLayer, LatentLayer, Place, latent_layers
from palimpsest.tune.adapter.places import Target, find_targets
from palimpsest.tune.adapter.scope import Call


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
            PalimpsestError: As `find_targets`; the model is as it was.
        """
        del autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        config = self._latent_config(adapter_name)
        known = self.__dict__.get("_dictionaries")
        self._dictionaries: WeakValueDictionary[tuple[str, str | None], Dictionary] = (
            WeakValueDictionary() if known is None else known
        )
        targets = find_targets(config, model, adapter_name, self._dictionaries)
        before = latent_layers(model)
        trained = [one for one in model.parameters() if one.requires_grad] if before else []
        call = before[0].call if before else Call(model)
        for target in targets:
            component = make_component(
                config.component,
                target.dictionary,
                target.latents,
                transform=config.transform,
                rank=config.rank,
                activation=config.activation,
            )
            skip = tuple(config.skip_ids or ())
            place = Place(target.site, config.scope, config.scope_tokens, skip, config.stop_gradient)
            self._wrapped(model, target, call).add(adapter_name, component, target.dictionary, place)
        call.attach()
        here = [name for name, one in model.named_modules() if _holds(one, adapter_name)]
        config.target_modules = sorted(name.replace(".base_layer", "") for name in here)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        for parameter in trained:
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

    def _wrapped(self, model: nn.Module, target: Target, call: Call) -> LatentLayer:
        """The layer around a site's module, put there if there is none."""
        if target.layer is not None:
            return target.layer
        name = next(name for name, module in model.named_modules() if module is target.module)
        parent, _, child = name.rpartition(".")
        kind = LatentLayer if target.side == "output" else InputLayer
        layer = kind(target.module, call)
        self._replace_module(model.get_submodule(parent), child, layer, target.module)
        layer.train(target.module.training)
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

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name of a tensor in a file: the same whatever other adapters stand around its module."""
        return super()._remove_adapter_name_from_key(key, adapter_name).replace(".base_layer.", ".")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """As peft does it, for all tensors or none: one that finds no place would leave the base as it is, silently."""
        made = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = {
            name
            for name in model.state_dict()
            if PREFIX in name and name.split(f".{PREFIX}")[-1].split(".")[1:2] == [adapter_name]
        }
        if own and set(made) != own:
            lost = sorted(own.symmetric_difference(made))
            raise PairError(
                f"The adapter's file does not hold the numbers of its {len(own)} tensors",
                expected=", ".join(sorted(own)[:3]),
                found=f"{len(lost)} without a counterpart, such as {lost[0]}",
            )
        return made

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write constant adapters into biases of the base; see `LatentLayer.merge`.

        Raises:
            ConfigError: One of them cannot be; nothing is changed.
        """
        self._check_mergeable(adapter_names)
        for layer in latent_layers(self.model):
            layer.merge(safe_merge, adapter_names)

    def _check_mergeable(self, names: Sequence[str] | None) -> None:
        """Refuse before anything is written, so that a model is never merged by half."""
        from palimpsest.tune.adapter.merge import check_place

        for layer in latent_layers(self.model):
            for name in layer.live() if names is None else layer.places.keys() & set(names):
                layer.constant_vector(name)
                check_place(self.model, layer.places[name].site)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Switch; what is merged is taken out first, wherever in the model it lies."""
        if not enabled:
            for layer in latent_layers(self.model):
                layer.unmerge()
        super()._enable_adapter_layers(enabled)

    def disable_adapter_layers(self) -> None:
        """The base, to the last bit."""
        self._enable_adapter_layers(False)

    def enable_adapter_layers(self) -> None:
        """The active adapters again."""
        self._enable_adapter_layers(True)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """The base without its wrappers, deepest first."""
        from palimpsest.tune.adapter.merge import forget_merges

        del progressbar
        layers = latent_layers(self.model)
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
            forget_merges(self.model)
        else:
            for layer in layers:
                layer.unmerge()
        inside = [name for name, one in self.model.named_modules() if isinstance(one, LatentLayer)]
        for name in sorted(inside, key=lambda one: one.count("."), reverse=True):
            parent, _, child = name.rpartition(".")
            layer: Any = self.model.get_submodule(name)
            self._replace_module(self.model.get_submodule(parent), child, layer.base_layer, layer)
        for call in {id(layer.call): layer.call for layer in layers}.values():
            call.detach()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def _holds(module: nn.Module, adapter: str) -> bool:
    return isinstance(module, LatentLayer) and adapter in module.places


__all__ = ["LatentTuner"]
