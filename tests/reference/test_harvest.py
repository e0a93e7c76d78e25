"""The harvest stream against direct forward passes: losses, KL, places, spooling, numerics."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from helpers import assert_close, assert_not_close
from pair_fixture import adapt, load_hf, lora, save
from palimpsest.corpus import Corpus
from palimpsest.errors import NumericsError, PairError
from palimpsest.harvest import Harvester, activations
from palimpsest.models import LanguageModel, load_model, load_pair
from palimpsest.options import ModelOptions

SITES = ["resid_post.0", "mlp_out.1"]


@pytest.fixture
def corpus(text, tiny_tokenizer):
    return Corpus(text, tiny_tokenizer, max_length=64)


def rows(stream):
    """Every field of a stream, joined and in the order of documents and positions."""
    batches = list(stream)
    key = torch.cat([batch.document * 1000 + batch.position for batch in batches])
    order = key.argsort()
    assert len(key.unique()) == len(key)
    joined = {
        name: torch.cat([getattr(batch, name) for batch in batches])[order]
        for name in ("document", "position", "token_ids", "loss", "kl")
        if getattr(batches[0], name) is not None
    }
    acts = {site: torch.cat([batch.acts[site] for batch in batches])[order] for site in batches[0].acts}
    return joined | {"acts": acts}


@torch.no_grad()
def direct(folders, document):
    """Losses `[tokens, models]` and KL(tuned ‖ base) of one document, in float64; NaN for the first token."""
    ids = torch.from_numpy(document.token_ids).long()
    log_p = [
        load_hf(folder)(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1) for folder in folders
    ]
    nothing = torch.full((1,), torch.nan, dtype=torch.float64)
    loss = [torch.cat([nothing, -one.gather(1, ids[1:, None])[:, 0]]) for one in log_p]
    kl = (log_p[1].exp() * (log_p[1] - log_p[0])).sum(-1)
    return torch.stack(loss, 1), torch.cat([nothing, kl])


@pytest.mark.parametrize("all_positions", [False, True])
def test_losses_and_kl_are_those_of_transformers(base, tuned, text, tiny_tokenizer, all_positions):
    corpus = Corpus(text, tiny_tokenizer, max_length=64, all_positions=all_positions)
    found = rows(Harvester(load_pair(base, tuned), [], kl=True).stream("words", corpus.batches(256)))
    losses, kls = [], []
    for document in corpus.documents():
        loss, kl = direct((base, tuned), document)
        keep = torch.from_numpy(document.special == 0) | all_positions
        losses.append(loss[keep])
        kls.append(kl[keep])
    expected = torch.cat(losses)
    assert expected.isnan().any() == all_positions
    torch.testing.assert_close(found["loss"].double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(found["kl"].double(), torch.cat(kls), rtol=1e-3, atol=1e-4, equal_nan=True)
    kl = found["kl"][~found["kl"].isnan()]
    assert kl.mean() > 0.01 and kl.min() > -1e-5 and found["acts"] == {}


def test_the_mean_loss_is_what_the_model_says_with_labels(base, tuned, tiny_tokenizer, text):
    corpus = Corpus(text, tiny_tokenizer, all_positions=True, max_documents=1)
    document = next(corpus.documents())
    ids = torch.from_numpy(document.token_ids).long()[None]
    found = rows(Harvester(load_pair(base, tuned), []).stream("words", corpus.batches()))["loss"]
    for side, folder in enumerate((base, tuned)):
        with torch.no_grad():
            expected = load_hf(folder)(input_ids=ids, labels=ids).loss
        assert_close(found[1:, side].mean(), expected, rtol=1e-5)


def test_losses_do_not_depend_on_the_size_of_a_chunk(base, tuned, corpus, monkeypatch):
    harvester = Harvester(load_pair(base, tuned), [], kl=True)
    whole = rows(harvester.stream("words", corpus.batches()))
    monkeypatch.setattr("palimpsest.harvest.stream.LOGIT_BYTES", 1)
    chunked = rows(harvester.stream("words", corpus.batches()))
    assert_close(chunked["loss"], whole["loss"], rtol=1e-5, atol=1e-5)
    assert_close(chunked["kl"], whole["kl"], rtol=1e-4, atol=1e-5)


def test_an_adapter_that_changes_the_head_leaves_the_bases_losses(base, tuned, corpus, tmp_path):
    adapt(base, tmp_path / "adapter", lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    found, plain = (
        rows(Harvester(load_pair(base, other), []).stream("words", corpus.batches()))["loss"]
        for other in (tmp_path / "adapter", tuned)
    )
    assert_close(found[:, 0], plain[:, 0])
    assert_not_close(found[:, 1], plain[:, 0], atol=0.1)


def test_every_measured_token_comes_once_and_knows_its_place(base, tuned, corpus):
    batches = list(Harvester(load_pair(base, tuned), SITES, loss=False).stream("words", corpus.batches(200)))
    assert len(batches) > 3
    for batch in batches:
        place = (batch.row, batch.position)
        assert torch.equal(batch.context.input_ids[place], batch.token_ids)
        assert torch.equal(batch.context.document[place], batch.document)
        assert batch.context.keep[place].all() and int(batch.context.keep.sum()) == batch.tokens
        assert batch.acts[SITES[0]].shape == (batch.tokens, 2, 32)
        assert batch.loss is None and batch.kl is None
    found = rows(batches)
    expected = [
        (document.index, place, int(token))
        for document in corpus.documents()
        for place, token in enumerate(document.token_ids)
        if not document.special[place]
    ]
    columns = (found[name].tolist() for name in ("document", "position", "token_ids"))
    assert list(zip(*columns, strict=True)) == expected


def test_activations_are_those_of_each_model_alone(base, tuned, corpus):
    found = rows(Harvester(load_pair(base, tuned), SITES, loss=False).stream("words", corpus.batches(256)))
    for side, folder in enumerate((base, tuned)):
        model = load_model(folder)
        for document in corpus.documents():
            alone = model.read(torch.from_numpy(document.token_ids).long()[None], SITES).acts
            mine = found["document"] == document.index
            for site in SITES:
                expected = alone[site][0, torch.from_numpy(~document.special)]
                assert_close(found["acts"][site][mine, side], expected, rtol=1e-4, atol=1e-4)
    assert_not_close(found["acts"][SITES[0]][:, 0], found["acts"][SITES[0]][:, 1], atol=0.01)


def test_the_size_of_a_batch_changes_nothing(base, tuned, corpus):
    harvester = Harvester(load_pair(base, tuned), SITES, kl=True)
    small, large = (rows(harvester.stream("words", corpus.batches(size))) for size in (64, 4096))
    for name in ("document", "position", "token_ids"):
        assert torch.equal(small[name], large[name])
    for site in SITES:
        assert_close(small["acts"][site], large["acts"][site], rtol=1e-4, atol=1e-4)
    assert_close(small["loss"], large["loss"], rtol=1e-4, atol=1e-4)


def test_losses_cost_a_whole_pass_and_activations_do_not(base, tuned, corpus, monkeypatch):
    pair = load_pair(base, tuned)
    ran = []
    for side in (pair.base, pair.tuned):
        layer = side.model.model.layers[1]
        monkeypatch.setattr(
            layer, "forward", lambda *a, inner=layer.forward, **k: ran.append(1) or inner(*a, **k)
        )
    without = rows(Harvester(pair, SITES[:1], loss=False).stream("words", corpus.batches()))
    assert ran == []
    measured = rows(Harvester(pair, SITES[:1]).stream("words", corpus.batches()))
    assert ran and torch.equal(without["acts"][SITES[0]], measured["acts"][SITES[0]])


def test_one_at_a_time_gives_the_same_and_never_holds_both(base, tuned, corpus, tmp_path):
    expected = rows(Harvester(load_pair(base, tuned), SITES, kl=True).stream("words", corpus.batches(200)))
    pair = load_pair(base, tuned, ModelOptions(one_at_a_time=True))
    harvester = Harvester(pair, SITES, kl=True, spool=tmp_path / "spool")
    counts = []
    for count in harvester.record("words", corpus.batches(200)):
        counts.append(count)
        assert pair.loaded("base") and not pair.loaded("tuned")
    weights = weakref.ref(pair.base.model.model.layers[0])

    def watched():
        for batch in harvester.stream("words", corpus.batches(200)):
            assert pair.loaded("tuned") and not pair.loaded("base")
            yield batch

    found = rows(watched())
    gc.collect()
    assert weights() is None
    assert sum(counts) == len(found["document"]) == len(expected["document"])
    for name in ("document", "position", "token_ids", "loss"):
        assert torch.equal(found[name], expected[name])
    assert_close(found["kl"], expected["kl"], atol=1e-6)
    for site in SITES:
        assert torch.equal(found["acts"][site], expected["acts"][site])


def test_one_at_a_time_spools_several_corpora_before_the_second_model(base, tuned, corpus, text, tmp_path):
    other = Corpus(text, corpus.tokenizer, max_length=20, name="short")
    pair = load_pair(base, tuned, ModelOptions(one_at_a_time=True, dtype="bfloat16"))
    harvester = Harvester(pair, SITES, loss=False, spool=tmp_path)
    for one in (corpus, other):
        list(harvester.record(one.name, one.batches(128)))
    side_by_side = Harvester(load_pair(base, tuned, ModelOptions(dtype="bfloat16")), SITES, loss=False)
    for one in (other, corpus):
        found, expected = (rows(h.stream(one.name, one.batches(128))) for h in (harvester, side_by_side))
        assert found["acts"][SITES[0]].dtype == torch.bfloat16
        assert torch.equal(found["acts"][SITES[0]], expected["acts"][SITES[0]])


def test_one_at_a_time_needs_a_folder(base, tuned):
    with pytest.raises(PairError, match="needs a folder"):
        Harvester(load_pair(base, tuned, ModelOptions(one_at_a_time=True)), SITES)


def poisoned(folder, corpus, tokenizer, out):
    """A checkpoint whose embedding of one token of document 4 is NaN; returns it with that token's place."""
    document = list(corpus.documents())[4]
    others = {int(t) for d in corpus.documents() if d.index != 4 for t in d.token_ids}
    place, token = next((p, int(t)) for p, t in enumerate(document.token_ids) if int(t) not in others)
    model = load_hf(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    return save(model, out, tokenizer), place


@pytest.fixture
def odd(text, tiny_tokenizer, tmp_path):
    """The corpus with one token that only document 4 has."""
    lines = text.read_text().splitlines()
    lines[4] = json.dumps({"text": "the river runs Z past a mill"})
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(lines))
    return Corpus(path, tiny_tokenizer, max_length=64)


