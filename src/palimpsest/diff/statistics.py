"""One pass over the text for everything that can share it: scaling, counts, examples, variance explained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.corpus import Role, TokenBatch
from palimpsest.dictionaries import Codes
from palimpsest.diff.classes import split_pairs
from palimpsest.diff.config import ClassOptions
from palimpsest.diff.counts import ChangeSums, JointFiring, KindSums, LatentCounts, Variance
from palimpsest.diff.examples import TopExamples
from palimpsest.diff.methods import Method
from palimpsest.diff.scaling import ScalingSums
from palimpsest.diff.text import GROUPS, Places, TextPass, Texts, read_pair
from palimpsest.errors import CorpusError, NumericsError
from palimpsest.log import progress
from palimpsest.models import ModelPair


@dataclass(frozen=True)
class Statistics:
    """What the pass leaves, as named arrays that a resumed run reads again.

    Attributes:
        arrays: `scaling/sums`, `joint/fires …`, `base/…`, `tuned/…` (own views), `kind/…`, `change/…`, `example/…`,
            `split/pairs`, `split/counts`, `difference [d_model]`, `fve [3]`, `l0`,
            `tokens` (measured) and `documents` per corpus, `read` tokens, `size [2]` of the activations of base and
            tuned, `group/sums [groups, models, d_model]` of the activations and `group/tokens`.
    """

    arrays: dict[str, NDArray]

    @property
    def tokens(self) -> int:
        """Measured tokens."""
        return int(self.arrays["tokens"].sum())

    @property
    def fires(self) -> NDArray[np.int64]:
        """Measured tokens on which each latent fires."""
        return self.arrays["joint/fires"].sum(axis=0)

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Latents that fire on a token that is read, measured or not: patching writes them all."""
        return self.arrays["kind/sums"].sum(axis=0) > 0

    @property
    def unmeasured(self) -> NDArray[np.bool_]:
        """Alive latents that fire on template and special tokens only, which are not measured."""
        return self.alive & (self.fires == 0)


