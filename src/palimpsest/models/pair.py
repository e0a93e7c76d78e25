"""A base model and its fine-tune, readable side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.display.notebook import Card, Rich, Table
from palimpsest.errors import ConfigError, PairError
from palimpsest.models.capture import HEAD_INPUT, capture
from palimpsest.models.sites import Head, SiteMap

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")


class Reading(NamedTuple):
    """What one forward pass left: activations per site, and the head's input when it was asked for."""

    acts: dict[str, Float[Tensor, "batch seq d_model"]]
    head_input: Float[Tensor, "batch seq d_model"] | None


@dataclass
class LanguageModel(Rich):
    """One readable language model.

    Attributes:
        name: Where it came from.
        model: The transformers model (for an adapter pair both sides hold the same one).
        sites: Its resolved architecture.
        active: Context in which the weights are this model's (switches an adapter).
        adapter_prefix: Prefix of the adapter's parameters when the weights carry one.
        adapter_on: Whether this side reads through the adapter.
    """

    name: str
    model: Any
    sites: SiteMap
    tokenizer: Any
    active: Callable[[], AbstractContextManager[Any]] = nullcontext
    adapter_prefix: str | None = None
    adapter_on: bool = False

    def _card(self) -> Card:
        return Card("Language model", self.name, facts=self._facts())

    def _facts(self) -> dict[str, Any]:
        parameters = sum(one.numel() for one in self.model.parameters())
        return {
            "architecture": type(self.model).__name__,
            "parameters": parameters,
            "layers": self.sites.n_layers,
            "context": self.context,
            "dtype": str(self.dtype).removeprefix("torch."),
            "on": str(self.device),
            "adapter": None if self.adapter_prefix is None else "on" if self.adapter_on else "off",
        }

    @property
    def device(self) -> torch.device:
        """Where input ids must be."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def text_config(self) -> Any:
        """The configuration of the language model proper."""
        return self.model.config.get_text_config()

    @property
    def head(self) -> Head:
        """The unembedding of this side: where an adapter wraps it, the base's own is the one inside."""
        head = self.sites.head
        if self.adapter_prefix is None or self.adapter_on:
            return head
        plain = getattr(head.module, "original_module", getattr(head.module, "base_layer", head.module))
        return head._replace(module=plain)

    @property
    def context(self) -> int | None:
        """Tokens that the model can read at once, where its configuration says so."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def width(self, site: str) -> int:
        """Width of the activations at a site; `mlp_act`, for one, is wider than the residual stream."""
        return self.read(torch.zeros(1, 1, dtype=torch.long), [site]).acts[site].shape[-1]

    @torch.inference_mode()
    def read(
        self, input_ids: Int[Tensor, "batch seq"], wanted: Sequence[str], *, head: bool = False
    ) -> Reading:
        """Run one forward pass over right-padded ids and read sites; the head itself never runs.

        No attention mask is given: with right padding and causal attention no real token sees a padding one,
        and attention kernels are fastest without a mask.
        """
        limit, length = self.context, input_ids.shape[1]
        if limit and 0 < limit < length:
            raise ConfigError(
                f"The text is longer than the context of {self.name}",
                expected=f"at most {limit} tokens",
                found=length,
                fix=f"Pass --max-length {limit}",
            )
        with self.active(), capture(self.sites, wanted, head=head) as found:
            self.model(input_ids=input_ids.to(self.device), use_cache=False)
        head_input = found.pop(HEAD_INPUT, None)
        return Reading(found, head_input)


class ModelPair(Rich):
    """A base and a tuned model with one tokenizer; see `palimpsest.load_pair`.

    Attributes:
        kind: `full` (two sets of weights) or `adapter` (one set, switched).
        notes: What a reader of any result on this pair should know.
        one_at_a_time: Only one side is in memory; `side` loads it and drops the other.
    """

    def __init__(
        self,
        loaders: dict[Side, Callable[[], LanguageModel]],
        tokenizer: Any,
        *,
        kind: Literal["full", "adapter"],
        one_at_a_time: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self._loaders = loaders
        self.notes = list(notes)
        self._loaded: dict[Side, LanguageModel] = {}
        self.tokenizer = tokenizer
        self.kind: Literal["full", "adapter"] = kind
        self.one_at_a_time = one_at_a_time and kind == "full"

    def _card(self) -> Card:
        held = [(side, self._loaded[side]) for side in SIDES if side in self._loaded]
        columns = ["", "model", *(held[0][1]._facts() if held else ())]
        rows = [(side, one.name, *one._facts().values()) for side, one in held]
        facts = {"kind": self.kind, "in memory": "one at a time" if self.one_at_a_time else ""}
        table = Table(columns, rows, sides=[side for side, _ in held])
        return Card("Base and fine-tune", facts=facts, tables=[table], notes=self.notes)

    @property
    def base(self) -> LanguageModel:
        """The base model."""
        return self.side("base")

    @property
    def tuned(self) -> LanguageModel:
        """The fine-tune."""
        return self.side("tuned")

    def side(self, side: Side) -> LanguageModel:
        """One of the two models, loaded if need be; one at a time, the other is dropped first."""
        if side not in self._loaded:
            if self.one_at_a_time:
                self._loaded.clear()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            self._loaded[side] = self._loaders[side]()
        return self._loaded[side]

    def loaded(self, side: Side) -> bool:
        """Whether a side is in memory now."""
        return side in self._loaded

    @contextmanager
    def both(self) -> Iterator[tuple[LanguageModel, LanguageModel]]:
        """Both models in memory.

        Raises:
            PairError: When the pair was loaded one at a time.
        """
        if self.one_at_a_time:
            raise PairError(
                "Both models are needed at once",
                found="a pair that holds one model at a time",
                fix="Load the pair without one_at_a_time",
            )
        yield self.base, self.tuned
