"""What is interpreted: a dictionary, the model or the pair that it reads, and what its latents say of a token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.artifacts import input_entry, open_artifact
from palimpsest.dictionaries import Codes, Dictionary, load_dictionary
from palimpsest.errors import ArtifactError, ConfigError, DictionaryError
from palimpsest.evaluate.views import Source, site_of
from palimpsest.models import SIDES, LanguageModel, Side, load_model, load_pair
from palimpsest.options import ModelOptions

RECORDED = ("dtype", "revision", "tuned_revision", "load_kwargs", "force_base")
"""How models were loaded, as far as it decides what they are; code of a checkpoint is allowed anew each time."""

PAIRED = ("diff", "pair")
"""Views whose dictionaries need both models."""


class Signals(NamedTuple):
    """What the latents say of the same tokens.

    Attributes:
        value: What examples are chosen by: the larger of both models' codes under an SAE, the joint code of a
            crosscoder, the code of the difference under a diff-SAE.
        base: The code on the base's activations; under a crosscoder with the base in both slots. None under a diff-SAE.
        tuned: The same of the tuned model; None also where there is one model only.
    """

    value: Codes
    base: Codes | None
    tuned: Codes | None


@dataclass(frozen=True)
class Subject:
    """A dictionary on the models that it reads.

    Attributes:
        source: One model, or a pair.
        dictionary: On the device of the models.
        site: Where it reads, as in `resid_post.13`.
    """

    source: Source
    dictionary: Dictionary
    site: str

    @property
    def sides(self) -> tuple[Side, ...]:
        """The models that there are; a lone one counts as the base."""
        return ("base",) if isinstance(self.source, LanguageModel) else SIDES

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the models."""
        return self.source.tokenizer

    def model(self, side: Side) -> LanguageModel:
        """One of the models.

        Raises:
            ConfigError: There is no such model.
        """
        if isinstance(self.source, LanguageModel):
            if side != "base":
                raise ConfigError(
                    "There is no tuned model here", expected="a pair", found=f"one model, {self.source.name}"
                )
            return self.source
        return self.source.side(side)

    def own_signals(
        self, acts: Float[Tensor, "tokens models d_model"], *, check: bool = True
    ) -> tuple[Codes | None, Codes | None, Codes | None]:
        """The codes that are computed, of (joint or difference, base, tuned); the first is None under an SAE.

        Args:
            acts: Of the models in the order of `sides`.
            check: Refuse NaN and infinity, for which an accelerator must be waited for.
        """
        encode, view = self.dictionary.encode, self.dictionary.view
        if view == "diff":
            return encode(acts[:, 1] - acts[:, 0], check=check), None, None
        if view == "pair":
            # A crosscoder reads one model's activations as those of both.
            own = [encode(acts[:, place : place + 1].expand(-1, 2, -1), check=check) for place in range(2)]
            return encode(acts, check=check), own[0], own[1]
        tuned = encode(acts[:, 1], check=check) if acts.shape[1] > 1 else None
        return None, encode(acts[:, 0], check=check), tuned

    def signals(self, acts: Float[Tensor, "tokens models d_model"]) -> Signals:
        """What the latents say of activations.

        Args:
            acts: Of the models in the order of `sides`, on the dictionary's device.

        Raises:
            NumericsError: There is NaN or infinity among them.
        """
        joint, base, tuned = self.own_signals(acts)
        if joint is None:
            assert base is not None
            joint = base if tuned is None else larger(base, tuned)
        return Signals(joint, base, tuned)


