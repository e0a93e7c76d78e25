"""Site addresses (`resid_post.13`) and the modules behind them: the one place that talks to interp-engine.

interp-engine resolves architectures; palimpsest only spells addresses and asks it for modules.
"""

import re
from typing import Any, NamedTuple

from interp_engine import AddressError, EagerModel, parse_address
from interp_engine.lens import apply_logit_transform
from interp_engine.mappers import UnmappedHook, point_to_tlens_hook, tlens_hook_to_point
from interp_engine.protocol import REFUSAL_ERRORS
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.errors import SiteError

RELATIVE = re.compile(r"^([a-z][a-z0-9_]*)\.(\d+(?:\.\d+)?)%$")
EXAMPLES = "`resid_post.13`, `mlp_out.5`, `attn_out.5`, `resid_post.50%` or `path.model.layers.3.mlp`"


class Tap(NamedTuple):
    """Where a site lives: a module and which side of it carries the tensor."""

    module: nn.Module
    side: str


def canonical_site(site: str, n_layers: int) -> str:
    """The absolute address of a site: relative depths and TransformerLens hook names are resolved.

    `resid_post.50%` is the layer after which half of the layers have run.

    Raises:
        SiteError: When it is no address.
    """
    relative = RELATIVE.match(site)
    if relative:
        share = float(relative[2]) / 100
        if not 0 <= share <= 1:
            raise SiteError(f"'{site}' is no depth", expected="0% to 100%")
        return f"{relative[1]}.{max(0, round(share * n_layers) - 1)}"
    if site.startswith("blocks."):
        return site_from_tlens(site)
    try:
        return str(parse_address(site))
    except AddressError as error:
        raise SiteError(f"'{site}' is no site", expected=EXAMPLES, found=str(error)) from error


def site_from_tlens(hook: str) -> str:
    """The site that a TransformerLens hook name (`blocks.5.hook_resid_post`) stands for."""
    try:
        address = tlens_hook_to_point(hook)
    except UnmappedHook as error:
        raise SiteError(f"'{hook}' has no site", expected=EXAMPLES, found=str(error)) from error
    # Block-level hooks fire on what is added to the residual stream: after the output norm where there is one.
    if hook.endswith((".hook_mlp_out", ".hook_attn_out")):
        address = address.replace(name=f"{address.name}_post")
    return str(address)


def tlens_from_site(site: str) -> str | None:
    """The TransformerLens hook name of a site, None where TransformerLens has none."""
    try:
        return point_to_tlens_hook(parse_address(site))
    except (UnmappedHook, AddressError):
        return None


class Head(NamedTuple):
    """The unembedding with what the family's own forward does to its logits."""

    module: nn.Module
    multiplier: float | None
    softcap: float | None

    def logits(self, head_input: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens vocab"]:
        """The model's own logits from the input of its head, in float32."""
        raw = self.module(head_input).float()
        return apply_logit_transform(raw, multiplier=self.multiplier, softcap=self.softcap)


class SiteMap:
    """The resolved architecture of one loaded model.

    Attributes:
        n_layers: Decoder layers.
        d_model: Width of the residual stream.
        head: The unembedding, which a truncated forward never runs.
    """

    def __init__(self, model: nn.Module, tokenizer: object, name: str) -> None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            self._engine = EagerModel(name, hf_model=model, tokenizer=tokenizer, requires_grad=False)
        except (*REFUSAL_ERRORS, AttributeError) as error:
            raise SiteError(
                f"The architecture of {name} ({type(model).__name__}) is not understood",
                expected="a decoder-only transformers model that interp-engine resolves",
                found=str(error),
            ) from error
        for parameter in trainable:
            parameter.requires_grad_(True)
        self.name = name
        self.n_layers: int = self._engine.arch.n_layers
        self.d_model: int = self._engine.arch.d_model
        self.final_norm: nn.Module = self._engine.arch.final_norm
        quirks = self._engine.arch.quirks
        self.head = Head(self._engine.arch.lm_head, quirks.logit_multiplier, quirks.final_logit_softcapping)

    def canonical(self, site: str) -> str:
        """The absolute address of `site` in this model; see `canonical_site`."""
        return canonical_site(site, self.n_layers)

    def tap(self, site: str) -> Tap:
        """The module and side that carry a site.

        Raises:
            SiteError: When this model has no such site, with the engine's reason.
        """
        address = parse_address(self.canonical(site))
        try:
            if address.layer is not None and not 0 <= address.layer < self.n_layers:
                raise ValueError(f"layers run from 0 to {self.n_layers - 1}")
            module, side = self._engine.resolve_point(address.name, address.layer, stream=address.stream)
        except (*REFUSAL_ERRORS, AttributeError) as error:
            raise SiteError(
                f"{self.name} has no site '{site}'", expected=EXAMPLES, found=str(error)
            ) from error
        found: Any = module
        while side == "input" and type(found).__module__.startswith("palimpsest."):
            # What a module reads is what comes out of our adapters around it.
            found = found.base_layer
        return Tap(found, side)
