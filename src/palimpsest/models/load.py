"""Loading a base and its fine-tune: two checkpoints, two revisions, or an adapter on one set of weights."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from palimpsest.errors import ConfigError, PairError
from palimpsest.models.adapters import (
    adapter_config,
    adapter_on,
    attach_adapter,
    check_adapter,
    make_known,
    recorded_base,
)
from palimpsest.models.pair import SIDES, LanguageModel, ModelPair, Side
from palimpsest.models.sites import SiteMap
from palimpsest.models.tokenizers import load_tokenizer, shared_tokenizer
from palimpsest.models.verify import verify_sites
from palimpsest.models.weights import adapter_prefix
from palimpsest.options import ModelOptions

Location = str | Path
_UNLOADABLE = (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError)


def load_model(
    model: Location,
    options: ModelOptions | None = None,
    *,
    revision: str | None = None,
    tokenizer: Any = None,
) -> LanguageModel:
    """Load one language model for reading, and verify its site map on a few tokens.

    The folder of a PEFT adapter stands for its base with the adapter on.

    Args:
        model: A folder or a hub id.
        options: Dtype, device and further loading options.
        revision: Overrides `options.revision`.
        tokenizer: Used instead of the model's own.

    Raises:
        PairError: When it cannot be loaded.
        SiteError: When its architecture is not understood or its sites fail the invariants.
    """
    options = options or ModelOptions()
    revision = revision or options.revision
    if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        return _adapted(model, replace(options, revision=revision), tokenizer)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model, revision, options)
    hf_model = _load_weights(model, revision, options)
    return _readable(str(model), hf_model, tokenizer)


def _adapted(model: Location, options: ModelOptions, tokenizer: Any) -> LanguageModel:
    config = adapter_config(model, None)
    assert config is not None
    options = replace(options, revision=options.revision or config.get("revision"), tuned_revision=None)
    return _adapter_pair(recorded_base(model, config), model, config, tokenizer, options).tuned


def load_pair(base: Location, tuned: Location, options: ModelOptions | None = None) -> ModelPair:
    """Load a base and its fine-tune.

    `tuned` is a full checkpoint, another revision of the base's repository (`tuned_revision`) or a PEFT
    adapter; then one set of weights is loaded and the adapter is switched on and off.

    Raises:
        PairError: When the two are no pair: other widths, depths or tokenizers, an adapter of another base.
        SiteError: When an architecture is not understood.

    Example:
        >>> pair = load_pair("base/", "math/")  # doctest: +SKIP
        >>> pair.tuned.sites.n_layers  # doctest: +SKIP
        4
    """
    options = options or ModelOptions()
    adapter = adapter_config(tuned, options.tuned_revision)
    base_tokenizer = load_tokenizer(base, options.revision, options)
    if adapter is not None:
        return _adapter_pair(base, tuned, adapter, base_tokenizer, options)
    tuned_revision = options.tuned_revision or (options.revision if str(base) == str(tuned) else None)
    tokenizer = shared_tokenizer(
        base_tokenizer, load_tokenizer(tuned, tuned_revision, options, required=False), str(base), str(tuned)
    )
    _check_dimensions(base, tuned, options, tuned_revision)
    options = _one_dtype(base, options)
    loaders: dict[Side, Callable[[], LanguageModel]] = {
        "base": lambda: load_model(base, options, tokenizer=tokenizer),
        "tuned": lambda: _readable(str(tuned), _load_weights(tuned, tuned_revision, options), tokenizer),
    }
    pair = ModelPair(loaders, tokenizer, kind="full", one_at_a_time=options.one_at_a_time)
    if not pair.one_at_a_time:
        for side in SIDES:
            pair.side(side)
    return pair


def _one_dtype(base: Location, options: ModelOptions) -> ModelOptions:
    """What dtype `auto` means, decided by the base for both sides: rounding only one of them looks like a change."""
    if options.dtype != "auto":
        return options
    if options.device_map is None and _device(options).type == "cpu":
        return replace(options, dtype="float32")
    stored = str(getattr(_config(base, options.revision, options), "dtype", None)).removeprefix("torch.")
    return replace(options, dtype=stored) if stored in ("float32", "bfloat16", "float16") else options


def _readable(name: str, hf_model: nn.Module, tokenizer: Any) -> LanguageModel:
    model = LanguageModel(name, hf_model, SiteMap(hf_model, tokenizer, name), tokenizer)
    verify_sites(model)
    return model


def _load_weights(model: Location, revision: str | None, options: ModelOptions) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    device = _device(options)
    dtype: Any = _one_dtype(model, options).dtype
    kwargs: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "trust_remote_code": options.trust_remote_code,
        **options.load_kwargs,
    }
    if options.device_map is not None:
        kwargs["device_map"] = options.device_map
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(model), **kwargs, output_loading_info=True)
    except (*_UNLOADABLE, SafetensorError, UnpicklingError) as error:
        raise PairError(
            f"Cannot load the model {model}",
            expected="a transformers causal language model: a folder with config.json and weights, or a hub id",
            found=" ".join(str(error).split())[:600],
        ) from error
    hf_model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise PairError(
            f"The checkpoint {model} lacks weights that its model has; they would be random",
            expected=f"{type(hf_model).__name__} with all its weights",
            found=f"{len(missing)} missing, such as {missing[0]}",
        )
    if options.device_map is None and getattr(hf_model, "hf_device_map", None) is None:
        hf_model = nn.Module.to(hf_model, device)
    return hf_model.eval()


def _device(options: ModelOptions) -> torch.device:
    """The device asked for, shown to be there."""
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ConfigError(
            f"The device {options.device} cannot be used",
            expected="cpu, or an accelerator of this machine such as cuda:0",
            found=str(error).splitlines()[0],
        ) from error
    return device


def _config(model: Location, revision: str | None, options: ModelOptions) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(model), revision=revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise PairError(
            f"Cannot read the configuration of {model}",
            expected="a transformers model or a PEFT adapter: a local folder or a hub id",
            found=" ".join(str(error).split())[:400],
        ) from error
    return config.get_text_config()


def _check_dimensions(base: Location, tuned: Location, options: ModelOptions, revision: str | None) -> None:
    mine, other = _config(base, options.revision, options), _config(tuned, revision, options)
    for field, word in (("hidden_size", "width"), ("num_hidden_layers", "number of layers")):
        if getattr(mine, field, None) != getattr(other, field, None):
            raise PairError(
                f"{tuned} is no fine-tune of {base}: their {word} differs",
                expected=f"{field} {getattr(mine, field, None)} as in the base",
                found=getattr(other, field, None),
                fix="Name the base model that this checkpoint was trained from",
            )


def _adapter_pair(
    base: Location, tuned: Location, config: dict[str, Any], tokenizer: Any, options: ModelOptions
) -> ModelPair:
    make_known(config)
    notes = check_adapter(base, tuned, config, force=options.force_base)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(base, options.revision, options)
    hf_model = _load_weights(base, options.revision, options)
    peft_model = attach_adapter(hf_model, base, tuned, options.tuned_revision)
    own = load_tokenizer(tuned, options.tuned_revision, options, required=False)
    tokenizer = shared_tokenizer(tokenizer, own, str(base), str(tuned))
    inner = peft_model.get_base_model()
    sites = SiteMap(inner, tokenizer, str(base))
    prefix = adapter_prefix(peft_model)
    sides: dict[Side, LanguageModel] = {
        "base": LanguageModel(str(base), inner, sites, tokenizer, peft_model.disable_adapter, prefix),
        "tuned": LanguageModel(
            str(tuned), inner, sites, tokenizer, partial(adapter_on, peft_model), prefix, adapter_on=True
        ),
    }
    for model in sides.values():
        verify_sites(model)
    pair = ModelPair(
        {side: lambda m=model: m for side, model in sides.items()}, tokenizer, kind="adapter", notes=notes
    )
    for side in SIDES:
        pair.side(side)
    return pair
