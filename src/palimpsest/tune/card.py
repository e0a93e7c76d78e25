"""The model card of an adapter: what it edits, what it did, which latents moved most, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from palimpsest.artifacts import disk
from palimpsest.dictionaries.publish import HUB_ID, fact_table, plain_text, without_paths
from palimpsest.errors import ArtifactError
from palimpsest.tune.choices import COMPONENTS

CARD = "README.md"
TOP = 20
_DATA = ("data", "eval_data", "general", "retain")
_METHODS = {"lora": "W + B A, and no latents"}

Labels = Mapping[str, Mapping[int, str]]
"""What latents stand for, by site."""


def write_card(folder: str | Path, result: Mapping[str, Any], *, labels: Labels | None = None) -> Path:
    """Write the model card of an adapter folder.

    Text of others (names, labels) is escaped, and of paths only the last part is shown.

    Args:
        folder: The adapter's folder, with `adapter_config.json`; `latents.parquet` and `manifest.json` are read too.
        result: What `tune.json` holds; what is missing is left out of the card.
        labels: What latents stand for, by site.

    Returns:
        The card's path.

    Raises:
        ArtifactError: The folder is no adapter.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder} holds no adapter", expected="adapter_config.json, an object of JSON")
    path = folder / CARD
    disk.write_bytes(path, adapter_card(folder, config, result, labels or {}).encode())
    return path


def adapter_card(folder: Path, config: Mapping[str, Any], result: Mapping[str, Any], labels: Labels) -> str:
    """The card's text."""
    base = config.get("base_model_name_or_path") or result.get("model") or "unknown"
    kind = str(result.get("method") or config.get("component") or config.get("peft_type") or "unknown")
    about = COMPONENTS.get(kind)
    formula = about.formula if about else _METHODS.get(kind, "")
    parts = [
        _front(base),
        f"# {plain_text(folder.resolve().name)}\n",
        f"An adapter of `{_name(base)}`, trained with Palimpsest: "
        f"`{plain_text(kind)}`" + (f", `{formula}`" if formula else "") + ".\n",
        fact_table("What it edits", _edits(config, result)),
        _dictionaries(config, result),
        fact_table("How it was trained", _training(folder, result)),
        _figures(result),
        _latents(folder, labels, kind),
        _how(base, str(config.get("peft_type"))),
        "## Licence\n\nNone is stated. Whoever publishes this adapter adds `license:` to the lines at the top, with "
        "the licences of the base model, the dictionaries and the data in mind.\n",
    ]
    return "\n".join(part for part in parts if part)


