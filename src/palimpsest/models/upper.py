"""The layers above a site, run on activations that are given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.errors import SiteError
from palimpsest.log import log
from palimpsest.models.capture import HEAD_INPUT, capture, replace
from palimpsest.models.pair import LanguageModel
from palimpsest.models.verify import PROBE_TOKENS, close

_UNSOUND = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a model raises that cannot do without its lower layers."""


class UpperHalf:
    """The layers of a model above a site, run on given activations.

    Below a residual site the decoder layers are skipped; whether the rest then does what the whole model does is
    checked at construction on a few tokens, and where it does not (layers that share keys and values across the
    site), every layer runs. At other sites every layer runs too: the model on its own input, with the site replaced.

    Attributes:
        model: The model.
        site: The address, absolute.
        bypassed: Decoder layers that are skipped.
    """

    def __init__(self, model: LanguageModel, site: str) -> None:
        """Find the layers below the site and check that they can be skipped.

        Raises:
            SiteError: The model has no such site, or nothing can be written to it.
        """
        self.model, self.site = model, model.sites.canonical(site)
        if ":" in model.sites.tap(self.site).side:
            raise SiteError(
                f"Nothing can be put in at {self.site}",
                found="a site that its module only reports",
                fix="Use a residual site, as in resid_post.13",
            )
        self._below = _layers_below(model, self.site)
        self._sizes: list[int | None] = [None] * len(self._below)
        if self._below and not self._agrees():
            log.info("%s: the layers below %s cannot be skipped; every layer runs.", model.name, self.site)
            self._below, self._sizes = [], []

    @property
    def bypassed(self) -> int:
        """Decoder layers that are skipped."""
        return len(self._below)

    def run(
        self,
        input_ids: Int[Tensor, "batch seq"],
        hidden: Float[Tensor, "variants_batch seq d_model"],
    ) -> Float[Tensor, "variants_batch seq d_head"]:
        """What the head reads when `hidden` stands at the site; the head itself never runs.

        Differentiable with respect to `hidden` where gradients are enabled.

        Args:
            input_ids: One right-padded batch.
            hidden: Activations of any number of variants of that batch, one whole variant after the other.
        """
        ids = input_ids.to(self.model.device).repeat(len(hidden) // len(input_ids), 1)
        with (
            self.model.active(),
            _passing(self._below, self._sizes),
            replace(self.model.sites, self.site, lambda own: hidden.to(own.device, own.dtype)),
            capture(self.model.sites, [], head=True, detach=False) as found,
        ):
            self.model.model(input_ids=ids, use_cache=False)
        return found[HEAD_INPUT]

    @torch.inference_mode()
    def _agrees(self) -> bool:
        """Whether the model's own activations at the site give its own head input, in two variants at once."""
        ids = torch.arange(PROBE_TOKENS)[None] % max(self.model.text_config.vocab_size, 1)
        with _tuple_sizes(self._below) as self._sizes:
            own = self.model.read(ids, [self.site], head=True)
        assert own.head_input is not None
        acts = own.acts[self.site]
        try:
            found = self.run(ids, torch.cat([acts, acts]))
        except _UNSOUND as error:
            log.debug("Without its lower layers %s fails: %s", self.model.name, error)
            return False
        return close(found, torch.cat([own.head_input, own.head_input]))


def _layers_below(model: LanguageModel, site: str) -> list[nn.Module]:
    name, _, layer = site.partition(".")
    if name not in ("resid_pre", "resid_post") or not layer.isdigit():
        return []
    count = int(layer) + (name == "resid_post")
    try:
        return [model.sites.tap(f"resid_post.{index}").module for index in range(count)]
    except SiteError:
        return []


@contextmanager
def _tuple_sizes(layers: Sequence[nn.Module]) -> Iterator[list[int | None]]:
    """The length of the tuple that each layer returns, None for a bare tensor."""
    sizes: list[int | None] = [None] * len(layers)

    def hook(index: int) -> Any:
        def note(_module: nn.Module, _args: object, output: object) -> None:
            sizes[index] = len(output) if isinstance(output, tuple) else None

        return note

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _passing(layers: Sequence[nn.Module], sizes: Sequence[int | None]) -> Iterator[None]:
    """Let layers hand on what they are given, in the form of their own output."""
    # What hangs on the instance already (accelerate puts its forward there) must come back as it was.
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, size in zip(layers, sizes, strict=True):
            layer.forward = _pass_through(size)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _pass_through(size: int | None) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if size is None else (hidden, *[None] * (size - 1))

    return forward
