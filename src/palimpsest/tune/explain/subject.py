"""An adapter on its base model, ready to be read, and further adapters on the same base beside it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from palimpsest.artifacts import input_entry, open_artifact
from palimpsest.errors import ArtifactError, ConfigError, DictionaryError, PairError, PalimpsestError
from palimpsest.labelcache import neuronpedia_id
from palimpsest.models import LanguageModel, fingerprint, load_model
from palimpsest.models.adapters import adapter_config, attach_adapter, check_adapter
from palimpsest.options import ModelOptions
from palimpsest.tune.adapter import LatentConfig
from palimpsest.tune.config import ObjectiveOptions
from palimpsest.tune.explain.latents import Latents
from palimpsest.tune.explain.result import SiteAbout

NAME = "default"


@dataclass(frozen=True, eq=False)
class Subject:
    """One adapter on its base.

    Attributes:
        path: Its folder.
        model: The peft model.
        language: The base, for its head, tokenizer and context.
        config: The adapter's configuration.
        latents: Its latents.
        objective: What it was trained for, where a run of `palimpsest tune` says so.
        base: The base model's folder or hub id.
        weights: Fingerprint of the base's weights.
    """

    path: str
    model: Any
    language: LanguageModel
    config: LatentConfig
    latents: Latents
    objective: ObjectiveOptions | None
    base: str
    weights: str

    @property
    def sites(self) -> list[SiteAbout]:
        """What the adapter edits."""
        names = {site: name for name, site in self.config.target_hooks}
        found = []
        for index, (site, layer) in enumerate(zip(self.latents.sites, self.latents.layers, strict=True)):
            dictionary = layer.dictionary_of(self.latents.adapter)
            inside = slice(self.latents.starts[index], self.latents.starts[index + 1])
            found.append(
                SiteAbout(
                    site=site,
                    dictionary=str(names[site]),
                    sha256=self.config.hashes[site],
                    latents=dictionary.n_latents,
                    edited=int(self.latents.editable[inside].sum()),
                    neuronpedia=neuronpedia_id(dictionary.metadata),
                )
            )
        return found

    def seen(self, files: Sequence[Path]) -> list[Path]:
        """Those of the files whose content the adapter was trained on, by hash."""
        try:
            inputs = open_artifact(self.path, stage="tune", verify=False, allow_running=True).manifest[
                "inputs"
            ]
        except (ArtifactError, KeyError):
            return []
        known = {one.get("sha256") for name, one in inputs.items() if name == "data"}
        return [one for one in files if input_entry(one)["sha256"] in known]


def load_subject(path: str, model: str | None, options: ModelOptions) -> Subject:
    """Load the base that an adapter names, or the one given, and put the adapter on it.

    Raises:
        PalimpsestError: There is no latent adapter, no base, or they do not fit.
    """
    content = _latent_config(path)
    base = model or _base(path, content)
    # Which tokens are prompt and which are answer is known here, unlike in plain text.
    check_adapter(base, path, content | {"scope": "all"}, force=options.force_base)
    language = load_model(base, options)
    weights = fingerprint(language)
    peft_model = attach_adapter(language.model, base, path, None)
    return _subject(path, peft_model, language, NAME, (base, weights))


def add_adapter(subject: Subject, path: str, name: str) -> Subject:
    """Put another adapter beside one; it edits nothing until it is active.

    Raises:
        PalimpsestError: It is none, or uses other dictionaries or sites.
    """
    content = _latent_config(path)
    theirs, mine = content.get("hashes") or {}, subject.config.hashes
    if theirs != mine:
        raise DictionaryError(
            f"{path} edits other latents than {subject.path}: only adapters through the same dictionaries compare",
            expected=_hashes(mine),
            found=_hashes(theirs),
            fix="Train it with the same --dictionary and --site",
        )
    attach(subject, path, name)
    found = _subject(path, subject.model, subject.language, name, (subject.base, subject.weights))
    subject.model.set_adapter(NAME)
    return found


def attach(subject: Subject, path: str, name: str) -> None:
    """Read the weights of an adapter into the model.

    Raises:
        PairError: They do not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = subject.model.load_adapter(path, adapter_name=name)
    except PalimpsestError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, TypeError) as error:
        raise PairError(
            f"The adapter {path} does not fit {subject.base}", found=" ".join(str(error).split())[:400]
        ) from error
    absent = [one for one in loaded.missing_keys if f".{name}." in one]
    if loaded.unexpected_keys or absent:
        raise PairError(
            f"The adapter {path} does not fit {subject.base}", found=[*loaded.unexpected_keys, *absent][0]
        )


def _subject(
    path: str, peft_model: Any, language: LanguageModel, name: str, base: tuple[str, str]
) -> Subject:
    peft_model.eval()
    peft_model.set_adapter(name)
    latents = Latents(peft_model, name)
    if not latents.editable.any():
        raise ConfigError(
            f"The adapter {path} has no latents to explain",
            expected="a component that changes latents",
            found=peft_model.peft_config[name].component,
        )
    return Subject(path, peft_model, language, peft_model.peft_config[name], latents, _objective(path), *base)


def _latent_config(path: str) -> dict[str, Any]:
    """The adapter's configuration, which says that it is one of ours."""
    content = adapter_config(path, None)
    if content is None:
        raise PairError(
            f"{path} holds no adapter",
            expected="a folder with adapter_config.json, as palimpsest tune writes it",
        )
    if content.get("peft_type") != "LATENT":
        raise ConfigError(
            f"{path} does not edit latents, so there are none to explain",
            expected="an adapter that palimpsest tune --dictionary wrote",
            found=str(content.get("peft_type")),
            fix="For other fine-tunes: palimpsest audit BASE ADAPTER, or palimpsest diff",
        )
    return content


def _base(path: str, content: Mapping[str, Any]) -> str:
    recorded = content.get("base_model_name_or_path") or _tune_json(path).get("model")
    if not recorded:
        raise ConfigError(f"{path} does not name its base model", fix="Pass --model BASE")
    near = Path(path).parent / str(recorded)
    return str(near) if not Path(recorded).exists() and near.exists() else str(recorded)


def _tune_json(path: str) -> dict[str, Any]:
    try:
        found = json.loads((Path(path) / "tune.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _objective(path: str) -> ObjectiveOptions | None:
    """The objective that the run of `palimpsest tune` recorded."""
    try:
        config = open_artifact(path, stage="tune", verify=False, allow_running=True).config
    except ArtifactError:
        return None
    stored = config.get("objective")
    if not isinstance(stored, dict):
        return None
    known = {field.name for field in fields(ObjectiveOptions)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored.items()
        if name in known
    }
    return ObjectiveOptions(**given)


def _hashes(of: Mapping[str, str]) -> str:
    return ", ".join(f"{site} {digest[:12]}" for site, digest in sorted(of.items())) or "no dictionaries"
