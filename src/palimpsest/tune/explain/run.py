"""An explanation as a stage: an adapter in, an artifact folder out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palimpsest.artifacts import RunFolder, check_claim, input_entry, open_artifact
from palimpsest.corpus.rows import parse_source
from palimpsest.errors import ConfigError
from palimpsest.labelcache import find_labels
from palimpsest.options import CorpusOptions, config_dict, parse_assignment
from palimpsest.tune.choices import PREFERENCES
from palimpsest.tune.config import ObjectiveOptions
from palimpsest.tune.explain.causal import Needed, Orders, curves, needed, numbers
from palimpsest.tune.explain.controls import Read, how_specific, read_adapter, run_controls
from palimpsest.tune.explain.listing import concentration, labels_of, orders, rankings, table
from palimpsest.tune.explain.probe import Probe
from palimpsest.tune.explain.pruning import prune
from palimpsest.tune.explain.result import CorpusAbout, Explanation, Objective, Pruned
from palimpsest.tune.explain.statistics import Settings
from palimpsest.tune.explain.subject import Subject, load_subject
from palimpsest.tune.explain.summary import summarise
from palimpsest.tune.explain.texts import Text, check_sources, read_pairs, read_texts, rows_of_half
from palimpsest.tune.explain_config import CausalOptions, ExplainConfig
from palimpsest.tune.measure import UNITS, Yardstick
from palimpsest.tune.rows import PairRow, TextRow

STAGE = "explain"
RESULT = "explain.json"
LATENTS = "latents.parquet"

RELOADED = 1e-3
"""Difference in a document's loss up to which a pruned adapter is the mask it stands for, for all types of weights."""


