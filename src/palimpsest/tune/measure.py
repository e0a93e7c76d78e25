"""What a tuned model does on held-out rows and on general text, and the same of its base; intervals over rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.errors import ConfigError
from palimpsest.log import log
from palimpsest.models.pair import LanguageModel
from palimpsest.stats import Resampler, percentile_interval
from palimpsest.tune import losses
from palimpsest.tune.choices import PREFERENCES
from palimpsest.tune.config import ObjectiveOptions
from palimpsest.tune.rewards import mean_rewards
from palimpsest.tune.rows import IGNORED, KtoRow, PairRow, PromptRow, Row, TextRow
from palimpsest.tune.scoring import Comparison, Scorer, Scores

FEWEST = 6
"""Rows of an interval: resampling fewer says nothing."""

RESAMPLES = 2000
"""Bootstrap draws of an interval."""

KINDS: dict[str, type] = {
    "sft": TextRow,
    "unlearn": TextRow,
    "kto": KtoRow,
    "grpo": PromptRow,
    **dict.fromkeys(PREFERENCES, PairRow),
}
"""The rows that each objective is measured on."""

UNITS = {
    "sft": "nats per labelled token",
    "dpo": "dpo loss, nats (no preference learned: log 2)",
    "orpo": "orpo loss: nats per token of prompt and chosen answer, plus the odds-ratio term",
    "simpo": "simpo loss, nats",
    "kto": "kto loss (nothing learned: 0.5)",
    "grpo": "minus the mean reward of greedy answers",
    "unlearn": "npo loss of the text to forget, plus the weighted loss of the text to retain",
}
"""What an objective counts; lower is better in all of them."""

Reward = Callable[..., Sequence[float | None]]


class Part(NamedTuple):
    """A mean over rows: `factor` times the sum of `values` over the sum of `weights`.

    Attributes:
        values: Of each row.
        weights: Tokens of each row, or 1.
        group: Rows that are resampled together.
        factor: Weight of the part among others.
    """

    values: Float[NDArray, " rows"]
    weights: Float[NDArray, " rows"]
    group: str = "heldout"
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Measured:
    """One state of a model, in sums per row (float64).

    Attributes:
        objective: Its parts; the objective is their sum.
        unit: What the objective counts.
        loss: Nats and tokens of the held-out text: of the chosen answers for pairs, of wanted ones for kto, of what
            must stay for unlearn. None where there is no text.
        margin: Of pairs: log p/p_ref of the chosen answer minus that of the rejected one, else None.
        general: Base and tuned model on general text, else None.
        further: Losses that belong to one objective: `forget` (higher is better) and `retain` (lower is better).
    """

    objective: tuple[Part, ...]
    unit: str
    loss: Part | None
    margin: Part | None = None
    general: Comparison | None = None
    further: Mapping[str, Part] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The objective; lower is better."""
        return estimate(self.objective)