class _Sums:
    """Everything that is accumulated, and how one batch is folded in."""

    def __init__(self, method: Method, texts: Texts, options: ClassOptions) -> None:
        dictionary, corpora = method.dictionary, len(texts.corpora)
        n, device, d_model = dictionary.n_latents, dictionary.device, dictionary.d_model
        self.method = method
        self.pairs = split_pairs(method, options)
        self.scaling = ScalingSums(method)
        self.counts = {"joint": LatentCounts(n, corpora, device)}
        if method.kind != "diff-sae":
            self.counts |= {side: LatentCounts(n, corpora, device) for side in ("base", "tuned")}
        self.kinds, self.change = KindSums(n, device), ChangeSums(n, device)
        self.groups = torch.zeros(GROUPS, 2, d_model, dtype=torch.float64, device=device)
        self.group_tokens = torch.zeros(GROUPS, dtype=torch.long)
        self.split = JointFiring(self.pairs, n, device)
        self.variance = {name: Variance(d_model, device) for name in ("base", "tuned", "difference")}
        self.l0 = torch.zeros((), dtype=torch.long, device=device)
        self.examples = TopExamples(n)
        self.tokens = np.zeros(corpora, np.int64)
        self.read = 0

    @torch.inference_mode()
    def add(self, corpus: int, batch: TokenBatch, places: Places, acts: Tensor) -> None:
        """Fold in one batch; tokens that are not measured count for the kinds only."""
        kind = torch.where(places.template, Role.TEMPLATE, batch.role.reshape(-1)[places.flat])
        kept = places.measured
        self.read += len(places.flat)
        if not kept.all():
            others = acts[~kept.to(acts.device)]
            found = self.method.codes(others)
            self.kinds.add(kind[~kept], found)
            self.change.add(self.method.entries(others, found))
            self.examples.add(corpus, batch, places.flat[~kept], found)
            acts = acts[kept.to(acts.device)]
        if not len(acts):
            return
        codes = self.method.codes(acts)
        self.kinds.add(kind[kept], codes)
        self.counts["joint"].add(corpus, codes)
        self.split.add(codes)
        self.l0 += codes.l0().sum()
        self.tokens[corpus] += len(acts)
        self.examples.add(corpus, batch, places.flat[kept], codes)
        self._describe(corpus, acts, codes, places.document[kept] % GROUPS)

    def _describe(self, corpus: int, acts: Tensor, codes: Codes, group: Tensor) -> None:
        """Scaling, the two models' own views, and what the dictionary leaves out."""
        method, dictionary = self.method, self.method.dictionary
        made = base = None
        if method.kind == "crosscoder":
            made = dictionary.decode(codes).float()
            for place, side in enumerate(("base", "tuned")):
                self.counts[side].add(corpus, dictionary.encode(acts[:, place : place + 1].expand(-1, 2, -1)))
        elif method.single:
            base = dictionary.encode(acts[:, 0])
            self.counts["base"].add(corpus, base)
            self.counts["tuned"].add(corpus, codes)
            made = torch.stack([dictionary.decode(base), dictionary.decode(codes)], 1).float()
        both = made if method.kind == "crosscoder" else None
        self.scaling.add(group, acts, codes, both)
        for place in range(2):
            self.groups[:, place].index_add_(0, group.to(acts.device), acts[:, place].double())
        self.group_tokens += torch.bincount(group, minlength=GROUPS)
        entries = method.entries(acts, codes, base)
        self.change.add(entries)
        for place, side in enumerate(("base", "tuned")):
            self.variance[side].add(acts[:, place], None if made is None else made[:, place])
        described = method.written(entries).float() + method.bias
        self.variance["difference"].add(acts[:, 1] - acts[:, 0], described)

    def finish(self, documents: list[int]) -> Statistics:
        """The arrays."""
        arrays = {"scaling/sums": self.scaling.finish(), **self.kinds.arrays(), **self.change.arrays()}
        for name, counts in self.counts.items():
            arrays |= counts.arrays(name)
        arrays |= self.examples.arrays()
        arrays |= {"split/pairs": self.pairs, "split/counts": self.split.counts()}
        arrays["group/sums"], arrays["group/tokens"] = self.groups.cpu().numpy(), self.group_tokens.numpy()
        arrays["size"] = np.array([self.variance[side].size for side in ("base", "tuned")])
        arrays["difference"] = self.variance["difference"].mean
        arrays["fve"] = np.array([one.fve() for one in self.variance.values()])
        arrays["l0"] = np.array(float(self.l0) / max(int(self.tokens.sum()), 1))
        arrays |= {
            "tokens": self.tokens,
            "read": np.array(self.read),
            "documents": np.array(documents, np.int64),
        }
        return Statistics(arrays)


def collect_statistics(
    method: Method, pair: ModelPair, site: str, texts: Texts, text: TextPass, options: ClassOptions
) -> Statistics:
    """Pass over the text once; both models stop at the site.

    Raises:
        CorpusError: The dictionary fires on no token at all.
        NumericsError: A model or the dictionary gives NaN or infinity.
    """
    sums = _Sums(method, texts, options)
    with progress("latents of both models", text.tokens, unit="tokens") as advance:
        for corpus, batch in text:
            places = texts.places(batch)
            acts = read_pair(pair, site, batch, places.flat, method.dictionary.device)
            sums.add(corpus, batch, places, acts)
            advance(int(places.measured.sum()))
    found = sums.finish(text.documents)
    if not found.alive.any():
        raise CorpusError(
            "No latent of the dictionary fires on this text",
            fix="Check that the two models differ there, and that the dictionary was trained on them and this site "
            "(palimpsest info DICT --corpus FILE)",
        )
    if not all(
        np.isfinite(one).all() for one in (found.arrays["change/size"], found.arrays["scaling/sums"][..., :4])
    ):
        raise NumericsError(
            "The dictionary gives codes that are NaN or infinite", fix="Check its weights, or train it again"
        )
    return found


def masses(method: Method, statistics: Statistics) -> Float[NDArray, " latents"]:
    """Σ |entry| ‖change‖ over the tokens that are read: how much a latent moves the base."""
    return statistics.arrays["change/size"] * method.change.norm(dim=1).double().cpu().numpy()
