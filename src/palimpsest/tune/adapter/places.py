"""Where an adapter goes: the module and the dictionary of each site, all checked before anything is changed."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError, DictionaryError, SiteError
from palimpsest.models.sites import SiteMap, Tap
from palimpsest.tune.adapter.components import check_latents, check_size
from palimpsest.tune.adapter.config import LatentConfig
from palimpsest.tune.adapter.dictionaries import frozen_dictionary
from palimpsest.tune.adapter.layer import LatentLayer

WRITABLE = ("resid_pre", "resid_post", "mlp_out", "mlp_out_post", "attn_out", "attn_out_post", "path")
"""Kinds of sites whose replacement reaches everything that reads them."""


class Target(NamedTuple):
    """One site of an adapter.

    Attributes:
        site: Its address.
        dictionary: Whose latents are edited.
        latents: Those that may change, ascending; None for all.
        module: The module to wrap, outermost wrapper included.
        side: `output` or `input` of it.
    """

    site: str
    dictionary: Dictionary
    latents: Tensor | None
    module: nn.Module
    side: str

    @property
    def layer(self) -> LatentLayer | None:
        """The wrapper that is there already."""
        found: Any = self.module
        while isinstance(found, LatentLayer):
            if found.side == self.side:
                return found
            found = found.base_layer
        return None


def find_targets(
    config: LatentConfig,
    model: nn.Module,
    adapter: str,
    known: MutableMapping[tuple[str, str | None], Dictionary],
) -> list[Target]:
    """The sites of an adapter, checked against the model and what the adapter recorded; fills the configuration.

    Args:
        config: Gets absolute sites, the hashes of the dictionaries and the token ids that are left alone.
        model: The base.
        adapter: Its name.
        known: Dictionaries of the model, by hash and type.

    Raises:
        SiteError: The model lacks a site, or what is written there would not reach all its readers.
        DictionaryError: A dictionary does not fit the model or is another one than the adapter was trained with.
        ConfigError: The component is too large for it, or two dictionaries or adapters want one place.
    """
    _check_base(model)
    sites = SiteMap(model, object(), "the model")
    found: list[Target] = []
    hooks, hashes = [], {}
    for name, wanted in config.target_hooks:
        dictionary, digest = frozen_dictionary(name, config.dictionary_dtype, config.folder, known)
        site = sites.canonical(wanted or _own_site(name, dictionary))
        tap = tap_of(site, sites)
        _check_dictionary(config, name, site, sites, dictionary)
        _check_hash(config, name, site, digest)
        latents = allowed_latents(config, site, dictionary.n_latents, sites)
        target = Target(site, dictionary, latents, tap.module, tap.side)
        _check_free(target, found, adapter)
        found.append(target)
        hooks.append([name, site])
        hashes[site] = digest
    config.latents = _canonical(config, config.latents, sites, set(hashes))
    config.forbid = _canonical(config, config.forbid, sites, set(hashes))
    config.target_hooks, config.hashes = hooks, hashes
    if config.skip_ids is None:
        # The adapter keeps them: another configuration of the same weights must not edit other tokens.
        config.skip_ids = _special(model)
    return found


def _check_base(model: nn.Module) -> None:
    devices = {str(one) for one in (getattr(model, "hf_device_map", None) or {}).values()}
    if any(one.device.type == "meta" for one in model.parameters()) or "disk" in devices:
        raise ConfigError(
            "Some of the model's weights are not in memory",
            expected="a model that is loaded",
            fix="Load it without device_map, or on devices with room for it",
        )


def _own_site(name: str, dictionary: Dictionary) -> str:
    if dictionary.site is None:
        raise DictionaryError(
            f"The dictionary {name} does not say where it was trained",
            fix="Name the site: target_hooks=[(dictionary, 'resid_post.13')], or --site",
        )
    return dictionary.site


def tap_of(site: str, sites: SiteMap) -> Tap:
    """The module whose output is the site; what enters a layer is what leaves the one before."""
    kind, _, layer = site.partition(".")
    if kind == "resid_pre" and layer.isdigit() and int(layer) > 0:
        sites.tap(site)
        return sites.tap(f"resid_post.{int(layer) - 1}")
    tap = sites.tap(site)
    if kind not in WRITABLE or (tap.side != "output" and kind != "resid_pre"):
        raise SiteError(
            f"An edit at {site} would not reach all that reads it",
            expected="a site of " + ", ".join(WRITABLE),
            found=f"the {tap.side} of {type(tap.module).__name__}",
        )
    return tap


def _check_dictionary(
    config: LatentConfig, name: str, site: str, sites: SiteMap, dictionary: Dictionary
) -> None:
    if dictionary.d_model != sites.d_model:
        raise DictionaryError(
            f"The dictionary {name} has another width than the model",
            expected=f"d_model {sites.d_model}",
            found=dictionary.d_model,
            fix="Use a dictionary of this model",
        )
    if config.component == "bias" and dictionary.input_norm is not None:
        raise ConfigError(
            f"A bias on the latents of {name} is no constant: it normalises each token ({dictionary.input_norm})",
            expected="active-bias, scale or another component that reads the tokens, or vector",
            found=f"bias at {site}",
        )
    check_size(config.component, dictionary, config.rank, config.allow_quadratic)


def _check_hash(config: LatentConfig, name: str, site: str, digest: str) -> None:
    recorded = config.hashes.get(site)
    if recorded is not None and recorded != digest:
        raise DictionaryError(
            f"The dictionary {name} is another one than the adapter was trained with at {site}",
            expected=f"weights with SHA-256 {recorded[:16]}…",
            found=f"{digest[:16]}…",
            fix="Name the right one in target_hooks of the adapter's configuration",
        )


def _check_free(target: Target, others: list[Target], adapter: str) -> None:
    same = [one.site for one in others if (one.module, one.side) == (target.module, target.side)]
    if same:
        # Where no norm stands between them, mlp_out and mlp_out_post are one module.
        raise ConfigError(
            "Two dictionaries at one place of this model",
            found=f"{same[0]} and {target.site}",
            fix="Use an adapter for each",
        )
    if target.layer is not None and adapter in target.layer.places:
        raise ConfigError(
            f"The model already has an adapter called {adapter!r} at {target.site}",
            fix="Give this one another name (add_adapter), or unload the first",
        )


def allowed_latents(
    config: LatentConfig, site: str, n_latents: int, sites: SiteMap | None = None
) -> Tensor | None:
    """The latents that may change at a site, ascending; None for all.

    Raises:
        DictionaryError: The dictionary has no such latents.
        ConfigError: A list holds something else than whole numbers.
    """

    def of(lists: Any) -> list[int] | None:
        if isinstance(lists, dict):
            named = {key if sites is None else sites.canonical(key): value for key, value in lists.items()}
            lists = named.get(site)
        if lists is None:
            return None
        if wrong := [one for one in lists if isinstance(one, bool) or not isinstance(one, int)]:
            raise ConfigError("Latents are whole numbers", found=repr(wrong[0]))
        return list(lists)

    chosen = check_latents(of(config.latents), n_latents, site)
    forbidden = check_latents(of(config.forbid), n_latents, site)
    if forbidden is None:
        return chosen
    left = set(range(n_latents)) if chosen is None else set(chosen.tolist())
    return check_latents(sorted(left - set(forbidden.tolist())), n_latents, site)


def _canonical(config: LatentConfig, lists: Any, sites: SiteMap, targets: set[str]) -> Any:
    """A list of latents, by absolute sites where it is by sites."""
    if lists is not None and config.component == "vector":
        raise ConfigError("A dense vector knows no latents", fix="Leave latents and forbid out")
    if not isinstance(lists, dict):
        return lists
    named = {sites.canonical(key): value for key, value in lists.items()}
    if unknown := named.keys() - targets:
        raise ConfigError(
            "Latents are listed for a site that the adapter does not edit",
            expected=", ".join(sorted(targets)),
            found=", ".join(sorted(unknown)),
        )
    return named


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


__all__ = ["WRITABLE", "Target", "allowed_latents", "find_targets", "tap_of"]
