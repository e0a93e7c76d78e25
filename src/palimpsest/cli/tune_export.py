"""`palimpsest tune export`."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from palimpsest.cli.command import Display, emit, say

FLAT = Parameter(name="*")


@dataclass(frozen=True)
class ExportConfig:
    """A constant-vector adapter in another tool's format."""

    adapter: str
    """The adapter's folder; its component must be bias or vector."""

    _: KW_ONLY

    to: Literal["steered", "gguf", "vector"]
    """steered: for lm-evaluation-harness (.pt). gguf: a control vector for llama.cpp. vector: safetensors."""

    out: Path
    """The file that is written."""

    overwrite: bool = False
    """Replace the file if it is there."""


def export(
    config: Annotated[ExportConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Write an adapter that adds a constant vector as a steering vector of another tool."""
    from palimpsest.tune.export import export_adapter

    made = export_adapter(config.adapter, config.to, config.out, overwrite=config.overwrite)
    emit(
        display,
        {"out": str(made.path), "to": made.to, "sites": made.sites, "notes": made.notes},
        lambda: _show(made.path, made.sites, made.notes, config),
    )


def _show(path: Path, sites: list[str], notes: list[str], config: ExportConfig) -> None:
    say(f"{path}: {', '.join(sites)} of {config.adapter}, as {config.to}")
    for note in notes:
        say(f"  {note}")
    if config.to == "steered":
        say(f"  lm_eval --model steered --model_args pretrained=BASE,steer_path={path} --tasks …")
    elif config.to == "gguf":
        say(f"  llama-cli -m BASE.gguf --control-vector {path} …")
