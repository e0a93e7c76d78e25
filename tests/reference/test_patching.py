"""Patching against whole forward passes of transformers, document by document, with dense codes."""

from __future__ import annotations

import json
from zlib import crc32

import numpy as np
import pytest
import torch

from helpers import assert_close, assert_not_close
from pair_fixture import adapt, load_hf, lora, save
from palimpsest.corpus import Role
from palimpsest.dictionaries import Dictionary
from palimpsest.diff.config import DiffConfig, PatchOptions
from palimpsest.diff.methods import Method
from palimpsest.diff.patching import Candidates, effects, patch_pair
from palimpsest.diff.patching.sets import plan
from palimpsest.diff.text import Texts
from palimpsest.models import load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

SITE, LAYER, D_MODEL, LATENTS, FIRST = "resid_post.0", 0, 32, 48, 3
KINDS = {
    "crosscoder": ("pair", 2),
    "diff-sae": ("diff", 1),
    "tuned-sae": ("tuned", 1),
    "base-sae": ("base", 1),
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Conversations, two of them with two answers, and answers of different lengths."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    talk = [("What runs past the mill?", "The river."), ("And how many sacks?", "Seven of 12, I count.")]
    rows = [[("user", q), ("assistant", a * (1 + n % 3))] for n in range(6) for q, a in talk[n % 2 :]]
    with path.open("w") as file:
        for turns in [sum(rows[:2], []), *rows]:
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def dictionary(kind, seed=0):
    """Random, with biases that are no zeros, latents of different lengths and about six codes a token."""
    view, models = KINDS[kind]
    torch.manual_seed(seed)
    made = Dictionary(D_MODEL, LATENTS, k=6, models=models, view=view)
    with torch.no_grad():
        made.W_dec.mul_(torch.rand(LATENTS, models, 1) + 0.2)
        made.b_dec.copy_(0.1 * torch.randn(models, D_MODEL))
        made.b_enc.copy_(0.1 * torch.randn(LATENTS))
    return made.requires_grad_(False)


def candidates(seed=3):
    rng = np.random.default_rng(seed)
    alive = np.sort(rng.permutation(LATENTS)[:24])
    rankings = {name: rng.permutation(alive)[:count] for name, count in (("nu", 15), ("delta_norm", 24))}
    return Candidates(alive, rng.random(LATENTS), rankings, rng.standard_normal(D_MODEL).astype(np.float32))


def config(**changes):
    options = {"top_share": 0.4, "first": FIRST, "random_sets": 1} | changes
    return DiffConfig(
        "base",
        "tuned",
        dictionary="d",
        corpus=("c",),
        run=RunOptions(out="out", seed=5),
        resamples=200,
        patching=PatchOptions(**options),
        models=ModelOptions(tokens_per_batch=300),
    )


def texts_of(pair, *sources, **options):
    return Texts([str(one) for one in sources], pair.tokenizer, CorpusOptions(**options), 512)


class Dense:
    """The same measure without a store of sums, sparse codes, batches or skipped layers."""

    def __init__(self, base, tuned, method, mean):
        self.base, self.tuned, self.method, self.mean = base, tuned, method, torch.from_numpy(mean)

    @torch.no_grad()
    def layer(self, model, ids):
        found = []
        handle = model.model.layers[LAYER].register_forward_hook(lambda _m, _i, out: found.append(out[0]))
        model(input_ids=ids[None])
        handle.remove()
        return found[0]

    @torch.no_grad()
    def log_p(self, model, ids, hidden=None):
        put = None if hidden is None else (lambda _m, _i, _o: hidden[None])
        handle = model.model.layers[LAYER].register_forward_hook(put) if put else None
        logits = model(input_ids=ids[None]).logits[0].double()
        if handle:
            handle.remove()
        return logits.log_softmax(-1)

    def codes(self, acts):
        made, kind = self.method.dictionary, self.method.kind
        if kind == "crosscoder":
            return made.encode(acts).dense()
        if kind == "diff-sae":
            return made.encode(acts[:, 1] - acts[:, 0]).dense()
        return made.encode(acts[:, 1]).dense() - made.encode(acts[:, 0]).dense()

    def added(self, variant, acts, template):
        made, raw = self.method.dictionary, acts[:, 1] - acts[:, 0]
        rows, bias = made.W_dec, made.b_dec
        pair = self.method.kind == "crosscoder"
        change = rows[:, 1] - rows[:, 0] if pair else rows[:, 0]
        bias = bias[1] - bias[0] if pair else bias[0] * (self.method.kind == "diff-sae")
        codes = self.codes(acts)
        everything = codes @ change
        fixed = {
            "none": 0 * raw,
            "bias": bias + 0 * raw,
            "all": everything,
            "all+bias": everything + bias,
            "raw": raw,
            "error": raw - everything - bias,
            "mean": self.mean + 0 * raw,
            "template": raw * template[:, None],
        }
        if variant.latents is None:
            return fixed[variant.name]
        chosen = torch.from_numpy(variant.latents)
        return codes[:, chosen] @ change[chosen]

    def document(self, document, variants, options):
        """KL and CE of each predicted token by variant, base's and tuned's own, and which are early."""
        ids = torch.from_numpy(document.token_ids).long()
        hidden = [self.layer(model, ids) for model in (self.base, self.tuned)]
        special = torch.from_numpy(document.special)
        edited = torch.ones(len(ids), dtype=torch.bool)
        edited[0] = options.all_positions or not special[0]
        acts = torch.stack(hidden, 1)[edited]
        roles = torch.from_numpy(document.roles.astype(np.int64))
        template = ((roles == Role.TEMPLATE) | special)[edited].float()
        plain = self.log_p(self.tuned, ids)
        own = self.log_p(self.base, ids)
        kls, ces = [divergence(plain, own)], [nll(own, ids), nll(plain, ids)]
        for variant in variants:
            change = self.added(variant, acts, template)
            new = hidden[int(variant.removed)].clone()
            new[edited] += -change if variant.removed else change
            found = self.log_p(self.tuned, ids, new)
            kls.append(divergence(plain, found))
            ces.append(nll(found, ids))
        keep = torch.ones(len(ids), dtype=torch.bool)
        if not options.all_positions:
            keep = (roles != Role.TEMPLATE) & ~special
        run, early = 0, []
        for role in roles.tolist():
            run = run + 1 if role == Role.ASSISTANT else 0
            early.append(0 < run <= FIRST)
        return torch.stack(kls), torch.stack(ces), keep[1:], torch.tensor(early)[1:]


def divergence(left, right):
    return (left.exp() * (left - right)).sum(-1)[:-1]


def nll(log_p, ids):
    return -log_p[:-1].gather(1, ids[1:, None])[:, 0]


def dense_sums(dense, texts, variants):
    """KL, CE and count by corpus and positions, over the documents with even checksums."""
    sums = {}
    for corpus in texts.corpora:
        for document in corpus.documents():
            if crc32(document.token_ids.tobytes()) % 2:
                continue
            kl, ce, keep, early = dense.document(document, variants, texts.options)
            for name, rows in (("all", keep), ("first", keep & early)):
                old = sums.get((corpus.name, name), (0, 0, 0))
                new = (kl[:, rows].sum(1), ce[:, rows].sum(1), int(rows.sum()))
                sums[corpus.name, name] = tuple(a + b for a, b in zip(old, new, strict=True))
    return sums


@pytest.fixture(scope="module")
def pair(base, tuned):
    return load_pair(base, tuned)


@pytest.mark.parametrize(
    ("kind", "all_positions"), [*((kind, False) for kind in KINDS), ("crosscoder", True)]
)
def test_every_row_is_that_of_whole_forward_passes(kind, all_positions, pair, base, tuned, text, chat):
    method, chosen = Method(dictionary(kind)), candidates()
    assert method.kind == kind
    texts = texts_of(pair, f"words={text}", f"chat={chat}", max_length=36, all_positions=all_positions)
    found = patch_pair(method, pair, SITE, texts, chosen, config(), sets={"mine": chosen.alive[:5].tolist()})
    variants = plan(chosen, config().patching, 5, template=True, sets={"mine": chosen.alive[:5].tolist()})
    # Random directions have no definition but the code's own; the planted tests see to them.
    checked = [one for one in variants if one.scramble is None]
    dense = Dense(load_hf(base), load_hf(tuned), method, chosen.mean_difference)
    sums = dense_sums(dense, texts, checked)
    rows = {
        (row.set, row.size, row.positions, removed): row
        for removed, rows in ((False, found.added), (True, found.removed))
        for row in rows
    }
    assert {one.name for one in checked} >= {"none", "template", "best:nu|delta_norm", "random:nu", "mine"}
    assert len(rows) == 2 * len(variants)
    for positions in ("all", "first"):
        parts = {name: sums[name, positions] for name in ("words", "chat") if sums[name, positions][2]}
        kl, ce, count = (sum(part[i] for part in parts.values()) for i in range(3))
        assert found.predictions[positions] == count > 10
        assert_close(found.base_kl[positions], float(kl[0] / count), rtol=1e-4)
        for index, variant in enumerate(checked, 1):
            row = rows[variant.name, variant.size, positions, variant.removed]
            assert_close(row.kl, float(kl[index] / count), rtol=2e-3, atol=1e-6)
            share = 1 - kl[index] / kl[1]
            assert_close(row.share, float(1 - share if variant.removed else share), rtol=1e-3, atol=2e-3)
            assert row.loss == pytest.approx(
                {name: float(part[1][index + 1] / part[2]) for name, part in parts.items()}, rel=1e-4
            )
            by_corpus = {name: float(part[0][index] / part[0][1]) for name, part in parts.items()}
            expected = by_corpus if variant.removed else {name: 1 - x for name, x in by_corpus.items()}
            assert row.by_corpus == pytest.approx(expected, rel=1e-3, abs=2e-3)
    for side, place in (("base", 0), ("tuned", 1)):
        losses = {
            name: float(sums[name, "all"][1][place] / sums[name, "all"][2]) for name in ("words", "chat")
        }
        assert found.loss[side] == pytest.approx(losses, rel=1e-4)


def test_the_result_does_not_depend_on_how_it_is_cut_up(pair, text, chat, monkeypatch):
    method, texts = Method(dictionary("crosscoder")), texts_of(pair, text, chat, max_length=36)
    whole = patch_pair(method, pair, SITE, texts, candidates(), config())
    monkeypatch.setitem(effects.TOKENS_AT_ONCE, "cpu", 700)
    monkeypatch.setattr(effects, "HEADS_AT_ONCE", 5)
    cut = patch_pair(method, pair, SITE, texts, candidates(), config())
    assert [row.set for row in cut.added] == [row.set for row in whole.added]
    assert_close([row.kl for row in cut.added], [row.kl for row in whole.added], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("site", ["resid_pre.1", "mlp_out.0"])
def test_other_sites(pair, text, site):
    """What enters layer 1 is what leaves layer 0; below an MLP's output every layer of the tuned model runs."""
    method, texts = Method(dictionary("diff-sae")), texts_of(pair, text, max_length=36)
    here = patch_pair(method, pair, site, texts, candidates(), config())
    there = patch_pair(method, pair, SITE, texts, candidates(), config())
    kls = [[row.kl for row in found.added] for found in (here, there)]
    if site == "resid_pre.1":
        assert_close(*kls, rtol=1e-4, atol=1e-6)
    else:
        assert_not_close(*kls)


def test_an_adapter_is_the_merged_checkpoint(base, tmp_path, tiny_tokenizer, text, chat):
    merged = adapt(base, tmp_path / "adapter", lora()).merge_and_unload()
    save(merged, tmp_path / "merged", tiny_tokenizer)
    found = []
    for folder in ("adapter", "merged"):
        pair = load_pair(base, tmp_path / folder)
        texts = texts_of(pair, text, chat, max_length=36)
        found.append(patch_pair(Method(dictionary("tuned-sae")), pair, SITE, texts, candidates(), config()))
    for a, b in zip(found[0].added + found[0].removed, found[1].added + found[1].removed, strict=True):
        assert (a.set, a.size, a.seed) == (b.set, b.size, b.seed)
        assert a.kl == pytest.approx(b.kl, rel=5e-3, abs=1e-5)
    assert found[0].gap["all"] > 1e-3
    assert found[0].base_kl == pytest.approx(found[1].base_kl, rel=1e-3)
