"""Steering as a stage: a config in, `steer.json` out; every prompt and every strength that is done is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from palimpsest.artifacts import RunFolder, check_claim, disk, input_entry, open_artifact
from palimpsest.corpus import Corpus
from palimpsest.errors import ConfigError
from palimpsest.evaluate.text import CorpusBatches, evaluation_batches
from palimpsest.evaluate.views import origin_notes
from palimpsest.interpret.steering.behaviour import changes_of, encode_watched, log_probabilities
from palimpsest.interpret.steering.changes import Change, read_changes
from palimpsest.interpret.steering.config import SteerConfig
from palimpsest.interpret.steering.controls import control_changes, described, habits, matched_latents
from palimpsest.interpret.steering.generate import encode_prompt
from palimpsest.interpret.steering.prompts import read_prompts
from palimpsest.interpret.steering.result import SteeringRun, Strength
from palimpsest.interpret.steering.steerer import Steerer
from palimpsest.interpret.steering.summary import notes_of, sentence
from palimpsest.interpret.steering.sweep import Settings, costs, largest_ok, measure, unsteered
from palimpsest.interpret.subject import open_subject
from palimpsest.log import log, progress
from palimpsest.models import Side, fingerprint
from palimpsest.options import config_dict

STAGE = "steer"
RESULT = "steer.json"
VERSION = 1
"""Of what the parts hold: those of another version are made again."""


@dataclass(frozen=True)
class _Work:
    """What is opened and checked before anything is written."""

    config: SteerConfig
    steerer: Steerer
    side: Side
    changes: tuple[Change, ...]
    prompts: list[str]
    ids: list[list[int]]
    watched: list[list[int]]
    corpus: Corpus | None
    batches: CorpusBatches | None

    @property
    def decoding(self) -> dict[str, Any]:
        writing = self.config.writing
        return {
            "max_new_tokens": writing.max_new_tokens,
            "temperature": float(writing.temperature),
            "seed": self.config.run.seed,
            "chat": writing.chat,
        }

    @property
    def settings(self) -> Settings:
        options = self.config.strengths
        return Settings(options.confidence, options.resamples, self.config.run.seed)


def run_steer(config: SteerConfig) -> SteeringRun:
    """Let base, tuned and steered model write, measure what each strength costs, and write `steer.json`.

    Returns:
        What `read_steer` gives again.

    Raises:
        PalimpsestError: Bad input, before anything is written; NaN during a pass. With `resume` the prompts and
            strengths that an interrupted run finished are read.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    work = _open(config)
    subject = work.steerer.subject
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config),
        inputs=_inputs(work),
        seed=config.run.seed,
        device=str(subject.model("base").device),
        models={side: getattr(config, side) for side in subject.sides},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return read_steer(config.run.out)
        started = time.perf_counter()
        found = _steer(run, work)
        run.timing("steer", time.perf_counter() - started)
        run.write_json(RESULT, found.to_dict())
        run.finish(summary=found.summary)
    return found


def read_steer(path: str | Path) -> SteeringRun:
    """What a finished run found.

    Raises:
        ArtifactError: The folder is unfinished, edited, or another stage's.
    """
    return SteeringRun.from_dict(open_artifact(path, stage=STAGE).read_json(RESULT))


def _open(config: SteerConfig) -> _Work:
    """Load and check everything; the cheap checks first."""
    prompts = read_prompts(config.prompt, config.prompts)
    subject = open_subject(config.base, config.tuned, config.dictionary, config.site, config.models)
    side = config.side or subject.sides[-1]
    changes = read_changes(config.latent, subject.dictionary.n_latents)
    steerer, model = Steerer(subject), subject.model(side)
    ids = [encode_prompt(model, prompt, chat=config.writing.chat) for prompt in prompts]
    watched = [encode_watched(model, text, ids) for text in config.strengths.watch]
    corpus = batches = None
    if config.strengths.sweep:
        options = config.corpora
        if model.context is not None and options.max_length > model.context:
            log.warning("Documents are cut at the model's context of %d tokens.", model.context)
            options = replace(options, max_length=model.context)
        corpus = Corpus(list(config.strengths.corpus), subject.tokenizer, options=options)
        batches = evaluation_batches(corpus, config.strengths.sweep_tokens, config.models.tokens_per_batch)
    return _Work(config, steerer, side, changes, prompts, ids, watched, corpus, batches)


def _inputs(work: _Work) -> dict[str, Any]:
    config, subject = work.config, work.steerer.subject
    local = Path(config.dictionary).exists()
    entries: dict[str, Any] = {
        "dictionary": input_entry(config.dictionary) if local else {"path": config.dictionary, "sha256": None}
    }
    for side in subject.sides:
        entries[side] = {"path": getattr(config, side), "sha256": fingerprint(subject.model(side))}
    if config.prompts is not None:
        entries["prompts"] = input_entry(config.prompts)
    if work.corpus is not None:
        entries["corpus"] = work.corpus.fingerprint()
    return entries


