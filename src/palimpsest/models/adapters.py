"""PEFT adapters as the tuned side of a pair: recognised, checked against their base, attached."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from palimpsest.errors import PairError, PalimpsestError
from palimpsest.models.weights import adapter_prefix, is_adapter

Location = str | Path

OWN = {"LATENT": "palimpsest.tune.adapter"}
"""Our own peft types, and the module whose import makes peft know them; by name, because it ranks above this one."""


def adapter_config(tuned: Location, revision: str | None) -> dict[str, Any] | None:
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
            path = find_adapter_config_file(str(tuned), revision=revision)
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


def make_known(config: dict[str, Any]) -> None:
    """Register the adapter's method with peft where it is one of this package."""
    if (module := OWN.get(str(config.get("peft_type")))) is not None:
        import_module(module)


def attach_adapter(hf_model: nn.Module, base: Location, tuned: Location, revision: str | None) -> Any:
    """The model with the adapter's own weights, all of them and no others."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    wrong = dict(
        expected=f"an adapter trained on {base}", fix="Name the base model that the adapter was trained on"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model = PeftModel.from_pretrained(hf_model, str(tuned), revision=revision)
            weights = load_peft_weights(str(tuned), device="cpu", revision=revision)
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


def adapter_is_on(model: nn.Module) -> bool | None:
    """Whether the adapter layers of a model work now; None where it has none that could tell."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((one for one in model.modules() if isinstance(one, BaseTunerLayer)), None)
    return None if layer is None else not layer.disable_adapters


@contextmanager
def adapter_on(peft_model: Any) -> Iterator[None]:
    """The adapter at work, also inside a block that has switched it off."""
    if adapter_is_on(peft_model) is not False:
        yield
        return
    peft_model.base_model.enable_adapter_layers()
    try:
        yield
    finally:
        peft_model.base_model.disable_adapter_layers()


def check_adapter(
    base: Location, tuned: Location, config: dict[str, Any], *, force: bool = False
) -> list[str]:
    """Refuse what cannot be switched off again or read, and an adapter whose recorded base is another model.

    Returns:
        Notes for the reader of a result: with `force`, that the recorded base is another one.
    """
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
    if config.get("peft_type") == "LATENT" and config.get("scope") in ("prompt", "answer", "last"):
        raise PairError(
            f"The adapter {tuned} edits a part of prompt or answer, and plain text does not say which is which",
            expected="an adapter with scope all or first",
            found=f"scope {config['scope']}",
            fix="Read it with `palimpsest explain`, or train one with --scope all",
        )
    return _check_recorded_base(base, tuned, config.get("base_model_name_or_path"), force)


def recorded_base(tuned: Location, config: dict[str, Any]) -> str:
    """The base that an adapter names: a folder, looked for from here and beside the adapter, or a hub id.

    Raises:
        PairError: It names none.
    """
    recorded = config.get("base_model_name_or_path")
    if not recorded:
        raise PairError(
            f"The adapter {tuned} does not say which model it belongs to",
            fix="Name both: --base BASE --tuned ADAPTER",
        )
    return str(next(iter(_local_bases(tuned, recorded)), recorded))


def _local_bases(tuned: Location, recorded: str) -> list[Path]:
    candidates = [Path(recorded), Path(tuned).parent / recorded]
    return [path for path in candidates if (path / "config.json").is_file()]


def _check_recorded_base(base: Location, tuned: Location, recorded: str | None, force: bool) -> list[str]:
    """Compare the base that the adapter names with the one given; returns what a reader should know."""
    if not recorded:
        return []
    local = _local_bases(tuned, recorded)
    known = local and (Path(base) / "config.json").is_file()
    same = (
        any(_same_weights(path, Path(base)) for path in local)
        if known
        else Path(recorded).name == Path(base).name
    )
    if same:
        return []
    if not force:
        raise PairError(
            f"The adapter {tuned} was trained on another base",
            expected=f"{recorded}, as its adapter_config.json says",
            found=str(base),
            fix=f"Pass {recorded} as the base, or --force-base if {base} is the same model under another name",
        )
    return [f"The adapter names {recorded} as its base; it was read on {base}."]


def _same_weights(a: Path, b: Path) -> bool:
    """Whether two model folders hold the same tensors, by name, shape and a sample; in any dtype and sharding."""

    def samples(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    shape = part.get_shape()
                    row = part[shape[0] // 2 : shape[0] // 2 + 1].flatten()[:64]
                    # Both at the precision of the narrower: a checkpoint saved again in float32 is the same model.
                    found[name] = (shape, row.bfloat16().float().tolist())
        return found

    return samples(a) == samples(b)
