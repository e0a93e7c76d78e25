"""What was compared, what the reader must know first, and what a second person needs to repeat it."""

from typing import Any

from palimpsest.report import verdicts
from palimpsest.report.display import count, finite, measure, percent, visible

Audit = dict[str, Any]
Fact = tuple[str, Any, str]
"""Label, value, and kind: base, tuned or nothing."""


def _joined(*parts: tuple[Any, str]) -> str | None:
    """The parts that are known, with commas; None when there is none."""
    return ", ".join(form.format(value) for value, form in parts if value) or None


def _pair_facts(pair: Audit) -> list[Fact]:
    kind = str(pair.get("kind"))
    layers, width, dtype = pair.get("n_layers"), pair.get("d_model"), pair.get("dtype")
    return [
        ("base", pair.get("base"), "base"),
        ("tuned", pair.get("tuned"), "tuned"),
        (
            "kind",
            {"full": "full checkpoint", "adapter": "adapter on the base"}.get(kind, pair.get("kind")),
            "",
        ),
        ("size", _joined((layers, "{} layers"), (width, "width {}"), (dtype, "{}")), ""),
    ]


def _dictionary_facts(dictionary: Audit, site: Any) -> list[Fact]:
    latents, activation, k = (dictionary.get(key) for key in ("latents", "activation", "k"))
    return [
        ("read at", site, ""),
        ("dictionary", dictionary.get("path"), ""),
        ("made for", dictionary.get("site"), ""),
        ("latents", _joined((latents and count(latents), "{}"), (activation, "{}"), (k, "k {}")), ""),
    ]


def _measurement_facts(audit: Audit) -> list[Fact]:
    tokens = {"content": "content tokens only", "all": "all positions"}.get(str(audit.get("tokens")))
    mode = {"macro": "mean over documents", "legacy": "legacy: pooled over tokens, counts 0…k"}
    share, resamples = finite(audit.get("confidence")), audit.get("resamples")
    intervals = _joined(
        (share and percent(share, 0), "{}"), (resamples and count(resamples), "{} resamples of documents")
    )
    return [
        ("primary k", audit.get("k"), ""),
        ("tokens", tokens, ""),
        ("means", mode.get(str(audit.get("mode"))), ""),
        ("intervals", intervals, ""),
    ]


def facts(audit: Audit) -> list[tuple[str, list[Fact]]]:
    """Titled groups of facts on the pair, the dictionary and the measurement."""
    return [
        ("The pair", _pair_facts(audit.get("pair") or {})),
        ("The dictionary", _dictionary_facts(audit.get("dictionary") or {}, audit.get("site"))),
        ("The measurement", _measurement_facts(audit)),
    ]


def callouts(audit: Audit) -> list[Audit]:
    """Warnings to show at the top; a blind dictionary is named even when the audit's text does not."""
    warnings = [{"title": "Warning", "text": text} for text in audit.get("warnings") or []]
    for warning in warnings:
        if "blind" in str(warning["text"]).lower():
            warning["title"] = "This dictionary is blind here"
        elif audit.get("calibration") and "extrapolat" in str(warning["text"]).lower():
            warning["title"] = "Outside the range of the nulls"
    said = " ".join(str(w["text"]) for w in warnings if "blind" in str(w["text"]).lower())
    for data in audit.get("datasets") or []:
        if data.get("blind") and str(data.get("name")) not in said:
            r2 = measure(data.get("r2_delta"), digits=2).text
            text = (
                f"On “{visible(data.get('name'), 60)}” the latents explain little of what changed "
                f"(R²_Δ {r2}): overlap can stay high there although the model changed."
            )
            warnings.append({"title": "This dictionary is blind here", "text": text})
    return verdicts.callouts(audit) + warnings


def reproducibility(audit: Audit, manifest: Audit) -> list[tuple[str, Any]]:
    """What a second person needs to get the same numbers."""
    pair, dictionary = audit.get("pair") or {}, audit.get("dictionary") or {}
    battery = (audit.get("calibration") or {}).get("battery") or {}
    packages = ", ".join(
        f"{name} {version}" for name, version in sorted((manifest.get("packages") or {}).items())
    )
    rows = [
        ("base weights", pair.get("fingerprint_base")),
        ("tuned weights", pair.get("fingerprint_tuned")),
        ("dictionary sha256", dictionary.get("sha256")),
        ("battery", battery.get("path")),
        ("battery sha256", battery.get("sha256")),
        ("seed", audit.get("seed")),
        ("schema", audit.get("schema")),
        ("palimpsest", manifest.get("palimpsest")),
        ("packages", packages or None),
        ("device", manifest.get("device")),
        ("configuration hash", manifest.get("config_hash")),
        ("run created", manifest.get("created")),
    ]
    optional = {
        "battery",
        "battery sha256",
        "palimpsest",
        "packages",
        "device",
        "configuration hash",
        "run created",
    }
    return [(label, value) for label, value in rows if value is not None or label not in optional]
