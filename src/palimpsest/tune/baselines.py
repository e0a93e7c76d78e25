"""A fine-tune through latents beside what else could be done with the same data, steps and batches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from palimpsest.artifacts import RunFolder, open_artifact
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.errors import DictionaryError
from palimpsest.log import log
from palimpsest.models import LanguageModel
from palimpsest.tune.baselines_config import CONTRASTED, BaselinesConfig, method_config, no_contrast
from palimpsest.tune.board import Board, Line
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.contrast import Contrast, read_contrast, sides
from palimpsest.tune.data import TuneData, load_data
from palimpsest.tune.diffmean import make_diffmean
from palimpsest.tune.penalties import layers_of
from palimpsest.tune.prepare import open_base
from palimpsest.tune.run import RESULT, measure
from palimpsest.tune.training import hushed
from palimpsest.tune.versions import board_from, figures, open_run, rank, train_version, write_board

STAGE = "tune-baselines"

NAME = "baselines"


class Best(NamedTuple):
    """The latent that tells the two kinds of text best."""

    place: int
    site: str
    latent: int
    difference: float


class Told(NamedTuple):
    """What the two kinds of text say.

    Attributes:
        contrasts: By site, in the order of the dictionaries; empty where no method needs them.
        best: The latent with the largest standardised difference, of any sign.
        seconds: What reading them took.
    """

    contrasts: Mapping[str, Contrast]
    best: Best | None
    seconds: float


def run_baselines(config: BaselinesConfig) -> Board:
    """Make an adapter with every method in `config.run.out/METHOD`; write `baselines.json` and `baselines.md`.

    With `resume`, finished ones are kept and an interrupted one goes on from its checkpoint.

    Returns:
        The table, best held-out objective first.

    Raises:
        PalimpsestError: As `run_tune`; or a method that was named needs two kinds of text and there are none.
    """
    versions = {name: method_config(config, name) for name in config.methods}
    with open_run(config, STAGE, versions.values()) as run:
        if run.already_complete:
            return board_from(open_artifact(config.run.out), NAME)
        language = open_base(config)
        data = load_data(config, language)
        told = _tell(config, language, data)
        lines = []
        for place, (name, one) in enumerate(versions.items(), 1):
            log.info("%d of %d: %s", place, len(versions), name)
            lines.append(_line(config, name, one, language, data, told, run))
        lines.sort(key=lambda line: rank(line.objective["after"]))
        found = lines[0].objective
        board = Board(
            title="Baselines",
            model=config.model,
            kind=config.objective.objective,
            unit=found["unit"],
            rows=found["rows"],
            lines=lines,
            notes=_notes(config),
        )
        write_board(run, board, NAME)
        run.finish()
    return board


def _tell(config: BaselinesConfig, language: LanguageModel, data: TuneData) -> Told:
    """Read what tells the two kinds of text apart, of as many rows as training reads."""
    if not any(name in CONTRASTED for name in config.methods):
        return Told({}, None, 0.0)
    started = time.perf_counter()
    schedule = config.schedule
    most = schedule.steps * schedule.batch_size * schedule.accumulate
    texts = sides(config.objective, data, most)
    dictionaries = _dictionaries(config, language)
    contrasts = read_contrast(language, dictionaries, texts, config.models.tokens_per_batch)
    found = []
    for place, (site, contrast) in enumerate(contrasts.items()):
        difference = contrast.standardised()
        latent = int(difference.abs().argmax())
        found.append(Best(place, site, latent, float(difference[latent])))
    best = max(found, key=lambda one: abs(one.difference))
    return Told(contrasts, best, time.perf_counter() - started)


def _dictionaries(config: TuneConfig, language: LanguageModel) -> dict[str, Dictionary]:
    """The dictionaries by site, on the model's device."""
    made: dict[str, Dictionary] = {}
    for place, name in enumerate(config.dictionary):
        dictionary = load_dictionary(name)
        site = config.site[place] if config.site else dictionary.site
        if site is None:
            raise DictionaryError(
                f"The dictionary {name} does not say where it was trained", fix="Pass --site"
            )
        made[language.sites.canonical(site)] = dictionary.to(language.device)
    return made


def _line(
    config: BaselinesConfig,
    name: str,
    version: TuneConfig,
    language: LanguageModel,
    data: TuneData,
    told: Told,
    run: RunFolder,
) -> Line:
    """Make one adapter and measure it."""
    note, extra = "", 0.0
    if name == "diffmean":
        begun = run.resumed and version.run.out.exists()
        result = make_diffmean(version, language, data, told.contrasts, resume=begun).read_json(RESULT)
        extra = told.seconds
        note = (
            f"the difference of means at {result['sites'][0]['site']}, {result['strength']:g} of the mean length of an "
            "activation"
        )
    else:
        if name == "best-latent" and told.best is not None:
            version, extra = _on(version, told.best), told.seconds
            note = f"latent {told.best.latent} at {told.best.site}, standardised difference {told.best.difference:+.2f}"
        result = train_version(version, language, run)
    needed = None
    if version.adapter.component not in ("lora", "vector"):
        needed = _needed(config, version, language, data)
    shown = figures(result)
    shown["seconds"] += extra
    return Line(
        name=name,
        component=version.adapter.component,
        l1=float(version.schedule.l1),
        latents_needed=needed,
        note=note,
        **shown,
    )


def _on(version: TuneConfig, best: Best) -> TuneConfig:
    """The fine-tune of one latent alone."""
    return replace(
        version,
        dictionary=(version.dictionary[best.place],),
        site=(best.site,),
        adapter=replace(version.adapter, latents=(str(best.latent),), forbid=()),
    )


def _needed(
    config: BaselinesConfig, version: TuneConfig, language: LanguageModel, data: TuneData
) -> int | None:
    """The fewest latents that keep most of the effect on held-out rows."""
    from peft import PeftModel

    from palimpsest.tune.explain import latents_needed

    if config.objective.objective == "grpo":
        return None
    with hushed():
        model: Any = PeftModel.from_pretrained(language.model, str(version.run.out)).eval()
    try:
        assert layers_of(model)
        yardstick = measure(version, language, replace(data, general=[]))
        return latents_needed(model, yardstick, config.baselines.share)
    finally:
        model.unload()


def _notes(config: BaselinesConfig) -> list[str]:
    schedule = config.schedule
    notes = [
        f"Every trained method: {schedule.steps} steps of {schedule.batch_size * schedule.accumulate} rows, the same "
        "rows in the same order, one seed. Learning rates were not tuned for any of them: a method that loses here may "
        "have the wrong one.",
        f"Needed: the fewest latents that keep {config.baselines.share:.0%} of the effect, ranked and chosen on the "
        "same held-out rows; none for methods without latents, or without an effect.",
    ]
    if not config.baselines.methods and (why := no_contrast(config)):
        notes.append(f"diffmean and best-latent are left out: {why}.")
    return notes
