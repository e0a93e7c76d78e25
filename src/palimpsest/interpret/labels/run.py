"""Labels as a stage: a config in, an artifact folder out; every answer of a provider is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from palimpsest.artifacts import RunFolder, check_claim, input_entry
from palimpsest.errors import PalimpsestError
from palimpsest.interpret.labels.config import LabelConfig
from palimpsest.interpret.labels.evidence import choose_latents, evidence_of, split_examples
from palimpsest.interpret.labels.negatives import TextPool, Trial
from palimpsest.interpret.labels.notebook import Notebook
from palimpsest.interpret.labels.protocol import Judge, Labeller
from palimpsest.interpret.labels.providers import make_judge, make_labeller
from palimpsest.interpret.labels.result import Labelling, LabelRow, read_labelling
from palimpsest.interpret.labels.scoring import Score, deal_out, mean_score, score
from palimpsest.interpret.labels.work import Trouble, answers
from palimpsest.latents import LatentIndex
from palimpsest.latents.schema import LABELS, LABELS_ABOUT, LABELS_STAGE
from palimpsest.log import progress

PART = "answers.jsonl"
FEW_TEXTS = 4


class LabelsUnfinishedError(PalimpsestError):
    """The provider died: what it answered is kept, and the folder can be resumed."""


def run_label(config: LabelConfig, labeller: Labeller | None = None, judge: Judge | None = None) -> Labelling:
    """Label latents, test the labels, and write `labels.json` and `labels.parquet`.

    Args:
        config: The options.
        labeller: Labels instead of what the options name.
        judge: Judges instead of what the options name.

    Returns:
        What `read_labelling` gives again.

    Raises:
        LabelsUnfinishedError: A provider died; with `resume` the same run goes on, with `accept_partial` it ends.
        PalimpsestError: Bad input, before anything is written.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    index = LatentIndex.open(config.examples)
    wanted = choose_latents(index, config.latents, config.top, config.by)
    labeller = labeller or make_labeller(config, index.about)
    judge = judge or make_judge(config, labeller)
    model, _ = config.judge_at
    with RunFolder(
        config.run.out,
        stage=LABELS_STAGE,
        config=config.identity(),
        inputs={"examples": input_entry(config.examples)},
        seed=config.run.seed,
        models={"labeller": config.providers.model, "judge": model if judge is not None else None},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return read_labelling(config.run.out)
        with Notebook(run.part(PART)) as notebook:
            found = _Labels(config, index, wanted, notebook, labeller, judge).measure()
        run.write_json(LABELS_ABOUT, found.about())
        run.write_table(LABELS, found.table())
        for name, seconds in found.seconds.items():
            run.timing(name, seconds)
        run.finish(summary=found.summary)
    # As it is read again: with the precision of the table.
    return read_labelling(config.run.out)


class _Labels:
    """One run: labels, then scores, then controls; each only where the notebook has none yet."""

    def __init__(
        self,
        config: LabelConfig,
        index: LatentIndex,
        wanted: Sequence[int],
        notebook: Notebook,
        labeller: Labeller,
        judge: Judge | None,
    ) -> None:
        self.config, self.index, self.wanted, self.book = config, index, wanted, notebook
        self.labeller, self.judge = labeller, judge
        self.seconds: dict[str, float] = {}
        self._trials: dict[int, Trial] = {}

    def measure(self) -> Labelling:
        """Ask for what is missing, and put everything together.

        Raises:
            LabelsUnfinishedError: Something is missing still, and nobody said that this will do.
        """
        budget = self.config.providers.budget
        trouble = Trouble(budget)
        try:
            self._each(
                "labels", self._unlabelled, self._label, self.book.label, trouble, self.config.provider
            )
        finally:
            # Neuronpedia's answers serve other runs, too.
            close = getattr(self.labeller, "close", None)
            if close is not None:
                close()
        self._require(self._unlabelled, "labels", trouble, keep=bool(self._named))
        if self.judge is not None:
            left = trouble.again()
            judge = self.config.judge
            self._each("scores", self._unscored, self._score, self.book.score, left, judge)
            self._require(self._unscored, "scores", left)
            for run in range(self.config.scoring.shuffles):
                self._control(run, trouble.again())
        return self._result()

    @property
    def _named(self) -> list[int]:
        return [one for one in self.wanted if self.book.labels.get(one)]

    @property
    def _unlabelled(self) -> list[int]:
        """What a provider knows by heart comes first: a server that fails must not hide it."""
        missing = [one for one in self.wanted if one not in self.book.labels]
        knows = getattr(self.labeller, "knows", None)
        return missing if knows is None else sorted(missing, key=lambda one: not knows(one))

    @property
    def _unscored(self) -> list[int]:
        return [one for one in self._named if one not in self.book.scores]

    def _each(
        self,
        what: str,
        items: Sequence[int],
        task: Callable[[int], Any],
        keep: Callable[[int, Any], None],
        trouble: Trouble,
        kind: str,
    ) -> None:
        """Ask about each item, and keep every answer as soon as it is there."""
        started = time.perf_counter()
        concurrency = self.config.providers.concurrency if kind == "openai" else 1
        with progress(what, len(items), unit="latents") as advance:
            for item, answer in answers(items, task, trouble, concurrency):
                keep(item, answer)
                advance()
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def _require(self, missing: list[int], what: str, trouble: Trouble, keep: bool = True) -> None:
        """Stop here when something is missing, unless partial results will do."""
        if not missing or (self.config.accept_partial and keep):
            return
        of = self.wanted if what == "labels" else self._named
        raise LabelsUnfinishedError(
            f"{len(missing)} of {len(of)} latents have no {what} yet: {trouble.reason or 'the provider failed'}",
            fix=f"What is finished is kept in {self.config.run.out}: the same command with --resume goes on"
            + (", with --resume --accept-partial it ends without the rest" if keep else ""),
        )

    def _label(self, latent: int) -> str | None:
        shown, _ = self._split(latent)
        return self.labeller.label(evidence_of(self.index.row(latent), shown, self.config.shown))

    def _split(self, latent: int) -> tuple[list[Any], list[Any]]:
        return split_examples(self.index.examples(latent), latent, self.config.run.seed)

    @cached_property
    def _pool(self) -> TextPool:
        return TextPool(self.index, self.config.run.seed)

    def _trial(self, latent: int) -> Trial:
        if latent not in self._trials:
            _, held = self._split(latent)
            self._trials[latent] = self._pool.trial(latent, held, self.config.scoring.texts)
        return self._trials[latent]

    def _score(self, latent: int) -> Score:
        return self._judged(latent, str(self.book.labels[latent]))

    def _judged(self, latent: int, label: str) -> Score:
        assert self.judge is not None
        trial = self._trial(latent)
        verdicts = self.judge.judge(label, trial.texts) if trial.texts else []
        return score(verdicts, trial.kinds, self.config.scoring.confidence)

    def _control(self, run: int, trouble: Trouble) -> None:
        """Judge every latent's texts by another latent's label."""
        scored = [one for one in self._named if self._value(one) is not None]
        dealt = deal_out(scored, run, self.config.run.seed)
        # Two latents may have one label: it is no wrong one.
        dealt = {
            one: other for one, other in dealt.items() if self.book.labels[one] != self.book.labels[other]
        }
        missing = [one for one, other in dealt.items() if (run, one, other) not in self.book.controls]

        def task(latent: int) -> float | None:
            return self._judged(latent, str(self.book.labels[dealt[latent]])).value

        def keep(latent: int, value: float | None) -> None:
            self.book.control((run, latent, dealt[latent]), value)

        self._each("control", missing, task, keep, trouble, self.config.judge)
        missing = [one for one, other in dealt.items() if (run, one, other) not in self.book.controls]
        self._require(missing, "control", trouble)

    def _value(self, latent: int) -> float | None:
        found = self.book.scores.get(latent)
        return None if found is None else found.value

    def _result(self) -> Labelling:
        config, book = self.config, self.book
        named = self._named
        scores = {one: book.scores.get(one) for one in named}
        rows = [LabelRow.of(one, str(book.labels[one]), config.provider, scores[one]) for one in named]
        counts = {
            "asked": len(self.wanted),
            "labelled": len(named),
            "unlabelled": len(self.wanted) - len(named) - len(self._unlabelled),
            "missing": len(self._unlabelled),
            "scored": sum(row.score is not None for row in rows),
            "texts": sum(row.n for row in rows),
        }
        coverage = config.scoring.confidence
        mean = mean_score([row.score for row in rows], coverage)
        for kind in ("random", "similar"):
            mean[kind] = mean_score([getattr(row, f"score_{kind}") for row in rows], coverage)["mean"]
        control = self._controls(named)
        judged = [
            self._trial(one).doubt for one in named if self.judge is not None and self._value(one) is not None
        ]
        doubt = sum(judged) / len(judged) if judged else None
        model, _ = config.judge_at
        dictionary = self.index.about.get("dictionary") or {}
        return Labelling(
            summary=_summary(counts, config.provider, mean, control),
            provider=config.provider,
            model=config.providers.model if config.provider in ("openai", "local") else None,
            judge=config.judge if self.judge is not None else "none",
            judge_model=model if config.judge in ("openai", "local") else None,
            examples=str(config.examples),
            dictionary={name: dictionary.get(name) for name in ("path", "sha256")},
            rows=rows,
            counts=counts,
            score=mean,
            control=control,
            doubt=doubt,
            notes=self._notes(rows, counts, doubt),
            confidence=coverage,
            seed=config.run.seed,
            seconds=self.seconds,
        )

    def _controls(self, named: Sequence[int]) -> dict[str, Any]:
        """Means of the controls over latents, alone and together, and the distance of the own labels from them."""
        coverage, shuffles = self.config.scoring.confidence, range(self.config.scoring.shuffles)
        by_run: list[list[float]] = [[] for _ in shuffles]
        by_latent: dict[int, list[float]] = {}
        for (run, latent, _), value in sorted(self.book.controls.items()):
            if value is not None and run in shuffles and latent in named:
                by_run[run].append(value)
                by_latent.setdefault(latent, []).append(value)
        means = {one: sum(values) / len(values) for one, values in by_latent.items()}
        together = mean_score(list(means.values()), coverage)
        gains = [(self._value(one) or 0.0) - value for one, value in means.items()]
        return {
            "shuffled": together["mean"],
            "lo": together["lo"],
            "hi": together["hi"],
            "n": together["n"],
            "runs": [mean_score(values, coverage) for values in by_run],
            "above": mean_score(gains, coverage, lowest=-1.0),
        }

    def _notes(self, rows: Sequence[LabelRow], counts: dict[str, int], doubt: float | None) -> list[str]:
        notes = []
        if counts["missing"]:
            notes.append(f"{counts['missing']} latents have no label because the provider failed.")
        if counts["unlabelled"]:
            notes.append(f"For {counts['unlabelled']} latents the provider has no label.")
        if self.judge is None:
            notes.append("Nothing judged these labels, so they carry no score (--judge openai, local).")
            return notes
        if unscored := len(rows) - counts["scored"]:
            notes.append(
                f"{unscored} labels carry no score: nothing usable was said of them, or no example could be held back."
            )
        if few := sum(0 < row.n < FEW_TEXTS for row in rows):
            notes.append(f"{few} labels were judged on fewer than {FEW_TEXTS} texts.")
        if doubt is not None and doubt >= 0.005:
            notes.append(
                f"Of the negatives about {doubt:.1%} may be tokens on which the latent fires after all (examples tell "
                f"of their own latent only): a perfect label would score about {1 - doubt / 2:.3f}."
            )
        return notes


def _summary(counts: dict[str, int], provider: str, mean: dict[str, Any], control: dict[str, Any]) -> str:
    text = f"{counts['labelled']:,} of {counts['asked']:,} latents labelled by {provider}; "
    if mean["mean"] is None:
        return text + "nothing judged the labels."
    text += f"balanced accuracy {_interval(mean)} on texts that the labels were not made from"
    if control["shuffled"] is None:
        return text + "."
    return text + f", {_interval(control | {'mean': control['shuffled']})} with the labels of other latents."


def _interval(values: dict[str, Any]) -> str:
    shown = f"{values['mean']:.3f}"
    return shown if values["lo"] is None else f"{shown} [{values['lo']:.3f}, {values['hi']:.3f}]"
