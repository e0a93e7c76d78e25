"""From options to a model with a new adapter: what is refused, which latents may move, what is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from palimpsest.corpus import special_ids
from palimpsest.errors import ConfigError
from palimpsest.log import log
from palimpsest.models import LanguageModel, load_model
from palimpsest.tune.adapter import LatentConfig
from palimpsest.tune.choices import MOVED
from palimpsest.tune.config import AdapterOptions, TuneConfig
from palimpsest.tune.training import hushed

LORA_RANK = 8
"""Of a LoRA, where none is given."""

TOO_LITTLE = 10 * MOVED
"""A run that can move no value by as much is warned about."""


def open_base(config: TuneConfig) -> LanguageModel:
    """The base model of a run.

    Raises:
        ConfigError: It is quantised, or not on one device.
        PairError: It cannot be loaded.
    """
    check_options(config)
    language = load_model(config.model, config.models)
    refuse_parts(language.model, config.model)
    return language


def check_options(config: TuneConfig) -> None:
    """Refuse combinations that mean nothing, and a reward that cannot be imported, before anything is loaded.

    Raises:
        ConfigError: As said.
    """
    adapter, schedule = config.adapter, config.schedule
    if config.objective.reward is not None:
        from palimpsest.tune.objectives.rewards import load_reward

        load_reward(config.objective.reward)
    if adapter.component not in ("lora", "vector"):
        return
    given = {
        "--l1": schedule.l1,
        "--group": schedule.group,
        "--top-n": schedule.top_n,
        "--latents": adapter.latents,
        "--forbid": adapter.forbid,
    }
    if adapter.component == "lora":
        given |= {"--scope": adapter.scope != "all", "--allow-quadratic": adapter.allow_quadratic}
    if unused := [name for name, value in given.items() if value]:
        raise ConfigError(
            f"{adapter.component} has no latents, so {', '.join(unused)} would do nothing",
            fix="Leave it out, or choose another --component",
        )


def refuse_parts(model: Any, name: str) -> None:
    """Refuse a base that is quantised, or in parts on several devices.

    Raises:
        ConfigError: As said.
    """
    bits = next((n for n in (4, 8) if getattr(model, f"is_loaded_in_{n}bit", False)), None)
    quantised = bits or getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False)
    if quantised:
        raise ConfigError(
            f"{name} is quantised, and latents are not trained through quantised weights",
            expected="a base in float32, bfloat16 or float16",
            found=f"{bits} bits" if bits else str(quantised),
            fix="Load it without quantisation (--dtype bfloat16 halves its memory)",
        )
    places = {str(one.device) for one in model.parameters()}
    places |= {str(one) for one in (getattr(model, "hf_device_map", None) or {}).values()}
    # A map names a device by its number alone.
    devices = {f"cuda:{place}" if place.isdigit() else place for place in places}
    if len(devices) > 1 or "meta" in devices or "disk" in devices:
        raise ConfigError(
            f"{name} is spread over several devices, and training runs on one",
            expected="a model in the memory of one device",
            found=", ".join(sorted(devices)),
            fix="Leave --device-map out; --dtype bfloat16 and --gradient-checkpointing need less memory",
        )


def attach(config: TuneConfig, language: LanguageModel) -> Any:
    """The peft model of a base with a new adapter, seeded.

    Raises:
        PalimpsestError: An option makes no sense, or a dictionary does not fit the model.
    """
    from peft import get_peft_model

    made = adapter_config(config, language)
    # Low-rank components and LoRA begin with random numbers.
    torch.manual_seed(config.run.seed)
    with hushed():
        model = get_peft_model(language.model, made)
    made.base_model_name_or_path = config.model
    trained = parameters(model)
    log.info("%s: %s trainable parameters.", config.adapter.component, f"{trained:,}")
    # The learning rate falls linearly to 0.
    bound = config.lr * config.schedule.steps / 2
    if isinstance(made, LatentConfig) and bound < TOO_LITTLE:
        log.warning(
            "|change| of a latent is at most about lr x steps / 2 = %.2g: nothing will move. Raise --lr or --steps.",
            bound,
        )
    return model


def parameters(model: Any) -> int:
    """How many numbers are trained."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def adapter_config(config: TuneConfig, language: LanguageModel) -> Any:
    """What peft is told: a `LatentConfig`, or a `LoraConfig` on all linear layers.

    Raises:
        ConfigError: A list of latents cannot be read or belongs to no site.
    """
    adapter = config.adapter
    if adapter.component == "lora":
        from peft import LoraConfig

        return LoraConfig(
            r=adapter.rank or LORA_RANK,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=config.model,
        )
    sites = config.site or (None,) * len(config.dictionary)
    return LatentConfig(
        target_hooks=list(zip(config.dictionary, sites, strict=True)),
        component=adapter.component,
        transform=adapter.transform,
        rank=adapter.rank,
        activation=adapter.activation,
        scope=adapter.scope,
        scope_tokens=adapter.scope_tokens,
        skip_ids=skipped(adapter, language.tokenizer),
        latents=read_latents(adapter.latents, "--latents", len(config.dictionary), language),
        forbid=read_latents(adapter.forbid, "--forbid", len(config.dictionary), language),
        dictionary_dtype=adapter.dictionary_dtype,
        allow_quadratic=adapter.allow_quadratic,
        base_model_name_or_path=config.model,
    )


def skipped(adapter: AdapterOptions, tokenizer: Any) -> list[int] | None:
    """Token ids that are left alone; None leaves it to the model's own BOS and padding."""
    if adapter.skip_special == "none":
        return []
    if adapter.skip_special == "all":
        return [int(one) for one in special_ids(tokenizer)]
    found = {one for one in (tokenizer.bos_token_id, tokenizer.pad_token_id) if one is not None}
    return sorted(found) or None


def read_latents(
    given: Sequence[str], option: str, dictionaries: int, language: LanguageModel
) -> dict[str, list[int]] | list[int] | None:
    """Latents by site, or one list where there is one dictionary; None where none are given.

    Args:
        given: Numbers, files with one number a line, or `site=file` and `site=number`.
        option: Named in errors.
        dictionaries: How many there are.
        language: Whose sites may be named.

    Raises:
        ConfigError: A file holds no numbers, or it is not clear which site is meant.
        SiteError: The model has no such site.
    """
    of_sites: dict[str, list[int]] = {}
    plain: list[int] = []
    for one in given:
        site, separator, source = one.partition("=")
        if separator:
            of_sites.setdefault(language.sites.canonical(site), []).extend(_numbers(source, option))
        else:
            plain += _numbers(one, option)
    if plain and (of_sites or dictionaries > 1):
        raise ConfigError(
            f"It is not clear which site {option} speaks of",
            expected="site=file for each, as in resid_post.13=latents.txt",
            found=" ".join(given[:4]),
        )
    return of_sites or plain or None


def _numbers(source: str, option: str) -> list[int]:
    """A number, or those of a file."""
    if source.isdigit():
        return [int(source)]
    try:
        lines = [
            line.partition("#")[0].strip() for line in Path(source).read_text(encoding="utf-8").splitlines()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{option} {source} is neither a latent nor a file",
            expected="a number, or a file with one per line",
        ) from error
    wrong = next((place for place, line in enumerate(lines, 1) if line and not line.isdigit()), None)
    if wrong is not None or not any(lines):
        raise ConfigError(
            f"{option}: {source} holds no latents",
            expected="one number per line",
            found="no numbers" if wrong is None else f"line {wrong}: {lines[wrong - 1][:40]!r}",
        )
    return [int(line) for line in lines if line]