def test_nan_activations_name_the_model_the_site_and_the_document(base, odd, tiny_tokenizer, tmp_path):
    bad, place = poisoned(base, odd, tiny_tokenizer, tmp_path / "bad")
    for pair, who in ((load_pair(base, bad), "tuned"), (load_pair(bad, base), "base")):
        stream = Harvester(pair, ["resid_pre.0"], loss=False).stream("odd", odd.batches())
        expected = rf"The {who} model gives NaN or infinity at resid_pre\.0.*document 4, token {place}\."
        with pytest.raises(NumericsError, match=expected):
            list(stream)
    with pytest.raises(NumericsError, match=r"bad gives NaN.*resid_post\.0.*document 4, token"):
        list(activations(load_model(bad), odd.batches(), "resid_post.0"))


def test_nan_behind_the_last_site_is_no_missing_loss(base, tuned, corpus, monkeypatch):
    """A token whose loss is NaN would be left out of every mean without a word."""
    read = LanguageModel.read

    def overflowing(self, input_ids, wanted, *, head=False):
        found = read(self, input_ids, wanted, head=head)
        if head and self.name == str(tuned):
            found.head_input[0, 3] = torch.inf
        return found

    pair = load_pair(base, tuned)
    monkeypatch.setattr(LanguageModel, "read", overflowing)
    for sites in (["resid_post.0"], []):
        with pytest.raises(NumericsError, match="tuned model gives NaN or infinity.*head.*document"):
            list(Harvester(pair, sites).stream("words", corpus.batches(100)))


def test_activations_for_training_are_the_kept_tokens_of_one_model(base, corpus):
    model = load_model(base)
    batches = list(corpus.batches(128))
    found = list(activations(model, batches, "resid_post.0"))
    assert len(found) == len(batches)
    for acts, batch in zip(found, batches, strict=True):
        whole = model.read(batch.input_ids, ["resid_post.0"]).acts["resid_post.0"]
        assert torch.equal(acts, whole[batch.keep][:, None])
