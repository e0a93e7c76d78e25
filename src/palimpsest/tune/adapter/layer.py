"""The wrapper around a module whose output (or input) passes through latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from palimpsest import edits
from palimpsest.dictionaries import Codes, Dictionary
from palimpsest.edits import Edit, Reading
from palimpsest.errors import ConfigError
from palimpsest.tune.adapter.components import Component
from palimpsest.tune.adapter.scope import Call

PREFIX = "latent_"
"""Begins the names of an adapter's parameters inside a model."""


class Seen(NamedTuple):
    """What a watcher is told of one forward pass through one adapter.

    Attributes:
        site: Where.
        adapter: Its name.
        codes: Of all tokens, `batch * seq` of them; None for components that need none.
        edit: The change of the latents, masks not yet applied.
        edited: Which tokens are edited; None for all.
    """

    site: str
    adapter: str
    codes: Codes | None
    edit: Edit
    edited: Bool[Tensor, " tokens"] | None


class Place(NamedTuple):
    """What one adapter is at one layer, beside its numbers."""

    site: str
    scope: str
    scope_tokens: int
    skip_ids: tuple[int, ...]
    stop_gradient: bool


class LatentLayer(nn.Module, BaseTunerLayer):
    """A module of the base with what it gives passed through the components of the active adapters.

    Several active adapters add up: each sees what the base's module gave.

    Attributes:
        latent_components: The component of each adapter.
        latent_dictionaries: The dictionary of each adapter, frozen; adapters with the same one share it.
        places: Site and tokens of each adapter.
        masks: 0 for latents whose change is dropped, by adapter; for causal checks.
        watchers: Called after each forward pass of each active adapter.
    """

    adapter_layer_names = ("latent_components",)
    other_param_names = ("latent_dictionaries",)
    side = "output"

    def __init__(self, base_layer: nn.Module, call: Call) -> None:
        """Wrap a module; it does nothing until an adapter is added.

        Args:
            base_layer: The module.
            call: Shared by all layers of a model.
        """
        super().__init__()
        self.base_layer = base_layer
        self.call = call
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.latent_dictionaries = nn.ModuleDict()
        self.places: dict[str, Place] = {}
        self._merged: dict[str, Tensor] = {}
        self._written: dict[str, tuple[list[Tensor], Tensor]] = {}
        self.masks: dict[str, Tensor] = {}
        self.watchers: list[Callable[[Seen], None]] = []
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def __getattr__(self, name: str) -> Any:
        """What this wrapper lacks, such as a layer's `attention_type`, is asked of the module inside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    @property
    def components(self) -> dict[str, Component]:
        """The component of each adapter."""
        return {name: self.component(name) for name in self._held}

    def component(self, adapter: str = "default") -> Component:
        """The component of one adapter."""
        found: Any = self._held[adapter]
        return found

    @property
    def _held(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def dictionary_of(self, adapter: str) -> Dictionary:
        """The dictionary of one adapter."""
        found: Any = self.latent_dictionaries[adapter]
        return found

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary of the first adapter."""
        return self.dictionary_of(next(iter(self.latent_dictionaries)))

    @property
    def site(self) -> str:
        """The site of the first adapter."""
        return next(iter(self.places.values())).site

    def add(self, adapter: str, component: Component, dictionary: Dictionary, place: Place) -> None:
        """Put an adapter here, on the device of what it edits."""
        weight = next(self.base_layer.parameters(), None)
        device = torch.device("cpu") if weight is None else weight.device
        if any(one.is_meta for one in component.parameters()):
            # peft's low_cpu_mem_usage: the numbers come from a file and are put in as they are.
            for name, buffer in component.named_buffers():
                setattr(component, name, buffer.to(device))
        else:
            component.to(device)
        self._held[adapter] = component
        self.latent_dictionaries[adapter] = dictionary.to(device)
        self.places[adapter] = place
        self.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away."""
        super().delete_adapter(adapter_name)
        self.places.pop(adapter_name, None)
        self._written.pop(adapter_name, None)
        self.masks.pop(adapter_name, None)

    def live(self) -> list[str]:
        """The adapters that edit now."""
        if self.disable_adapters:
            return []
        here = (name for name in self.active_adapters if name in self._held)
        return [name for name in here if name not in self.merged_adapters]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, edited."""
        live = self.live()
        if not live:
            return self.base_layer(*args, **kwargs)
        output = self.base_layer(*args, **kwargs)
        if isinstance(output, Tensor):
            return self.edit(output, live)
        return type(output)((self.edit(output[0], live), *output[1:]))

    def edit(
        self, hidden: Float[Tensor, "batch seq d_model"], live: Sequence[str]
    ) -> Float[Tensor, "batch seq d_model"]:
        """Pass activations through the components of these adapters."""
        if self.call.untouched and hidden.requires_grad and self._may_stop(live):
            hidden = hidden.detach()
        self.call.untouched = False
        flat = hidden.reshape(-1, hidden.shape[-1])
        total = None
        # Mixed precision would compute the edit in a type in which (1 + s) z - z is 0.
        with torch.autocast(hidden.device.type, enabled=False):
            readings: dict[int, Reading] = {}
            for name in live:
                delta = self._delta(name, flat, hidden.shape[:2], readings)
                if delta is not None:
                    total = delta if total is None else total + delta
            if total is None:
                return hidden
            return (flat.to(edits.wide(total.dtype)) + total).to(hidden.dtype).view(hidden.shape)

    def _delta(
        self, name: str, flat: Tensor, shape: torch.Size, readings: dict[int, Reading]
    ) -> Float[Tensor, "*tokens d_model"] | None:
        """What one adapter adds: one row per token, or a single one for all of them."""
        component, dictionary, place = self.component(name), self.dictionary_of(name), self.places[name]
        if place.scope in ("prompt", "first", "last") and self.call.past and shape[1] == 1:
            return None  # The prompt was edited when it was read, and lies in the cache.
        edited = self.call.edited(place.scope, place.scope_tokens, place.skip_ids)
        if edited is not None:
            if edited.shape != shape:
                raise ConfigError(
                    "The adapter does not know which tokens these activations belong to",
                    expected=f"a forward pass of the whole model on ids of shape {list(shape)}",
                    found=f"ids of shape {list(edited.shape)}",
                )
            edited = edited.reshape(-1)
        reading = None
        if not component.constant:
            if id(dictionary) not in readings:
                readings[id(dictionary)] = edits.read(dictionary, flat)
            reading = readings[id(dictionary)]
        edit = component(reading)
        for watcher in self.watchers:
            watcher(Seen(place.site, name, None if reading is None else reading.codes, edit, edited))
        latents = None if component.whole else component.latents
        mask = self.masks.get(name)
        written = None
        if component.constant and mask is None and not torch.is_grad_enabled():
            written = self._constant(name, component, dictionary, edit)
        delta = (
            edits.write(dictionary, edit, reading, latents=latents, mask=mask) if written is None else written
        )
        if edited is None or delta is None:
            return delta
        return torch.where(edited.to(delta.device)[:, None], delta, 0)

    def _constant(self, name: str, component: Component, dictionary: Dictionary, edit: Edit) -> Tensor | None:
        """What a constant component adds, kept for as long as its numbers stay: writing reads the whole decoder.

        None on accelerators, which are quicker to write it again than to say whether a number has changed.
        """
        numbers = list(component.parameters())
        if numbers[0].device.type != "cpu":
            return None
        kept = self._written.get(name)
        if kept is None or not all(map(torch.equal, kept[0], numbers)):
            latents = None if component.whole else component.latents
            made = edits.write(dictionary, edit, None, latents=latents)
            assert made is not None
            self._written[name] = kept = ([one.detach().clone() for one in numbers], made)
        return kept[1]

    def _may_stop(self, live: Sequence[str]) -> bool:
        """Whether nothing below is trained, so that no gradient is wanted there."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        if not all(self.places[name].stop_gradient for name in live):
            return False
        own = {id(one) for layer in latent_layers(self.call.root) for one in layer._held.parameters()}
        return not any(one.requires_grad and id(one) not in own for one in self.call.root.parameters())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write constant adapters into a bias of the base.

        Raises:
            ConfigError: A component is not constant, does not edit all tokens, or the model has no such bias.
        """
        from palimpsest.tune.adapter.merge import merge_vector

        del safe_merge
        for name in self.live() if adapter_names is None else adapter_names:
            if name in self.places and name not in self.merged_adapters:
                vector = self.constant_vector(name)
                merge_vector(self.call.root, self.places[name].site, vector)
                self._merged[name] = vector
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out of the biases again, as they were put in."""
        from palimpsest.tune.adapter.merge import unmerge_vector

        for name in list(self.merged_adapters):
            unmerge_vector(self.call.root, self.places[name].site, self._merged[name])
            del self._merged[name]
            self.merged_adapters.remove(name)

    def constant_vector(self, adapter: str) -> Float[Tensor, " d_model"]:
        """What a constant adapter adds to every token.

        Raises:
            ConfigError: It does not add the same to every token.
        """
        place, component = self.places[adapter], self.component(adapter)
        if place.scope != "all" or place.skip_ids:
            raise ConfigError(
                "The adapter edits some tokens only, a bias edits all",
                expected="scope all and skip_ids=[] (`palimpsest tune --skip-special none`)",
                found=f"scope {place.scope}, {len(place.skip_ids)} token ids left alone",
            )
        return steering_vector(component, self.dictionary_of(adapter), self.masks.get(adapter))


class InputLayer(LatentLayer):
    """The same for what enters a module: the first layer's `resid_pre`.

    Its numbers have another name, since a wrapper of the output may stand around the same module.
    """

    adapter_layer_names = ("latent_inputs",)
    side = "input"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward on edited activations."""
        if live := self.live():
            if args:
                args = (self.edit(args[0], live), *args[1:])
            else:
                kwargs["hidden_states"] = self.edit(kwargs["hidden_states"], live)
        return self.base_layer(*args, **kwargs)


@torch.no_grad()
def steering_vector(
    component: Component, dictionary: Dictionary, mask: Float[Tensor, " latents"] | None = None
) -> Float[Tensor, " d_model"]:
    """The vector that a constant component adds.

    Raises:
        ConfigError: What the component adds depends on the token.
    """
    if not component.constant:
        raise ConfigError(
            f"What {component.kind} adds depends on the token: it cannot be merged or exported as one vector",
            expected="a bias or vector component",
            found=component.kind,
            fix="Keep the adapter; peft loads it on the base",
        )
    latents = None if component.whole else component.latents
    made = edits.write(dictionary, component(None), None, latents=latents, mask=mask)
    assert made is not None
    return made.float()


def latent_layers(model: nn.Module) -> list[LatentLayer]:
    """The wrapped modules of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, LatentLayer)]


__all__ = ["PREFIX", "InputLayer", "LatentLayer", "Place", "Seen", "latent_layers", "steering_vector"]