class Yardstick:
    """Held-out rows and general text, on which any number of states of one model are measured in the same way.

    The base is the model with its adapter off; it is scored once, at first need.

    Args:
        language: The model, for its head, its context and its tokenizer.
        options: The objective, its beta and its weights.
        rows: Held-out rows of the kind that the objective reads.
        general: General text, for side effects.
        retain: unlearn: held-out rows of the text that must stay.
        reward: grpo: called with `prompts`, `completions` and the rows' columns; one number each.
        tokens_per_batch: Padded tokens of one forward pass.

    Raises:
        ConfigError: There are no rows, rows of the wrong kind, or no reward.
    """

    def __init__(
        self,
        language: LanguageModel,
        options: ObjectiveOptions,
        rows: Sequence[Row],
        *,
        general: Sequence[TextRow] = (),
        retain: Sequence[TextRow] = (),
        reward: Reward | None = None,
        tokens_per_batch: int = 4096,
    ) -> None:
        kind = KINDS[options.objective]
        if not rows or not all(isinstance(row, kind) for row in rows):
            raise ConfigError(
                f"{options.objective} has no held-out rows to be measured on",
                expected=f"at least one {kind.__name__}",
                found=sorted({type(row).__name__ for row in rows}) or "none",
            )
        if options.objective == "grpo" and reward is None:
            raise ConfigError("grpo is measured with its reward", expected="a function")
        self.options, self.rows, self.general, self.retain = options, list(rows), list(general), list(retain)
        self._language, self._reward = language, reward
        self._scorer = Scorer(language.head, tokens_per_batch)
        self._beta = losses.BETA[options.objective] if options.beta is None else float(options.beta)
        self._base: dict[str, Scores] | None = None
        self._base_rewards: Float[NDArray, " rows"] | None = None
        self._base_general: dict[int, Tensor] = {}

    def before(self, model: Any, *, general: bool = True) -> Measured:
        """The base: an adapter that does nothing."""
        return self._measure(model, base=True, general=general)

    def measure(self, model: Any, *, general: bool = True) -> Measured:
        """The model as it stands, adapter on.

        Args:
            model: The peft model; one without an adapter is its own base as of the first measurement.
            general: Also read the general text, where there is any.
        """
        return self._measure(model, base=False, general=general)

    def _measure(self, model: Any, *, base: bool, general: bool) -> Measured:
        objective = self.options.objective
        if objective == "grpo":
            rewards = self._rewards(model, base=base)
            given = np.isfinite(rewards)
            parts = (Part(np.where(given, -rewards, 0.0), given.astype(float)),)
            loss, margin, further = None, None, {}
        else:
            parts, loss, margin, further = self._from_scores(model, base=base)
        side = None
        if general and self.general:
            side = self._scorer.compare(model, self.general, self._base_general, plain=True)
            if base:
                side = Comparison(side.base, side.base, np.zeros_like(side.kl))
        measured = Measured(parts, UNITS[objective], loss, margin, side, further)
        if not np.isfinite(measured.value):
            log.warning("The %s model gives no finite %s on held-out rows.", _name(base), objective)
        return measured

    def _from_scores(self, model: Any, *, base: bool) -> tuple[Any, ...]:
        if self._base is None:
            self._base = self._scores(model, base=True)
        reference = self._base
        found = reference if base else self._scores(model, base=False)
        if self.options.objective == "sft":
            loss = _nats(found["text"])
            return (loss,), loss, None, {}
        if self.options.objective == "unlearn":
            return self._unlearn(found, reference)
        if self.options.objective == "kto":
            return self._kto(found, reference)
        return self._pairs(found, reference)

    def _pairs(self, found: dict[str, Scores], reference: dict[str, Scores]) -> tuple[Any, ...]:
        chosen, rejected = found["chosen"], found["rejected"]
        margin = (chosen.logp - reference["chosen"].logp) - (rejected.logp - reference["rejected"].logp)
        match self.options.objective:
            case "dpo":
                parts = (_mean(losses.dpo(margin, self._beta)),)
            case "simpo":
                parts = (_mean(losses.simpo(chosen.mean_logp, rejected.mean_logp, self._beta)),)
            case _:
                odds = losses.odds_ratio(chosen.mean_logp, rejected.mean_logp, self._beta)
                parts = (_nats(found["whole"]), _mean(odds))
        return parts, _nats(chosen), _mean(margin), {}

    def _kto(self, found: dict[str, Scores], reference: dict[str, Scores]) -> tuple[Any, ...]:
        wanted = np.array([row.label for row in self.rows if isinstance(row, KtoRow)])
        ratio, mismatched = (found[name].logp - reference[name].logp for name in ("answer", "mismatched"))
        part = _mean(losses.kto(ratio, wanted, mismatched, self._beta))
        answer, counted = found["answer"], wanted if wanted.any() else ~wanted
        return (part,), Part(answer.nats * counted, answer.tokens * counted), None, {}

    def _unlearn(self, found: dict[str, Scores], reference: dict[str, Scores]) -> tuple[Any, ...]:
        forget = found["text"]
        parts = (_mean(losses.npo(forget.logp - reference["text"].logp, self._beta)),)
        further = {"forget": _nats(forget)}
        if self.retain:
            retain = _nats(found["retain"])._replace(group="retain")
            parts += (retain._replace(factor=float(self.options.retain_weight)),)
            further["retain"] = retain
        return parts, further.get("retain", further["forget"]), None, further

    def _scores(self, model: Any, *, base: bool) -> dict[str, Scores]:
        """Scores of everything that the objective looks at."""
        made = self._texts()
        joined = [row for rows in made.values() for row in rows]
        scores = self._scorer.score(model, joined, base=base)
        ends = np.cumsum([len(rows) for rows in made.values()])[:-1]
        nats, tokens = np.split(scores.nats, ends), np.split(scores.tokens, ends)
        return {name: Scores(*both) for name, both in zip(made, zip(nats, tokens, strict=True), strict=True)}

    def _texts(self) -> dict[str, list[TextRow]]:
        rows, objective = self.rows, self.options.objective
        if objective == "kto":
            answered = [row for row in rows if isinstance(row, KtoRow)]
            turned = [*answered[-1:], *answered[:-1]]
            return {
                "answer": [answer(row.prompt, row.answer) for row in answered],
                "mismatched": [answer(a.prompt, b.answer) for a, b in zip(answered, turned, strict=True)],
            }
        if objective in PREFERENCES:
            pairs = [row for row in rows if isinstance(row, PairRow)]
            made = {
                "chosen": [answer(row.prompt, row.chosen) for row in pairs],
                "rejected": [answer(row.prompt, row.rejected) for row in pairs],
            }
            if objective == "orpo":
                made["whole"] = [TextRow(row.input_ids, row.input_ids) for row in made["chosen"]]
            return made
        made = {"text": [row for row in rows if isinstance(row, TextRow)]}
        return made | ({"retain": self.retain} if self.retain else {})

    def _rewards(self, model: Any, *, base: bool) -> Float[NDArray, " rows"]:
        assert self._reward is not None
        prompts = [row for row in self.rows if isinstance(row, PromptRow)]
        limit, tokenizer = self.options.completion_length, self._language.tokenizer
        if not base:
            return mean_rewards(model, tokenizer, prompts, self._reward, limit, base=False)
        if self._base_rewards is None:
            self._base_rewards = mean_rewards(model, tokenizer, prompts, self._reward, limit, base=True)
        return self._base_rewards