def _front(base: str) -> str:
    lines = [
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [palimpsest, sparse-autoencoder, interpretability]",
    ]
    # A folder of this machine is no model that the hub could link.
    if HUB_ID.fullmatch(str(base)) and not Path(str(base)).exists():
        lines.append(f"base_model: {json.dumps(str(base))}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _name(value: object) -> str:
    return plain_text(without_paths(str(value)))


def _edits(config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    sites = [site for _, site in _hooks(config)] or [one.get("site") for one in _rows(result.get("sites"))]
    fields = {
        "sites": [site for site in sites if site],
        "transform": config.get("transform") if config.get("transform") != "identity" else None,
        "rank": config.get("rank") or config.get("r"),
        "tokens": config.get("scope"),
        "left alone": _spared(config),
        "trainable parameters": result.get("parameters"),
        "latents moved": result.get("latents_moved"),
    }
    return {name: _number(value) for name, value in fields.items() if value not in (None, [])}


def _spared(config: Mapping[str, Any]) -> str | None:
    """Which tokens a latent adapter never edits."""
    if config.get("peft_type") != "LATENT" or config.get("skip_ids") == []:
        return None
    ids = config.get("skip_ids")
    return "BOS and padding" if ids is None else f"token ids {', '.join(map(str, ids[:20]))}"


def _hooks(config: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [tuple(one) for one in config.get("target_hooks") or [] if isinstance(one, list) and len(one) == 2]


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value or [] if isinstance(one, Mapping)]


def _dictionaries(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The dictionary of each site with its hash."""
    hashes = config.get("hashes") or {}
    known = {one.get("site"): one for one in _rows(result.get("sites"))}
    lines = [
        _row(
            [
                _code(site),
                _code(_name(name)),
                known.get(site, {}).get("latents"),
                _code(hashes.get(site) or ""),
            ]
        )
        for name, site in _hooks(config)
        if site
    ]
    return _table("Dictionaries", ("site", "dictionary", "latents", "sha256 of the weights"), lines)


def _training(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    rows = result.get("rows") or {}
    fields = {
        "objective": result.get("objective"),
        **_data_files(folder, result),
        "rows trained on": rows.get("train"),
        "rows held out": rows.get("heldout"),
        "steps": result.get("steps"),
        "learning rate": result.get("lr"),
        "seconds of training": result.get("seconds"),
        "stopped early": result.get("stopped"),
    }
    return {name: _number(value) for name, value in fields.items() if value not in (None, [], ())}


def _data_files(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the data files, from the result or from the run's own manifest."""
    config: Any = {}
    try:
        config = json.loads((folder / disk.MANIFEST).read_text(encoding="utf-8"))["config"]["objective"]
    except (OSError, ValueError, KeyError, TypeError):
        config = {}
    found = {}
    for name in _DATA:
        value = result.get(name) or (config.get(name) if isinstance(config, Mapping) else None)
        if isinstance(value, (list, tuple)) and value and all(isinstance(one, str) for one in value):
            found[name.replace("_", " ")] = [re.split(r"[/\\]", one.rstrip("/\\"))[-1] for one in value]
    return found


def _figures(result: Mapping[str, Any]) -> str:
    """What training did, with intervals."""
    lines = []
    for name, title in (
        ("objective_value", "objective, held-out rows"),
        ("heldout_loss", "held-out loss, nats per token"),
    ):
        if isinstance(one := result.get(name), Mapping):
            unit = f" ({plain_text(one['unit'])})" if one.get("unit") else ""
            change = _with_interval(one.get("difference"), one.get("ci"))
            lines.append(_row([title + unit, one.get("before"), one.get("after"), change]))
    if isinstance(one := result.get("general"), Mapping):
        change = f"KL from the base {_with_interval(one.get('kl'), one.get('ci'))} nats per token"
        lines.append(
            _row(
                [
                    "general text, loss in nats per token",
                    one.get("loss_before"),
                    one.get("loss_after"),
                    change,
                ]
            )
        )
    if isinstance(one := result.get("margin"), Mapping):
        accuracy = (
            "" if one.get("accuracy") is None else f", right in {100 * one['accuracy']:.0f} % of the pairs"
        )
        lines.append(
            _row(
                [
                    "margin of the preferred answers, nats",
                    0,
                    one.get("after"),
                    _interval(one.get("ci")) + accuracy,
                ]
            )
        )
    return _table("What it did", ("", "base", "with the adapter", "change"), lines)


def _with_interval(value: Any, interval: Any) -> str:
    return f"{_number(value)} {_interval(interval)}".strip()


def _interval(interval: Any) -> str:
    if not isinstance(interval, (list, tuple)) or len(interval) != 2 or None in interval:
        return ""
    return f"({_number(interval[0])} to {_number(interval[1])})"


def _latents(folder: Path, labels: Labels, kind: str) -> str:
    """The latents with the largest values at the end of training."""
    import duckdb

    path = folder / "latents.parquet"
    if not path.is_file():
        return ""
    query = (
        "select site, latent, value from read_parquet($path) where step = (select max(step) from read_parquet($path)) "
        f"and value != 0 order by abs(value) desc, site, latent limit {TOP}"
    )
    with duckdb.connect() as connection:
        found = connection.execute(query, {"path": str(path)}).fetchall()
    named = any(int(latent) in labels.get(site, {}) for site, latent, _ in found)
    lines = [
        _row(
            [
                _code(site),
                str(latent),
                value,
                *([_code(labels.get(site, {}).get(int(latent), ""))] if named else []),
            ]
        )
        for site, latent, value in found
    ]
    text = _table(
        "Latents that moved most", ("site", "latent", "value", *(["label"] if named else [])), lines
    )
    if text and kind == "bias":
        text += "\nMany sets of numbers give the same vector: these are one of them.\n"
    if text and named:
        text += "\nLabels are somebody's or some model's guess at what a latent means.\n"
    return text


def _table(title: str, head: Iterable[str], lines: list[str]) -> str:
    if not lines:
        return ""
    head = list(head)
    return f"## {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}\n" + "\n".join(lines) + "\n"


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(_number(cell)) for cell in cells) + " |"


def _code(value: object) -> str:
    """Text of others as code: no link, no emphasis, no markup in it is obeyed."""
    text = plain_text(value)
    return f"`{text}`" if text else ""


def _number(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value


def _how(base: str, peft_type: str) -> str:
    own = (
        "import palimpsest.tune.adapter  # makes the adapter known to peft\n" if peft_type == "LATENT" else ""
    )
    code = (
        f"{own}from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(_name(base))})\n"
        'model = PeftModel.from_pretrained(base, "ADAPTER")'
    )
    return (
        f"## Load it\n\n```python\n{code}\n```\n\nThis needs `pip install palimpsest-lm`. "
        "What the adapter changed, latent by latent: `palimpsest explain ADAPTER --corpus FILE`; "
        "beside its base: `palimpsest audit BASE ADAPTER`.\n"
    )