def larger(left: Codes, right: Codes) -> Codes:
    """The larger of two codes of the same tokens, latent by latent; rows ordered strongest first."""
    n_latents, tokens = left.n_latents, left.tokens
    keys = torch.cat([one.rows() * n_latents + one.indices.long() for one in (left, right)])
    values = torch.cat([left.values, right.values])
    kept = values > 0
    unique, place = torch.unique(keys[kept], return_inverse=True)
    best = values.new_zeros(len(unique)).scatter_reduce_(0, place, values[kept], "amax")
    # Ties go to the smaller latent: unique keys ascend, and both sorts are stable.
    order = best.argsort(descending=True, stable=True)
    order = order[(unique[order] // n_latents).argsort(stable=True)]
    starts = torch.arange(tokens + 1, device=unique.device) * n_latents
    crow = torch.searchsorted(unique, starts)
    return Codes(crow, unique[order] % n_latents, best[order], n_latents)


def open_subject(
    base: str | Path,
    tuned: str | Path | None,
    dictionary: str | Path,
    site: str | None = None,
    options: ModelOptions | None = None,
) -> Subject:
    """Load a dictionary with its model or pair.

    Args:
        base: A folder or hub id.
        tuned: Its fine-tune, a checkpoint or an adapter; None reads one model.
        dictionary: A folder or hub id.
        site: Where to read; the dictionary's own site by default.
        options: How models are loaded.

    Raises:
        ConfigError: The dictionary reads two models and there is one, or one at a time.
        PalimpsestError: Something cannot be loaded, or does not fit.
    """
    options = options or ModelOptions()
    read = load_dictionary(dictionary)
    check_view(read, str(dictionary), str(base), tuned is not None, options)
    source = load_model(base, options) if tuned is None else load_pair(base, tuned, options)
    return subject_from(source, read, site)


def subject_from(source: Source, dictionary: Dictionary, site: str | None = None) -> Subject:
    """A subject of models that are loaded already.

    Raises:
        DictionaryError: No site is known, or the dictionary has another width than it.
        SiteError: The model has no such site.
    """
    first = source if isinstance(source, LanguageModel) else source.base
    found = site_of(dictionary, first, site, loss=False)
    return Subject(source, dictionary.to(first.device).requires_grad_(False).eval(), found)


def check_view(dictionary: Dictionary, path: str, base: str, paired: bool, options: ModelOptions) -> None:
    """Say before any model is loaded that a dictionary of two models lacks one.

    Raises:
        ConfigError: It does.
        DictionaryError: It reads another number of models.
    """
    if dictionary.view not in PAIRED:
        return
    if not paired:
        raise ConfigError(
            f"{path} reads a base and a tuned model (view {dictionary.view})",
            expected="BASE TUNED",
            found=f"one model, {base}",
        )
    if options.one_at_a_time:
        raise ConfigError(
            f"{path} reads both models at once (view {dictionary.view})",
            fix="Leave --one-at-a-time out",
        )
    if dictionary.view == "pair" and dictionary.models != len(SIDES):
        raise DictionaryError(
            "This dictionary does not read a pair", expected="2 models", found=f"{dictionary.models} models"
        )


def subject_of(
    folder: str | Path,
    options: ModelOptions | None = None,
    base: str | Path | None = None,
    tuned: str | Path | None = None,
) -> Subject:
    """What a folder of examples was made of.

    Args:
        folder: Written by `palimpsest examples`.
        options: How models are loaded; by default as the folder's models were, wherever there is a device.
        base: Where the base is now; the recorded place by default.
        tuned: Where the tuned model is now.

    Raises:
        ArtifactError: The folder is no finished examples folder, a model or the dictionary is not where it was, or
            another dictionary is there.
    """
    artifact = open_artifact(folder, stage="examples", verify=False)
    config = artifact.config
    places = {
        "base": base or config["base"],
        "tuned": tuned or config["tuned"],
        "dictionary": config["dictionary"],
    }
    for what, place in places.items():
        _require_place(folder, what, place)
    _require_dictionary(folder, artifact.inputs.get("dictionary") or {})
    if options is None:
        loaded = {key: config["models"][key] for key in RECORDED}
        options = replace(ModelOptions(), **loaded)
    return open_subject(places["base"], places["tuned"], places["dictionary"], config["site"], options)


def _require_dictionary(folder: str | Path, recorded: dict[str, str | None]) -> None:
    """Refuse a dictionary that was trained again since: its latents are others under the same numbers."""
    place, before = recorded.get("path"), recorded.get("sha256")
    if place is None or before is None or not Path(place).exists():
        return
    if (now := input_entry(place)["sha256"]) != before:
        raise ArtifactError(
            f"{place} is not the dictionary that {folder} was made with",
            expected=f"sha256 {before[:12]}…",
            found=f"{now[:12]}…",
            fix="Put the old one back, or collect the examples again (palimpsest examples … --overwrite)",
        )


def _require_place(folder: str | Path, what: str, place: str | Path | None) -> None:
    """Refuse a path that has gone; a hub id (`owner/name`) is not looked up."""
    if place is None or Path(place).exists() or str(place).count("/") == 1:
        return
    fix = f"Name its {what} model as it is called now" if what != "dictionary" else "Move it back"
    raise ArtifactError(f"The {what} that {folder} was made with is gone", found=str(place), fix=fix)
