"""Two adapters through the same dictionaries: which latents moved in one and not in the other."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from palimpsest.artifacts import RunFolder, check_claim, open_artifact
from palimpsest.labelcache import find_labels
from palimpsest.options import config_dict
from palimpsest.tune.choices import SIGNED
from palimpsest.tune.explain.compare_text import page
from palimpsest.tune.explain.controls import Read, agree, read_adapter
from palimpsest.tune.explain.listing import TOP, Labels, labels_of
from palimpsest.tune.explain.result import AdapterComparison, Moved
from palimpsest.tune.explain.run import answers_only, corpus_about, inputs
from palimpsest.tune.explain.statistics import Settings, holders, strongest_first
from palimpsest.tune.explain.subject import add_adapter, load_subject
from palimpsest.tune.explain.summary import summarise_comparison
from palimpsest.tune.explain.texts import check_sources, read_texts
from palimpsest.tune.explain_config import ExplainCompareConfig

STAGE = "explain-compare"
RESULT = "compare.json"
PAGE = "compare.md"
SECOND = "second"

Pair = tuple[NDArray, NDArray]


def compare_adapters(config: ExplainCompareConfig) -> AdapterComparison:
    """Compare two adapters, and write `compare.json` and `compare.md` to `config.run.out`.

    Raises:
        PalimpsestError: Bad input, before anything is written; adapters through other dictionaries among it.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    check_sources(config.read)
    find_labels((), config.labels.labels, offline=True)
    first = load_subject(config.a, config.model, config.models)
    second = add_adapter(first, config.b, SECOND)
    language = first.language
    texts = read_texts(
        config.read, language.tokenizer, config.corpora, language.context, answers_only=answers_only(first)
    )
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config),
        inputs=inputs(config, first, texts, second=config.b),
        seed=config.run.seed,
        device=str(language.device),
        models={"base": first.base},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return read_comparison(config.run.out)
        started = time.perf_counter()
        tokens = config.models.tokens_per_batch
        reads = read_adapter(first, texts, tokens), read_adapter(second, texts, tokens)
        found = _compare(config, reads)
        found = replace(found, corpora=[corpus_about(text, reads[0]) for text in texts])
        found = replace(found, summary=summarise_comparison(found))
        run.timing("compare", time.perf_counter() - started)
        run.write_json(RESULT, found.to_dict())
        run.write_bytes(PAGE, page(found).encode(errors="replace"))
        run.finish(summary=found.summary)
    return found


def read_comparison(path: str | Path) -> AdapterComparison:
    """The findings of a finished folder.

    Raises:
        ArtifactError: The folder is unfinished, edited, or another stage's.
    """
    return AdapterComparison.from_dict(open_artifact(path, stage=STAGE).read_json(RESULT))


def moved_classes(
    values: tuple[NDArray, NDArray],
    effects: tuple[NDArray, NDArray],
    strong: float,
    weak: float,
    *,
    signed: bool = True,
) -> dict[str, Bool[NDArray, " latents"]]:
    """Latents that moved in one adapter, in the other, in both, or in opposite directions.

    Each is judged by its own adapter's distribution: it moved if it is among the fewest latents that hold `strong` of
    the effect, and did not if it is outside the fewest that hold `weak`. What lies between is in no class. Values that
    are lengths of rows (not `signed`) have no direction: then none is opposite.
    """
    moved = [_among(effect, strong) for effect in effects]
    still = [~_among(effect, weak) for effect in effects]
    both = moved[0] & moved[1]
    same = (np.sign(values[0]) == np.sign(values[1])) | (not signed)
    return {
        "only_a": moved[0] & still[1],
        "only_b": moved[1] & still[0],
        "both": both & same,
        "opposite": both & ~same,
    }


def _among(effect: Float[NDArray, " latents"], share: float) -> Bool[NDArray, " latents"]:
    found = np.zeros(len(effect), bool)
    found[strongest_first(effect)[: holders(effect, share)]] = True
    return found


def _shares(effect: NDArray) -> NDArray:
    return effect / effect.sum() if effect.sum() > 0 else effect


def _compare(config: ExplainCompareConfig, reads: tuple[Read, Read]) -> AdapterComparison:
    a, b = reads
    values, effects = (a.latents.values, b.latents.values), (a.effect(), b.effect())
    shares = _shares(effects[0]), _shares(effects[1])
    signed = all(one.subject.config.component in SIGNED for one in reads)
    classes = moved_classes(values, effects, float(config.strong), float(config.weak), signed=signed)
    strength = np.maximum(*shares)
    listed = {}
    for name, inside in classes.items():
        order = strongest_first(strength)
        listed[name] = order[inside[order]][:TOP]
    labels = labels_of(a, listed.values(), config.labels)
    settings = Settings(permutations=config.permutations, seed=config.run.seed)
    return AdapterComparison(
        summary="",
        adapters=(config.a, config.b),
        components=(a.subject.config.component, b.subject.config.component),
        sites=a.subject.sites,
        corpora=[],
        effects=(float(effects[0].sum()), float(effects[1].sum())),
        strong=float(config.strong),
        weak=float(config.weak),
        counts={name: int(inside.sum()) for name, inside in classes.items()},
        moved={
            name: [_moved(a, b, (effects, shares), int(one), labels) for one in chosen]
            for name, chosen in listed.items()
        },
        agreement=agree(a, b, settings),
        seed=config.run.seed,
        notes=_notes(reads),
    )


def _moved(a: Read, b: Read, figures: tuple[Pair, Pair], place: int, labels: Labels) -> Moved:
    site, latent = a.latents.locate(place)

    def of(both: Pair) -> tuple[float, float]:
        return float(both[0][place]), float(both[1][place])

    return Moved(
        site=site,
        latent=latent,
        values=of((a.latents.values, b.latents.values)),
        effects=of(figures[0]),
        shares=of(figures[1]),
        label=labels.get((site, latent)),
    )


def _notes(reads: tuple[Read, Read]) -> list[str]:
    components = [one.subject.config.component for one in reads]
    notes = []
    if components[0] != components[1]:
        notes.append(
            f"The adapters have different components ({' and '.join(components)}): their values do not mean the same, "
            "their effects do."
        )
    notes += [
        f"{one.subject.path} has no effect on this text." for one in reads if not (one.effect() > 0).any()
    ]
    return notes