def answer(prompt: Sequence[int], tokens: Sequence[int]) -> TextRow:
    """A prompt with its answer, of which the answer is labelled."""
    return TextRow([*prompt, *tokens], [*[IGNORED] * len(prompt), *tokens])


def estimate(parts: Sequence[Part]) -> float:
    """The sum of the parts' means; NaN where one has no rows."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(sum(part.factor * (part.values.sum() / part.weights.sum()) for part in parts))


def interval(parts: Sequence[Part], resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """Bootstrap interval of `estimate` over rows; parts of one group share their draws.

    Returns:
        Lower and upper end at 95 %; NaN where a part has fewer than `FEWEST` rows.
    """
    fewest = min(len(part.values) for part in parts)
    if fewest < FEWEST:
        return [float("nan")] * 2
    total: Any = 0.0
    groups = list(dict.fromkeys(part.group for part in parts))
    for part in parts:
        draws = Resampler(len(part.values), resamples, [seed, groups.index(part.group)])
        both = np.stack([part.values, part.weights], 1)
        sums = draws.apply(lambda weights, both=both: weights @ both)
        with np.errstate(invalid="ignore", divide="ignore"):
            total = total + part.factor * sums[:, 0] / sums[:, 1]
    lo, hi = percentile_interval(total, documents=fewest)
    return [float(lo), float(hi)]


def _mean(values: Float[NDArray, " rows"]) -> Part:
    return Part(values, np.ones(len(values)))


def _nats(scores: Scores) -> Part:
    return Part(scores.nats, scores.tokens)


def _name(base: bool) -> str:
    return "base" if base else "tuned"