def _steer(run: RunFolder, work: _Work) -> SteeringRun:
    config, subject = work.config, work.steerer.subject
    prompts = _continuations(run, work)
    before, watch = _watch(run, work)
    controls = _controls(run, work) if work.batches is not None and config.strengths.controls else []
    matched = control_changes(work.changes, [[row["latent"] for row in one["matched"]] for one in controls])
    kept = [_strength(run, work, float(one), matched, before) for one in sorted(config.strengths.sweep)]
    limit = float(config.strengths.max_perplexity_ratio)
    rows = [Strength.from_dict(one) for one in kept]
    largest = largest_ok([(one.strength, one) for one in rows], limit)
    sweep = [replace(one, ok=largest is not None and one.strength <= largest) for one in rows]
    described_dictionary = subject.dictionary.describe()
    found = SteeringRun(
        summary="",
        pair={"base": config.base, "tuned": config.tuned},
        site=subject.site,
        dictionary={"path": config.dictionary} | described_dictionary,
        side=work.side,
        tokens=config.writing.tokens,
        changes=[one.to_dict() for one in work.changes],
        prompts=prompts,
        sweep=sweep,
        unsteered=kept[0]["unsteered"] if kept else None,
        guard={"ratio": limit, "largest_ok": largest},
        controls=controls,
        watch=watch,
        decoding=work.decoding,
        seed=config.run.seed,
        confidence=config.strengths.confidence,
        resamples=config.strengths.resamples,
        notes=origin_notes(subject.dictionary, subject.source, subject.site),
    )
    notes = [*found.notes, *notes_of(found, wanted_controls=config.strengths.controls)]
    found = SteeringRun.from_dict(json.loads(json.dumps(replace(found, notes=notes).to_dict())))
    return replace(found, summary=sentence(found))


def _continuations(run: RunFolder, work: _Work) -> list[dict[str, Any]]:
    """Every prompt continued by base, tuned and steered model."""
    found = []
    with progress("Continuations", len(work.prompts), unit="prompts") as advance:
        for place, prompt in enumerate(work.prompts):

            def compare(prompt: str = prompt) -> dict[str, Any]:
                tokens = work.config.writing.tokens
                return work.steerer.compare(
                    prompt, work.changes, work.side, tokens=tokens, **work.decoding
                ).to_dict()

            row = _kept(run, f"prompt.{place}", compare)
            found.append({key: row[key] for key in ("prompt", "base", "tuned", "steered")})
            advance()
    return found


def _watch(run: RunFolder, work: _Work) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """Log-probabilities of the watched texts without steering, and what they are with it at strength 1."""
    texts = work.config.strengths.watch
    if not texts:
        return [], []
    before = _kept(run, "watch.before", lambda: _log_probabilities(work, ()))
    after = _kept(run, "watch.after", lambda: _log_probabilities(work, work.changes))
    rows = changes_of(texts, before, after)
    return before, [
        row | {"unsteered": one, "steered": other}
        for row, one, other in zip(rows, before, after, strict=True)
    ]


def _log_probabilities(work: _Work, changes: tuple[Change, ...]) -> list[list[float]]:
    tokens = work.config.writing.tokens
    return log_probabilities(work.steerer, work.side, work.ids, work.watched, changes, tokens)


def _controls(run: RunFolder, work: _Work) -> list[dict[str, Any]]:
    """Each changed latent with its matched ones."""

    def choose() -> list[dict[str, Any]]:
        total = work.config.strengths.sweep_tokens
        of = habits(work.steerer.subject, work.side, work.batches or [], total=total)
        latents = [one.latent for one in work.changes]
        matches = matched_latents(latents, of, work.config.strengths.controls, work.config.run.seed)
        return [described(latent, own, of) for latent, own in zip(latents, matches, strict=True)]

    return _kept(run, "controls", choose)


def _strength(
    run: RunFolder,
    work: _Work,
    strength: float,
    controls: list[tuple[Change, ...]],
    before: list[list[float]],
) -> dict[str, Any]:
    """One strength: what it costs, what its controls cost, what the model writes."""
    variants = [tuple(one.at(strength) for one in changes) for changes in (work.changes, *controls)]
    texts = work.config.strengths.watch

    def watched(changes: tuple[Change, ...]) -> list[dict[str, Any]]:
        return changes_of(texts, before, _log_probabilities(work, changes)) if texts else []

    def write(prompt: str) -> str:
        tokens = work.config.writing.tokens
        return work.steerer.generate(prompt, work.side, variants[0], tokens=tokens, **work.decoding)

    def compute() -> dict[str, Any]:
        assert work.batches is not None
        total = work.config.strengths.sweep_tokens
        table = measure(work.steerer, work.side, variants, work.batches, total=total)
        own, *others = costs(table, work.settings)
        return {
            "strength": strength,
            "changes": [one.to_dict() for one in variants[0]],
            **asdict(own),
            "ok": False,
            "unsteered": unsteered(table),
            "texts": [write(prompt) for prompt in work.prompts],
            "watch": watched(variants[0]),
            "controls": [
                {"latents": [one.latent for one in changes]} | asdict(cost) | {"watch": watched(changes)}
                for changes, cost in zip(variants[1:], others, strict=True)
            ],
        }

    return _kept(run, f"strength.{strength!r}", compute)


def _kept(run: RunFolder, name: str, compute: Callable[[], Any]) -> Any:
    """Plain values: computed, or read where an interrupted run left them."""
    path = run.part(f"{name}.{VERSION}.json")
    if not path.exists():
        disk.write_bytes(path, disk.to_json(compute()))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not what a run left", fix="Run again with --overwrite") from error


__all__ = ["RESULT", "STAGE", "read_steer", "run_steer"]
