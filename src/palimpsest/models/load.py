"""Loading a base and its fine-tune: two checkpoints, two revisions, or an adapter on one set of weights."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from palimpsest.errors import ConfigError, PairError, PalimpsestError
from palimpsest.log import log
from palimpsest.models.pair import SIDES, LanguageModel, ModelPair, Side
from palimpsest.models.sites import SiteMap
from palimpsest.models.tokenizers import load_tokenizer, shared_tokenizer
from palimpsest.models.verify import verify_sites
from palimpsest.models.weights import adapter_prefix, is_adapter
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
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model, revision, options)
    hf_model = _load_weights(model, revision, options)
    return _readable(str(model), hf_model, tokenizer)


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
    adapter = _adapter_config(tuned, options)
    base_tokenizer = load_tokenizer(base, options.revision, options)
    if adapter is not None:
        return _adapter_pair(base, tuned, adapter, base_tokenizer, options)
    tuned_revision = options.tuned_revision or (options.revision if str(base) == str(tuned) else None)
    tokenizer = shared_tokenizer(
        base_tokenizer, load_tokenizer(tuned, tuned_revision, options, required=False), str(base), str(tuned)
    )
    _check_dimensions(base, tuned, options, tuned_revision)
    loaders: dict[Side, Callable[[], LanguageModel]] = {
        "base": lambda: load_model(base, options, tokenizer=tokenizer),
        "tuned": lambda: _readable(str(tuned), _load_weights(tuned, tuned_revision, options), tokenizer),
    }
    pair = ModelPair(loaders, tokenizer, kind="full", one_at_a_time=options.one_at_a_time)
    if not pair.one_at_a_time:
        for side in SIDES:
            pair.side(side)
    return pair


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
    dtype: Any = options.dtype
    if dtype == "auto" and options.device_map is None and device.type == "cpu":
        dtype = "float32"
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


def _adapter_config(tuned: Location, options: ModelOptions) -> dict[str, Any] | None:
    """The adapter's configuration when `tuned` is a PEFT adapter, else None."""
    folder = Path(tuned)
    if folder.is_dir():
        path: str | None = (
            str(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
        )
    elif folder.exists():
        raise PairError(f"{tuned} is a file", expected="the folder of a model or an adapter, or a hub id")
    else:
        from transformers.utils.peft_utils import find_adapter_config_file

        try:
            path = find_adapter_config_file(str(tuned), revision=options.tuned_revision)
        except OSError as error:
            raise PairError(
                f"There is no {tuned}",
                expected="the folder of a model or an adapter, or a hub id",
                found=" ".join(str(error).split())[:400],
            ) from error
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PairError(f"{path} is not JSON", found=str(error)) from error
    if not isinstance(config, dict):
        raise PairError(f"{path} is no adapter configuration", expected="an object", found=str(config)[:80])
    return config


def _adapter_pair(
    base: Location, tuned: Location, config: dict[str, Any], tokenizer: Any, options: ModelOptions
) -> ModelPair:
    _check_adapter(base, tuned, config)
    hf_model = _load_weights(base, options.revision, options)
    peft_model = _attach(hf_model, base, tuned, options)
    own = load_tokenizer(tuned, options.tuned_revision, options, required=False)
    tokenizer = shared_tokenizer(tokenizer, own, str(base), str(tuned))
    inner = peft_model.get_base_model()
    sites = SiteMap(inner, tokenizer, str(base))
    prefix = adapter_prefix(peft_model)
    sides: dict[Side, LanguageModel] = {
        "base": LanguageModel(str(base), inner, sites, tokenizer, peft_model.disable_adapter, prefix),
        "tuned": LanguageModel(str(tuned), inner, sites, tokenizer, adapter_prefix=prefix, adapter_on=True),
    }
    for model in sides.values():
        verify_sites(model)
    pair = ModelPair({side: lambda m=model: m for side, model in sides.items()}, tokenizer, kind="adapter")
    for side in SIDES:
        pair.side(side)
    return pair


def _attach(hf_model: nn.Module, base: Location, tuned: Location, options: ModelOptions) -> Any:
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    wrong = dict(
        expected=f"an adapter trained on {base}", fix="Name the base model that the adapter was trained on"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model = PeftModel.from_pretrained(hf_model, str(tuned), revision=options.tuned_revision)
            weights = load_peft_weights(str(tuned), device="cpu")
            loaded = set_peft_model_state_dict(peft_model, weights)
    except PalimpsestError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, TypeError, SafetensorError) as error:
        raise PairError(
            f"The adapter {tuned} does not fit {base}", found=" ".join(str(error).split())[:400], **wrong
        ) from error
    if loaded.unexpected_keys:
        raise PairError(
            f"The adapter {tuned} changes modules that {base} does not have",
            found=loaded.unexpected_keys[0],
            **wrong,
        )
    if absent := [name for name in loaded.missing_keys if is_adapter(name, adapter_prefix(peft_model))]:
        raise PairError(
            f"The adapter {tuned} has no weights for some modules of {base} that it should change",
            found=absent[0],
            **wrong,
        )
    return peft_model.eval()


def _check_adapter(base: Location, tuned: Location, config: dict[str, Any]) -> None:
    """Refuse what cannot be switched off again, and an adapter whose recorded base is another model."""
    if config.get("bias", "none") != "none":
        raise PairError(
            f"The adapter {tuned} also trained the base's own biases, which cannot be switched off",
            expected='an adapter with bias "none"',
            found=f'bias "{config["bias"]}"',
            fix="Merge the adapter and audit the merged checkpoint",
        )
    if config.get("peft_type") in {
        "PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "CPT",
    }:
        raise PairError(
            f"The adapter {tuned} adds virtual tokens, so the two models do not read the same positions",
            expected="an adapter that changes weights or activations, such as LoRA",
            found=config["peft_type"],
        )
    recorded = config.get("base_model_name_or_path")
    if not recorded:
        return
    candidates = [Path(recorded), Path(tuned).parent / recorded]
    local = [path for path in candidates if (path / "config.json").is_file()]
    mine = Path(base) / "config.json"
    if local and mine.is_file() and not any(_same_weights(path, Path(base)) for path in local):
        raise PairError(
            f"The adapter {tuned} was trained on another base",
            expected=f"{recorded}, as its adapter_config.json says",
            found=str(base),
            fix=f"Pass {recorded} as the base",
        )
    if Path(recorded).name != Path(base).name:
        log.warning("The adapter %s names '%s' as its base; it is read on %s.", tuned, recorded, base)


def _same_weights(a: Path, b: Path) -> bool:
    """Whether two model folders hold the same files of weights, by size and head."""

    def heads(folder: Path) -> list[tuple[str, int, bytes]]:
        rows = []
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                rows.append((path.name, path.stat().st_size, file.read(1 << 20)))
        return rows

    return heads(a) == heads(b)