def run_explain(config: ExplainConfig) -> Explanation:
    """Explain an adapter, and write `explain.json`, `latents.parquet` and `pruned/` to `config.run.out`.

    Returns:
        The findings, as `Explanation.from_dict(artifact.read_json("explain.json"))` gives them again.

    Raises:
        PalimpsestError: Bad input, before anything is written. An interrupted explanation starts again with `resume`;
            a finished one is read.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    check_sources(config.read)
    for source in config.causal.pairs:
        parse_source(source)
    find_labels((), config.labels.labels, offline=True)
    _check_controls(config)
    subject = load_subject(config.adapter, config.model, config.models)
    texts = read_texts(
        config.read,
        subject.language.tokenizer,
        config.corpora,
        subject.language.context,
        answers_only=answers_only(subject),
    )
    halves, options = objective_rows(config.causal, config.corpora, subject, texts)
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config),
        inputs=inputs(config, subject, texts),
        seed=config.run.seed,
        device=str(subject.language.device),
        models={"base": subject.base},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return read_explanation(config.run.out)
        found = _explain(config, subject, texts, (halves, options), run)
        run.write_json(RESULT, found.to_dict())
        run.finish(summary=found.summary)
    return found


def read_explanation(path: str | Path) -> Explanation:
    """The findings of a finished folder.

    Raises:
        ArtifactError: The folder is unfinished, edited, or another stage's.
    """
    return Explanation.from_dict(open_artifact(path, stage=STAGE).read_json(RESULT))


def _explain(
    config: ExplainConfig,
    subject: Subject,
    texts: Sequence[Text],
    objective: tuple[tuple[list[Any], list[Any]], ObjectiveOptions],
    run: RunFolder,
) -> Explanation:
    started = time.perf_counter()
    settings, tokens = settings_of(config), config.models.tokens_per_batch
    read = read_adapter(subject, texts, tokens)
    run.timing("read", time.perf_counter() - started)
    run.write_table(LATENTS, table(read))
    started = time.perf_counter()
    probes = [
        Probe(
            subject.model,
            subject.latents,
            Yardstick(subject.language, objective[1], rows, tokens_per_batch=tokens),
            settings,
        )
        for rows in objective[0]
    ]
    points, pruned = _causes(config.causal, subject, read, (probes[0], probes[1]), run, config.run.seed)
    run.timing("causes", time.perf_counter() - started)
    started = time.perf_counter()
    general = next((text.name for text in texts if text.role == "general"), None)
    specific = None if general is None else how_specific(read, general, settings)
    controls = run_controls(config.controls, read, texts, probes[1], tokens, settings)
    run.timing("controls", time.perf_counter() - started)
    ranked = rankings(read, labels_of(read, orders(read).values(), config.labels))
    about, held = concentration(read), _objective(probes, objective[1])
    return Explanation(
        summary=summarise(about, held, pruned, specific, controls, ranked[0].latents),
        adapter=config.adapter,
        component=subject.config.component,
        model=subject.base,
        sites=subject.sites,
        corpora=[corpus_about(text, read) for text in texts],
        rankings=ranked,
        concentration=about,
        objective=held,
        curves=points,
        pruned=pruned,
        specificity=specific,
        controls=controls,
        confidence=float(config.causal.confidence),
        seed=config.run.seed,
        notes=_notes(subject, objective[1], held, pruned, _files(config)),
    )


def _causes(
    options: CausalOptions,
    subject: Subject,
    read: Read,
    probes: tuple[Probe, Probe],
    run: RunFolder,
    seed: int,
) -> tuple[list[Any], Pruned | None]:
    """Curves on the documents that report, and the pruned adapter that the others choose."""
    chooses, reports = probes
    latents = subject.latents
    ordered = Orders.of(latents, read.effect(0), read.firing(0), options.random_orders, seed)
    sizes = numbers(latents, ordered.active, options.points)
    points = curves(reports, ordered, sizes)
    same = chooses.effect.difference * reports.effect.difference > 0
    if not (reports.effect.present and chooses.effect.sized and same):
        return points, None
    found: Needed = needed(chooses, ordered, sizes, float(options.keep))
    return points, prune(subject, reports, ordered, found, float(options.keep), run)


def _files(config: ExplainConfig) -> list[Path]:
    """Local files that figures are made from, beside general text."""
    named = [parse_assignment(one)[1] for one in config.read.corpus]
    return [Path(one) for one in (*named, *config.causal.pairs) if Path(one).is_file()]


def _check_controls(config: ExplainConfig) -> None:
    named = [config.controls.twin, config.controls.other, config.controls.shuffled]
    if any(one is not None and Path(one).resolve() == Path(config.adapter).resolve() for one in named):
        raise ConfigError(
            "An adapter is no control of itself", expected="--twin, --other and --shuffled: other adapters"
        )


def _objective(probes: Sequence[Probe], options: ObjectiveOptions) -> Objective:
    chooses, reports = (one.effect for one in probes)
    units = reports.units.sum()
    return Objective(
        name="pairs" if options.pairs else "text",
        unit=UNITS[options.objective],
        chosen_on=len(chooses.base),
        reported_on=len(reports.base),
        base=float(reports.base.sum() / units),
        full=float(reports.full.sum() / units),
        difference=reports.difference,
        ci=reports.ci,
        present=reports.present,
        chosen_difference=chooses.difference,
        chosen_present=chooses.present,
        margin=probes[1].margin,
    )


def objective_rows(
    options: CausalOptions, corpora: CorpusOptions, subject: Subject, texts: Sequence[Text]
) -> tuple[tuple[list[Any], list[Any]], ObjectiveOptions]:
    """Rows of the half that chooses and of the half that reports, and what is measured on them.

    Raises:
        PalimpsestError: There are too few, or they cannot be read.
    """
    trained, most = subject.objective, max(2, options.eval_rows // 2)
    sources = options.pairs
    held_out = None
    if not sources and trained is not None and trained.pairs:
        given = trained.eval_data or trained.data
        sources = tuple(one for one in given if Path(one).exists())
        # The rows that training held out of its own data are found again.
        held_out = None if trained.eval_data else float(trained.hold_out)
    if sources:
        name: Any = trained.objective if trained is not None and trained.objective in PREFERENCES else "dpo"
        beta = options.beta if options.beta is not None else None if trained is None else trained.beta
        context = subject.language.context
        pairs: tuple[list[PairRow], list[PairRow]] = read_pairs(
            sources, subject.language.tokenizer, corpora, context, most, held_out
        )
        return pairs, ObjectiveOptions(objective=name, data=sources, beta=beta)
    if options.beta is not None:
        raise ConfigError("--beta belongs to --pairs", fix="Pass --pairs FILE")
    rows: tuple[list[TextRow], list[TextRow]] = (
        rows_of_half(texts, 0, most),
        rows_of_half(texts, 1, most),
    )
    return rows, ObjectiveOptions(objective="sft", data=tuple(text.source for text in texts))


def answers_only(subject: Subject) -> bool:
    """Whether the adapter learned, or edits, what an assistant says and not all of a conversation."""
    trained = subject.objective
    return subject.config.scope != "all" or (trained is not None and (trained.answers_only or trained.pairs))


def settings_of(config: ExplainConfig) -> Settings:
    """Of intervals and controls."""
    causal = config.causal
    return Settings(float(causal.confidence), causal.resamples, causal.permutations, config.run.seed)


def corpus_about(text: Text, read: Read) -> CorpusAbout:
    """One text in numbers."""
    return CorpusAbout(
        name=text.name,
        role=text.role,
        source=text.source,
        documents=len(text.rows),
        tokens=sum(len(row.input_ids) for row in text.rows),
        edited=int(read.readings[text.name].tokens.sum()),
    )


def inputs(config: Any, subject: Subject, texts: Sequence[Text], **further: str | None) -> dict[str, Any]:
    """What a manifest says of the adapters and texts."""
    controls = getattr(config, "controls", None)
    adapters = {"adapter": subject.path} | further
    if controls is not None:
        adapters |= {"twin": controls.twin, "other": controls.other, "shuffled": controls.shuffled}
    found = {name: _entry(path) for name, path in adapters.items() if path is not None}
    found["base"] = {"path": subject.base, "sha256": subject.weights}
    return found | {f"corpus/{text.name}": text.fingerprint for text in texts}


def _entry(path: str) -> dict[str, Any]:
    return input_entry(path) if Path(path).exists() else {"path": path, "sha256": None}


def _notes(
    subject: Subject, options: ObjectiveOptions, held: Objective, pruned: Pruned | None, texts: Sequence[Path]
) -> list[str]:
    trained = subject.objective
    notes = [
        f"{source} is what the adapter was trained on: what is said of it is not held out."
        for source in subject.seen(texts)
    ]
    if trained is not None and trained.objective != options.objective:
        notes.append(
            f"The adapter was trained for {trained.objective}; its latents are judged by {UNITS[options.objective]}"
            + (": pass --pairs FILE for its own objective." if trained.pairs else ".")
        )
    if subject.config.component in ("low-rank", "mlp"):
        notes.append(
            "The size of a latent's change is the root of its mean square: an upper bound of the mean size."
        )
    if pruned is not None and not held.chosen_present:
        notes.append(
            f"On the {held.chosen_on:,} documents that choose, the effect cannot be told from 0: the number of latents "
            "is uncertain (more with --eval-rows)."
        )
    if pruned is not None and pruned.reload_error is not None and pruned.reload_error > RELOADED:
        notes.append(
            f"The pruned adapter, read back, gives other losses than its mask (by up to {pruned.reload_error:.2g}): "
            "do not use it."
        )
    if pruned is not None and pruned.share < pruned.keep:
        notes.append(
            f"On the documents that report the pruned adapter keeps {pruned.share:.1%}, less than was asked for."
        )
    return notes
