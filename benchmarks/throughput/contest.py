"""Who takes part, as data: no torch, no library is imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

OURS, RECIPE = "palimpsest", "recipe"

MATRYOSHKA_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
"""Latents of each Matryoshka level as shares, for everybody: the groups of dictionary-learning's demo."""

WARM_UP, DECAY = 0.02, 0.2
"""Everybody's schedule: linear warm-up, constant, linear decay to zero at the end; shares of the run."""

LONG_RUN_STEPS = 1000
"""What a timed run takes itself to be a part of, so that warm-up and decay are those of a real run."""


@dataclass(frozen=True)
class Contestant:
    """One way of training one kind of dictionary.

    Attributes:
        library: The package, or "recipe".
        family: Whom it is compared with: topk, batch_topk, matryoshka, relu, jumprelu, crosscoder, diff.
        variant: Tells two of one library and family apart.
        dtypes: float32 and, where the library has it, bfloat16 (autocast for peers).
        view: base, diff or pair.
        lr: Peak learning rate of the quality run: for a peer the best of a sweep, see `--sweep`; None: default.
        large: Takes part at the larger dictionary too.
        options: For its builder.
    """

    library: str
    family: str
    variant: str = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    view: str = "base"
    lr: float | None = None
    large: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.library, self.family, self.variant) if part)

    @property
    def models(self) -> int:
        return 2 if self.view == "pair" else 1

    def job(self, **more: Any) -> dict[str, Any]:
        return {**asdict(self), "models": self.models, "name": self.name, **more}


# 1e-2 was the best of 3e-3, 1e-2 and 3e-2 (65,536 tokens) for eai-sparsify, both BatchTopK peers and the recipe, and of
# the first two for the other TopK peers; matryoshka, relu and jumprelu were not swept and take it over.
CONTESTANTS = (
    Contestant(OURS, "topk"),
    Contestant("eai-sparsify", "topk", lr=1e-2),
    Contestant("dictionary-learning", "topk", lr=1e-2),
    Contestant("sae-lens", "topk", lr=1e-2),
    Contestant("sae-lens", "topk", "sparse", ("float32",), lr=1e-2, options={"use_sparse_activations": True}),
    Contestant(OURS, "batch_topk"),
    Contestant("dictionary-learning", "batch_topk", lr=1e-2),
    Contestant("sae-lens", "batch_topk", lr=1e-2),
    Contestant(OURS, "crosscoder", view="pair"),
    Contestant(RECIPE, "crosscoder", view="pair", lr=1e-2),
    Contestant(OURS, "matryoshka"),
    Contestant("dictionary-learning", "matryoshka", lr=1e-2, large=False),
    Contestant("sae-lens", "matryoshka", lr=1e-2, large=False),
    Contestant(OURS, "relu"),
    Contestant("sae-lens", "relu", lr=1e-2, large=False),
    Contestant(OURS, "jumprelu"),
    Contestant("sae-lens", "jumprelu", lr=1e-2, large=False),
    Contestant(OURS, "diff", view="diff"),
)

REQUIRED = {"topk": 2.0, "batch_topk": 5.0, "crosscoder": 5.0}
"""How many times the fastest peer of a family ours has to reach."""

REQUIRED_ON_GPU = {"eai-sparsify": 1.0, "dictionary-learning": 2.0, "sae-lens": 2.0, "recipe": 1.0}
"""On a GPU each peer is compared with by itself."""

REQUIRED_SHARE = {"cpu": ("float32", 0.6), "cuda": ("bfloat16", 0.45)}
"""Of the encode roofline of a dtype, at the largest dictionary."""


def prefixes(latents: int) -> tuple[int, ...]:
    """Matryoshka levels as cumulative widths."""
    ends, total = [], 0
    for share in MATRYOSHKA_SHARES[:-1]:
        total += int(share * latents)
        ends.append(total)
    return (*ends, latents)


def lane(library: str) -> str:
    """Which environment has the library: the project's own, or the one of `peers.sh`."""
    return "peers" if library in ("eai-sparsify", "dictionary-learning") else "own"


def factor(step: int, steps: int) -> float:
    """The shared schedule's factor of a step, counted from 0."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    fall = min(1.0, (steps - step) / max(1.0, DECAY * steps))
    return rise * max(0.0, fall)
