"""Reading and editing sites: two context managers that always take their hooks away again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from interp_engine.hooks import HookManager
from jaxtyping import Float
from torch import Tensor

from palimpsest.models.sites import SiteMap

HEAD_INPUT = "head_input"
"""Key under which `capture(head=True)` leaves what the model's head would have read."""


class _DeepestSiteReached(Exception):  # noqa: N818 - control flow, not a fault
    """Unwinds a forward pass once everything that was asked for has been read."""


@contextmanager
def capture(
    sites: SiteMap, wanted: Sequence[str], *, head: bool = False, stop: bool = True, detach: bool = True
) -> Iterator[dict[str, Float[Tensor, "batch seq d_model"]]]:
    """Read sites during the forward passes run inside the block.

    With `stop`, the pass ends as soon as the deepest wanted site was read, and the `with` block with it; the
    head never runs, not even with `head`, which reads its input.

    Args:
        sites: The model's site map.
        wanted: Addresses to read.
        head: Also read the head's input, under `HEAD_INPUT`.
        stop: End the forward pass at the deepest wanted site.
        detach: Cut what was read off from gradients.

    Yields:
        A dictionary that fills with tensors `[batch, seq, d_model]` by the addresses as given.
    """
    found: dict[str, Tensor] = {}
    count = len(set(wanted)) + head

    def reader(key: str) -> Callable[[Tensor], None]:
        def read(hidden: Tensor) -> None:
            found[key] = hidden.detach() if detach else hidden
            if stop and len(found) == count:
                raise _DeepestSiteReached

        return read

    with HookManager() as hooks:
        for site in dict.fromkeys(wanted):
            module, side = sites.tap(site)
            hooks.read(module, reader(site), point=side)
        if head:
            hooks.read(sites.head.module, reader(HEAD_INPUT), point="input")
        with suppress(_DeepestSiteReached):
            yield found


@contextmanager
def replace(
    sites: SiteMap,
    site: str,
    edit: Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq d_model"]],
) -> Iterator[None]:
    """Replace what flows through a site by `edit(hidden)` during the forward passes run inside the block."""
    module, side = sites.tap(site)
    with HookManager() as hooks:
        hooks.write(module, edit, point=side)
        yield
