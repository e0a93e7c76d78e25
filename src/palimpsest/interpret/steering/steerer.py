"""Steering a model: latents changed at a site during plain forward passes and while it writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Unpack, get_args

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from palimpsest.corpus import special_ids
from palimpsest.errors import ConfigError, NumericsError, SiteError
from palimpsest.interpret.steering.changes import Change, read_changes
from palimpsest.interpret.steering.companion import Call, Companion, reading_unsteered
from palimpsest.interpret.steering.edit import LatentEdit
from palimpsest.interpret.steering.generate import Decoding, DecodingFields, OnToken, encode_prompt, write_on
from palimpsest.interpret.steering.result import Steered
from palimpsest.interpret.subject import Subject
from palimpsest.models import SIDES, LanguageModel, ModelPair, Side, replace
from palimpsest.models.adapters import adapter_is_on

Tokens = Literal["all", "generated", "prompt"]
"""Which tokens are edited; never BOS, padding and other special ones."""


class Steerer:
    """Changes latents of one dictionary in either of its models.

    Attributes:
        subject: The dictionary and its models.

    Example:
        >>> steerer = Steerer(open_subject("base/", "math/", "dictionary/"))  # doctest: +SKIP
        >>> steerer.generate("The river", "tuned", ["123:scale=4"])  # doctest: +SKIP
        >>> with steerer.steering("base", ["17:ablate"]) as model:  # doctest: +SKIP
        ...     model.model(input_ids=ids)
    """

    def __init__(self, subject: Subject) -> None:
        """Check that something can be written at the site.

        Raises:
            SiteError: It cannot.
        """
        first = subject.model(subject.sides[0])
        if ":" in first.sites.tap(subject.site).side:
            raise SiteError(
                f"Nothing can be written at {subject.site}",
                found="a site that its module only reports",
                fix="Steer at a residual site, as in resid_post.13",
            )
        self.subject = subject
        self._special = torch.from_numpy(special_ids(subject.tokenizer)).long()

    @contextmanager
    def steering(
        self,
        side: Side,
        changes: Change | str | Iterable[Change | str],
        *,
        tokens: Tokens = "all",
        prompt_length: int | None = None,
    ) -> Iterator[LanguageModel]:
        """Edit every forward pass of one model inside the block, and have an adapter on or off as that model wants it.

        The block changes no weights and leaves no hook behind. Blocks may be nested: each edits what the one around
        it left, each in its own model. Batches may be padded on either side where an attention mask says so.

        Args:
            side: The model.
            changes: Of latents; none leave the model as it is.
            tokens: Which tokens are edited, but for BOS, padding and other special ones.
            prompt_length: Tokens of the prompt, where `tokens` tells prompt and generated ones apart.

        Yields:
            The model that is steered.

        Raises:
            ConfigError: There is no such model or latent, or the prompt's length is not known.
            PairError: The codes are joint, and the pair holds one model at a time.
            NumericsError: During a forward pass: NaN or infinity after the edit.
        """
        if tokens not in get_args(Tokens):
            raise ConfigError(
                f"There is no choice of tokens '{tokens}'", expected=", ".join(get_args(Tokens))
            )
        if tokens != "all" and prompt_length is None:
            raise ConfigError(
                f"Where does the prompt end? It decides what '{tokens}' is", fix="prompt_length="
            )
        model = self.subject.model(side)
        known = read_changes(changes, self.subject.dictionary.n_latents)
        if not known:
            with model.active():
                yield model
            return
        edit = LatentEdit(self.subject.dictionary, side, known)
        companion = self._companion(side) if edit.reads_both else None
        hook = _Steering(model, self.subject.site, edit, companion, self._special)
        hook.tokens, hook.prompt_length = tokens, prompt_length
        with model.active(), hook.attached():
            yield model

    def generate(
        self,
        prompt: str,
        side: Side | None = None,
        changes: Change | str | Iterable[Change | str] = (),
        *,
        on_token: OnToken | None = None,
        tokens: Tokens = "all",
        **decoding: Unpack[DecodingFields],
    ) -> str:
        """What a model writes after a prompt, deterministic by seed; the global random state is left as it was.

        Args:
            prompt: Text; the tokenizer's BOS is put before it.
            side: Which model; by default the tuned one where there is one.
            changes: Of latents.
            on_token: Called with each piece of text as it is written; what it raises ends the writing.
            tokens: Which tokens are edited.
            **decoding: Fields of `Decoding`: max_new_tokens, temperature, seed, chat.

        Raises:
            ConfigError: As `steering`; the prompt is empty or too long, or the decoding options make no sense.
        """
        options, side = Decoding(**decoding), side or self.subject.sides[-1]
        ids = encode_prompt(self.subject.model(side), prompt, chat=options.chat)
        with self.steering(side, changes, tokens=tokens, prompt_length=len(ids)) as model:
            return write_on(model, ids, options, on_token)

    def compare(
        self,
        prompt: str,
        changes: Change | str | Iterable[Change | str],
        side: Side | None = None,
        *,
        tokens: Tokens = "all",
        **decoding: Unpack[DecodingFields],
    ) -> Steered:
        """What base, tuned and steered model write after one prompt with one seed.

        Args:
            prompt: Text.
            changes: Of latents.
            side: The model that is steered; by default the tuned one where there is one.
            tokens: Which tokens are edited.
            **decoding: Fields of `Decoding`.

        Raises:
            ConfigError: As `generate`.
        """
        side = side or self.subject.sides[-1]
        known = read_changes(changes, self.subject.dictionary.n_latents)
        texts = {one: self.generate(prompt, one, **decoding) for one in self.subject.sides}
        steered = self.generate(prompt, side, known, tokens=tokens, **decoding)
        options = Decoding(**decoding)
        return Steered(
            prompt,
            texts["base"],
            texts.get("tuned"),
            steered,
            side,
            [one.to_dict() for one in known],
            tokens,
            options.seed,
            options.temperature,
        )

    def _companion(self, side: Side) -> Companion:
        source = self.subject.source
        if not isinstance(source, ModelPair):
            raise ConfigError("A joint code reads two models", expected="a pair", found="one model")
        with source.both():
            return Companion(source.side(SIDES[1 - SIDES.index(side)]), self.subject.site)


class _Steering:
    """The hooks of one block: what each forward pass reads, and what is written at the site."""

    tokens: Tokens = "all"
    prompt_length: int | None = None

    def __init__(
        self, model: LanguageModel, site: str, edit: LatentEdit, companion: Companion | None, special: Tensor
    ) -> None:
        self.model, self.site, self.edit = model, site, edit
        self.companion, self.special = companion, special.to(model.device)
        self._call: Call | None = None
        self._other: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks, which are gone when the block ends."""
        module = self.model.model
        # First of all hooks: the companion may run the same module before anything else notes this pass.
        handles = [module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)]
        try:
            handles.append(module.register_forward_hook(self._after, always_call=True))
            with replace(self.model.sites, self.site, self._write):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _off(self) -> bool:
        """Whether the pass is another model's: a companion's, or the other side's of an adapter pair."""
        if reading_unsteered():
            return True
        if self.model.adapter_prefix is None:
            return False
        return adapter_is_on(self.model.model) is (not self.model.adapter_on)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the pass; the companion reads the same tokens before it begins."""
        if self._off():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise ConfigError("Steering must know the tokens", expected="input_ids", found="embeddings")
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        self._call = Call(
            ids,
            0 if cache is None else int(cache.get_seq_length()),
            cache is not None or kwargs.get("use_cache") is not False,
            mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            positions if isinstance(positions, Tensor) else None,
        )
        self._other = None if self.companion is None else self.companion.read(self._call)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._off():
            self._call = self._other = None

    def _write(self, hidden: Tensor) -> Tensor:
        if self._off():
            return hidden
        call = self._call
        if call is None or call.ids.numel() * hidden.shape[-1] != hidden.numel():
            raise ConfigError(
                "Steering does not know which tokens these activations belong to",
                expected="a forward pass of the whole model, called with input_ids",
                found=f"activations of shape {list(hidden.shape)}",
            )
        chosen = self._chosen(call)
        if chosen is None:
            return hidden
        flat = hidden.reshape(-1, hidden.shape[-1])
        other = None if self._other is None else self._other.reshape(flat.shape)
        # Mixed precision would compute the edit in a type in which (v - 1) z is rounded away.
        with torch.autocast(hidden.device.type, enabled=False):
            delta = self.edit.delta(flat, other).to(hidden.device)
            delta = torch.where(chosen.reshape(-1, 1).to(hidden.device), delta, 0)
            new = (flat.to(delta.dtype) + delta).to(hidden.dtype)
        if not torch.isfinite(new.sum(dtype=torch.float32)) and not torch.isfinite(new).all():
            raise NumericsError(
                f"NaN or infinity at {self.site} after the edit",
                expected="finite activations",
                found=f"changes up to {float(delta.abs().max()):.3g} in {hidden.dtype}",
                fix="Choose smaller values; load float16 models in float32 or bfloat16",
            )
        return new.view(hidden.shape)

    def _chosen(self, call: Call) -> Bool[Tensor, "batch seq"] | None:
        """The tokens to edit; None where it is plain without looking that there are none."""
        seq = call.ids.shape[1]
        place = call.past + torch.arange(seq, device=call.ids.device)
        generated = place >= (self.prompt_length or 0)
        if self.tokens == "generated" and call.past + seq <= (self.prompt_length or 0):
            return None
        if self.tokens == "prompt" and call.past >= (self.prompt_length or 0):
            return None
        chosen = torch.isin(call.ids, self.special.to(call.ids.device), invert=True)
        if self.tokens != "all":
            chosen = chosen & (generated if self.tokens == "generated" else ~generated)
        if call.mask is not None:
            chosen = chosen & call.mask[:, -seq:].to(chosen.device).bool()
        return chosen


__all__ = ["Steerer", "Tokens"]
