"""Labels and verdicts of a language model on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import ConfigError
from palimpsest.interpret.labels.evidence import evenly
from palimpsest.interpret.labels.prompts import (
    LABEL_OPENING,
    judge_one_messages,
    label_messages,
    read_label,
)
from palimpsest.interpret.labels.protocol import Evidence, Text
from palimpsest.models import LanguageModel

LABEL_TOKENS = 64
YES, NO = ("Yes", " Yes", "yes", " yes"), ("No", " No", "no", " no")


class LocalModel:
    """A causal language model that labels by greedy generation and judges by the odds of yes against no.

    Args:
        model: The model; its tokenizer's chat template is used when it has one.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model: Any = model.model
        self._tokenizer = model.tokenizer
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        listed = [*self._tokenizer.all_special_tokens, *(str(one) for one in added if one.special)]
        # The longest first: one may be a part of another.
        self._special = sorted({*map(str, listed)}, key=lambda one: (-len(one), one))
        self._yes, self._no = self._answers()

    def label(self, evidence: Evidence) -> str | None:
        """The first line that the model says; of more examples than it can read at once it sees half or a quarter.

        Raises:
            ConfigError: Not even one example fits into the model.
        """
        ids, opening = self._question(evidence)
        with torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LABEL_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0,
            )
        answer = self._tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return read_label(opening + answer)

    def _question(self, evidence: Evidence) -> tuple[Int[Tensor, "1 seq"], str]:
        while True:
            messages = label_messages(evidence, self._special)
            try:
                return self._prompt(messages, f"\n\n{LABEL_OPENING}", LABEL_OPENING)
            except ConfigError:
                if len(evidence.examples) < 2:
                    raise
            fewer = evenly(evidence.examples, len(evidence.examples) // 2)
            evidence = replace(evidence, examples=tuple(fewer))

    def judge(self, label: str, texts: Sequence[Text]) -> list[bool | None]:
        """Whether the odds of yes are above even."""
        return [self.odds(label, text) > 0 for text in texts]

    def odds(self, label: str, text: Text) -> float:
        """The odds that the label fits, log p(yes) - log p(no) in nats, over the ways to write the two words."""
        ids, _ = self._prompt(judge_one_messages(label, text, self._special), "\n\nAnswer:", "")
        with torch.inference_mode():
            logits: Float[Tensor, " vocab"] = self._model(ids, logits_to_keep=1).logits[0, -1].float()
        yes, no = (torch.logsumexp(logits[one], 0) for one in (self._yes, self._no))
        return float(yes - no)

    def _prompt(
        self, messages: list[dict[str, str]], ending: str, opening: str
    ) -> tuple[Int[Tensor, "1 seq"], str]:
        """The ids of a question, and what its answer is made to begin with where there is no chat template."""
        if getattr(self._tokenizer, "chat_template", None):
            text, opening = self._chat(messages), ""
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = "\n\n".join(one["content"] for one in messages) + ending
            ids = self._tokenizer(text)["input_ids"]
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(ids) + LABEL_TOKENS > room:
            raise ConfigError(
                f"The question does not fit into the model: {len(ids)} tokens",
                expected=f"at most {room - LABEL_TOKENS}",
                fix="Choose a model with a longer context",
            )
        return torch.tensor([ids], device=self._model.device), opening

    def _chat(self, messages: list[dict[str, str]]) -> str:
        """The conversation in the model's own form; some templates know no system."""
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            if type(error).__module__.split(".")[0] != "jinja2":
                raise
            both = "\n\n".join(one["content"] for one in messages)
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": both}], tokenize=False, add_generation_prompt=True
            )

    def _answers(self) -> tuple[list[int], list[int]]:
        """First tokens of yes and of no; what both can begin with says nothing."""

        def first(words: tuple[str, ...]) -> set[int]:
            found = (self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in words)
            return {ids[0] for ids in found if ids}

        yes, no = first(YES), first(NO)
        if not yes - no or not no - yes:
            raise ConfigError(
                "This model's tokenizer cannot tell yes from no by one token",
                fix="Judge with another model, or pass --judge tokens or --judge none",
            )
        return sorted(yes - no), sorted(no - yes)
