"""Evaluation against direct forward passes with hooks of our own, and against what must hold exactly."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from helpers import assert_close, assert_not_close
from pair_fixture import load_hf
from palimpsest.artifacts import open_artifact
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import (
    ArtifactError,
    ConfigError,
    CorpusError,
    DictionaryError,
    NumericsError,
    PairError,
    SiteError,
)
from palimpsest.evaluate import EvaluateConfig, Evaluation, evaluate_dictionary, run_evaluate
from palimpsest.evaluate.run import read_evaluation
from palimpsest.models import fingerprint, load_model, load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

SITE = "resid_post.0"
BASELINES = ("zero", "mean")


@pytest.fixture(scope="module")
def model(base):
    return load_model(base)


@pytest.fixture(scope="module")
def pair(base, tuned):
    return load_pair(base, tuned)


@pytest.fixture
def corpus(text, tiny_tokenizer):
    return Corpus(text, tiny_tokenizer, max_length=64)


@pytest.fixture
def batches(corpus):
    return list(corpus.batches(200))


def sae(seed=0, *, k=6, latents=48, width=32, models=1, view="base", **metadata):
    """A dictionary whose biases are no zeros."""
    torch.manual_seed(seed)
    made = Dictionary(width, latents, k=k, models=models, view=view, metadata=metadata)
    with torch.no_grad():
        made.b_dec.copy_(0.3 * torch.randn(models, width))
        made.b_enc.copy_(0.1 * torch.randn(latents))
    return made.requires_grad_(False)


def identity(*, models=1, view="base"):
    """Every signed direction, all of them kept: it reconstructs whatever it reads."""
    width = 32 * models
    made = Dictionary(32, 2 * width, k=width, models=models, view=view)
    signed = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        made.W_dec.copy_(signed.view(-1, models, 32))
        made.W_enc.copy_(signed.T.reshape(models, 32, -1))
    return made.requires_grad_(False)


def constant(rows, *, view="base"):
    """It writes `rows` `[models, d_model]` whatever it reads."""
    made = sae(models=len(rows), view=view)
    made.W_dec.zero_()
    made.b_dec.copy_(rows)
    return made


def documents(corpus):
    for document in corpus.documents():
        yield torch.from_numpy(document.token_ids).long(), torch.from_numpy(document.special == 0)


@torch.no_grad()
def acts_of(hf, ids, layer=0):
    found = []
    handle = hf.model.layers[layer].register_forward_hook(lambda _m, _i, out: found.append(out))
    hf(input_ids=ids[None])
    handle.remove()
    return found[0][0]


@torch.no_grad()
def log_p(hf, ids, rows=None, kept=None, layer=0):
    """Predictions `[seq - 1, vocab]` in float64, with `rows` at the kept tokens of a layer's output."""

    def put(_module, _inputs, out):
        new = out.clone()
        new[0, kept] = rows
        return new

    handle = hf.model.layers[layer].register_forward_hook(put) if rows is not None else None
    logits = hf(input_ids=ids[None]).logits[0, :-1].double()
    if handle is not None:
        handle.remove()
    return logits.log_softmax(-1)


def direct(hf, texts, rows_of):
    """CE and KL per token with `rows_of(kind, ids, kept)` spliced in, document by document."""
    ce, kl, count = dict.fromkeys(("original", "spliced", "zero", "mean"), 0.0), {}, 0
    for ids, kept in texts:
        scored = kept[1:]
        count += int(scored.sum())
        plain = log_p(hf, ids)
        for kind in ce:
            here = plain if kind == "original" else log_p(hf, ids, rows_of(kind, ids, kept), kept)
            ce[kind] -= float(here.gather(1, ids[1:, None])[scored].sum())
            kl[kind] = kl.get(kind, 0.0) + float((plain.exp() * (plain - here)).sum(1)[scored].sum())
    del kl["original"]
    return {k: v / count for k, v in ce.items()}, {k: v / count for k, v in kl.items()}, count


def dense(dictionary, x):
    """Reconstruction from the definition, for one model."""
    pre = (x - dictionary.b_dec[0]) @ dictionary.W_enc[0] + dictionary.b_enc
    best = pre.topk(int(dictionary.k), dim=1)
    codes = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    return codes @ dictionary.W_dec[:, 0] + dictionary.b_dec[0], codes


@pytest.mark.parametrize("masking", [{}, {"all_positions": True}])
def test_every_figure_is_that_of_a_direct_computation(base, model, text, tiny_tokenizer, masking):
    corpus = Corpus(text, tiny_tokenizer, max_length=64, **masking)
    dictionary, hf = sae(), load_hf(base)
    texts = [(ids, kept | bool(masking)) for ids, kept in documents(corpus)]
    x = torch.cat([acts_of(hf, ids)[kept] for ids, kept in texts])
    mean = x.double().mean(0).float()
    made, codes = dense(dictionary, x)

    def rows(kind, ids, kept):
        own = acts_of(hf, ids)[kept]
        return {"spliced": dense(dictionary, own)[0], "zero": 0 * own, "mean": mean.expand_as(own)}[kind]

    ce, kl, count = direct(hf, texts, rows)
    found = evaluate_dictionary(dictionary, model, corpus.batches(200), site=SITE)
    one = found.side("model")
    assert (found.tokens, found.documents, one.splice.predictions) == (len(x), 10, count)
    assert found.passed_tokens == sum(len(ids) for ids, _ in texts) - len(x)
    assert (found.passed_tokens == 0) == bool(masking) and count == len(x) - (10 if masking else 0)
    assert_close(one.fve, 1 - float((x - made).square().sum() / (x - mean).square().sum()), atol=1e-5)
    assert_close(one.cosine, float(torch.cosine_similarity(x, made).mean()), atol=1e-5)
    assert_close(one.norm_ratio, float((made.norm(dim=1) / x.norm(dim=1)).mean()), rtol=1e-4)
    active = codes > 0
    assert one.l0 == pytest.approx(float(active.sum(1).float().mean()), abs=1e-6)
    assert one.dead == int((~active.any(0)).sum()) and sum(one.density.counts) == 48 - one.dead
    for kind, value in ce.items():
        assert one.splice.ce[kind] == pytest.approx(value, abs=2e-4), kind
    for kind, value in kl.items():
        assert one.splice.kl[kind] == pytest.approx(value, rel=1e-3, abs=1e-4), kind
    for name in BASELINES:
        recovered = (ce[name] - ce["spliced"]) / (ce[name] - ce["original"])
        assert one.splice.ce_recovered[name] == pytest.approx(recovered, abs=2e-3)
        assert one.splice.kl_recovered[name] == pytest.approx(1 - kl["spliced"] / kl[name], abs=2e-3)
    assert min(abs(ce[name] - ce["original"]) for name in ("spliced", *BASELINES)) > 0.01


@pytest.mark.parametrize("site", [SITE, "resid_post.1", "resid_pre.1", "mlp_out.1", "attn_out.0"])
def test_the_identity_recovers_everything(model, batches, site):
    one = evaluate_dictionary(identity(), model, batches, site=site).side("model")
    assert one.fve == pytest.approx(1, abs=1e-6) and one.cosine == pytest.approx(1, abs=1e-6)
    assert one.l0 <= 32 and one.norm_ratio == pytest.approx(1, abs=1e-6)
    assert one.splice.ce["spliced"] == pytest.approx(one.splice.ce["original"], abs=1e-5)
    for name in BASELINES:
        assert one.splice.ce_recovered[name] == pytest.approx(1, abs=1e-3)
        assert one.splice.kl_recovered[name] == pytest.approx(1, abs=1e-5)
        assert one.splice.kl[name] > 0.01


def test_writing_zero_is_the_zero_ablation(model, batches):
    one = evaluate_dictionary(constant(torch.zeros(1, 32)), model, batches, site=SITE).side("model")
    assert one.splice.ce["spliced"] == one.splice.ce["zero"] != one.splice.ce["original"]
    assert one.splice.ce_recovered["zero"] == one.splice.kl_recovered["zero"] == 0
    assert one.splice.ce_recovered_ci["zero"] == (0, 0)
    assert one.fve < 0 and (one.cosine, one.norm_ratio) == (0, 0)


def test_writing_the_mean_is_the_mean_ablation(base, model, corpus, batches):
    hf = load_hf(base)
    mean = torch.cat([acts_of(hf, ids)[kept] for ids, kept in documents(corpus)]).mean(0)
    one = evaluate_dictionary(constant(mean[None]), model, batches, site=SITE).side("model")
    assert one.fve == pytest.approx(0, abs=1e-5)
    assert one.splice.ce["spliced"] == pytest.approx(one.splice.ce["mean"], abs=1e-5)
    assert one.splice.ce_recovered["mean"] == pytest.approx(0, abs=1e-3)
    assert one.splice.kl_recovered["mean"] == pytest.approx(0, abs=1e-3)
    assert abs(one.splice.kl_recovered["zero"]) > 0.01


def test_a_constant_error_is_an_error(base, model, corpus, batches):
    """1 - Var(x - x̂) / Var(x), as a peer has it, would say 1 here."""
    made, shift = identity(), torch.full((32,), 0.5)
    made.b_dec.copy_(shift[None])
    made.apply_b_dec_to_input = False
    hf = load_hf(base)
    x = torch.cat([acts_of(hf, ids)[kept] for ids, kept in documents(corpus)])
    expected = 1 - len(x) * float(shift.square().sum()) / float((x - x.mean(0)).square().sum())
    found = evaluate_dictionary(made, model, batches, site=SITE, loss=False).side("model")
    assert found.fve == pytest.approx(expected, abs=1e-5) and found.fve < 0.99 and found.splice is None


def test_random_directions_recover_little(model, batches):
    """A null: k of n random directions added up explain less than a mean, and predict no better than it."""
    random = evaluate_dictionary(Dictionary.random(32, 64, 4), model, batches, site=SITE).side("model")
    assert random.fve < 0.5
    assert random.splice.kl_recovered["mean"] < 0.5
    assert evaluate_dictionary(identity(), model, batches, site=SITE).side("model").fve > 0.999


def test_figures_do_not_depend_on_how_text_is_batched(model, corpus):
    dictionary = sae()
    found = [
        evaluate_dictionary(dictionary, model, batches, site=SITE)
        for batches in (
            corpus.batches(70),
            list(corpus.batches(70)),
            list(corpus.batches(1000)),
        )
    ]
    assert found[0] == found[1]
    for one in found[1:]:
        assert one.tokens == found[0].tokens and one.models[0].dead == found[0].models[0].dead
        assert one.models[0].fve == pytest.approx(found[0].models[0].fve, abs=1e-6)
        assert one.models[0].splice.ce == pytest.approx(found[0].models[0].splice.ce, abs=1e-4)
        assert one.models[0].fve_ci == pytest.approx(found[0].models[0].fve_ci, abs=1e-5)


def test_packed_blocks_are_measured_too(model, corpus):
    found = evaluate_dictionary(identity(), model, corpus.blocks(32, batch_size=4), site=SITE)
    assert found.documents == 10 and found.side("model").fve == pytest.approx(1, abs=1e-6)
    assert found.side("model").splice.kl["spliced"] < 1e-6 < found.side("model").splice.kl["zero"]


def test_the_batches_mask_is_the_only_mask(model, corpus):
    """Without a marked token after the first, nothing that precedes is spliced: the two losses agree."""
    batches = list(corpus.batches(200))
    for batch in batches:
        batch.keep.zero_()
        batch.keep[:, -1] = batch.attention_mask[:, -1]
    found = evaluate_dictionary(sae(), model, batches, site=SITE).side("model").splice
    assert found.predictions > 0 and set(found.ce.values()) == {found.ce["original"]}
    assert found.kl == {"spliced": 0, "zero": 0, "mean": 0} and found.ce_recovered["zero"] is None


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_an_sae_is_measured_on_both_sides(base, tuned, adapter, batches, kind):
    pair, dictionary = load_pair(base, tuned if kind == "full" else adapter), sae()
    both = evaluate_dictionary(dictionary, pair, batches, site=SITE)
    assert [one.side for one in both.models] == ["base", "tuned"]
    for side in ("base", "tuned"):
        alone = evaluate_dictionary(dictionary, pair.side(side), batches, site=SITE).side("model")
        here = both.side(side)
        assert (here.fve, here.l0, here.splice) == (alone.fve, alone.l0, alone.splice)
    assert_not_close(both.side("base").splice.ce["original"], both.side("tuned").splice.ce["original"])
    assert "fve_tuned" in both.metrics and "tuned: FVE" in both.summary


def test_one_model_at_a_time_gives_the_same(base, tuned, pair, batches):
    single = load_pair(base, tuned, ModelOptions(one_at_a_time=True))
    first, load, alive = weakref.ref(single.base.model), single._loaders["tuned"], []

    def watched():
        gc.collect()
        alive.append(first() is not None)
        return load()

    single._loaders["tuned"] = watched
    found = evaluate_dictionary(sae(), single, batches, site=SITE)
    assert found == evaluate_dictionary(sae(), pair, batches, site=SITE)
    assert alive == [False] and single.loaded("tuned") and not single.loaded("base")


def test_a_diff_dictionary_adds_to_the_base(base, tuned, pair, corpus, batches):
    hf, hf_base = load_hf(tuned), load_hf(base)
    texts, dictionary = list(documents(corpus)), sae(view="diff")
    deltas = [(acts_of(hf, ids) - acts_of(hf_base, ids))[kept] for ids, kept in texts]
    mean = torch.cat(deltas).mean(0)

    def rows(kind, ids, kept):
        start = acts_of(hf_base, ids)[kept]
        own = acts_of(hf, ids)[kept] - start
        made = {"spliced": dense(dictionary, own)[0], "zero": 0 * own, "mean": mean.expand_as(own)}
        return start + made[kind]

    ce, kl, _ = direct(hf, texts, rows)
    found = evaluate_dictionary(dictionary, pair, batches, site=SITE)
    one = found.side("tuned")
    assert [entry.side for entry in found.models] == ["tuned"]
    x = torch.cat(deltas)
    made = dense(dictionary, x)[0]
    assert_close(one.fve, 1 - float((x - made).square().sum() / (x - mean).square().sum()), atol=1e-4)
    assert one.splice.ce == pytest.approx(ce, abs=2e-4)
    assert one.splice.kl == pytest.approx(kl, rel=2e-3, abs=1e-4)


def test_a_perfect_diff_is_the_tuned_model(pair, batches):
    one = evaluate_dictionary(identity(view="diff"), pair, batches, site=SITE).side("tuned")
    assert one.fve == pytest.approx(1, abs=1e-6) and one.splice.kl["spliced"] < 1e-6
    assert one.splice.kl_recovered == pytest.approx(dict.fromkeys(BASELINES, 1), abs=1e-4)
    nothing = evaluate_dictionary(constant(torch.zeros(1, 32), view="diff"), pair, batches, site=SITE)
    splice = nothing.side("tuned").splice
    assert splice.ce["spliced"] == splice.ce["zero"] and splice.kl_recovered["zero"] == 0


def test_a_pair_without_a_difference_has_nothing_to_recover(base, batches):
    found = evaluate_dictionary(sae(view="diff"), load_pair(base, base), batches, site=SITE)
    one = found.side("tuned")
    assert one.fve is None and one.cosine is None and one.splice.kl["zero"] == 0
    assert one.splice.ce["zero"] == one.splice.ce["original"] == one.splice.ce["mean"]
    assert set(one.splice.ce_recovered.values()) == set(one.splice.kl_recovered.values()) == {None}
    assert any("zero ablation" in note for note in found.notes)


def test_a_crosscoder_splices_each_model_with_its_own(pair, batches):
    found = evaluate_dictionary(identity(models=2, view="pair"), pair, batches, site=SITE)
    for side in ("base", "tuned"):
        one = found.side(side)
        assert (
            one.fve == pytest.approx(1, abs=1e-6) and one.splice.kl["spliced"] < 1e-5 < one.splice.kl["zero"]
        )
    assert found.side("base").density == found.side("tuned").density
    half = identity(models=2, view="pair")
    half.W_dec[:, 1] = 0
    found = evaluate_dictionary(half, pair, batches, site=SITE)
    assert found.side("base").fve == pytest.approx(1, abs=1e-6)
    assert found.side("tuned").fve < 0 and found.side("tuned").splice.ce_recovered["zero"] == 0
    sae_alone = evaluate_dictionary(constant(torch.zeros(1, 32)), pair, batches, site=SITE)
    assert sae_alone.side("tuned").fve == found.side("tuned").fve
    assert sae_alone.side("tuned").splice == found.side("tuned").splice


def test_notes_say_where_a_dictionary_comes_from(base, tuned, model, pair, batches):
    def notes(source, site=SITE, view="base", models=1, **metadata):
        made = sae(view=view, models=models, site=SITE, **metadata)
        return evaluate_dictionary(made, source, batches, site=site, loss=False).notes

    assert notes(model, model=str(base)) == notes(pair, model=str(base)) == notes(model) == []
    assert "trained on" in notes(model, model="other/model")[0]
    assert "trained at resid_post.0" in notes(model, site="resid_post.1")[0]
    assert notes(pair, view="tuned", model=str(tuned)) == []
    assert str(tuned) in notes(pair, view="tuned", model=str(base))[0]
    recorded = {"base": str(base), "tuned": str(tuned)}
    assert notes(pair, view="pair", models=2, model=recorded) == notes(pair, view="diff", **recorded) == []
    assert len(notes(pair, view="pair", models=2, model={"base": str(tuned), "tuned": str(base)})) == 2


def test_what_cannot_be_measured(model, pair, base, tuned, batches, corpus):
    with pytest.raises(DictionaryError, match="does not say which site"):
        evaluate_dictionary(sae(), model, batches)
    assert evaluate_dictionary(sae(site=SITE), model, batches, loss=False).site == SITE
    with pytest.raises(SiteError, match="layers run from 0 to 1"):
        evaluate_dictionary(sae(), model, batches, site="resid_post.7")
    with pytest.raises(SiteError, match="no site 'nonsense'"):
        evaluate_dictionary(sae(), model, batches, site="nonsense")
    with pytest.raises(DictionaryError, match=r"width 64.*width 32"):
        evaluate_dictionary(sae(), model, batches, site="mlp_act.0")
    for view, models in (("diff", 1), ("pair", 2)):
        with pytest.raises(ConfigError, match="--base BASE and --tuned TUNED"):
            evaluate_dictionary(sae(view=view, models=models), model, batches, site=SITE)
        single = load_pair(base, tuned, ModelOptions(one_at_a_time=True))
        with pytest.raises(PairError, match="both models at once"):
            evaluate_dictionary(sae(view=view, models=models), single, batches, site=SITE)
    with pytest.raises(DictionaryError, match="does not read a pair"):
        evaluate_dictionary(sae(view="pair", models=3), pair, batches, site=SITE)
    for batch in batches:
        batch.keep.zero_()
    for nothing in (batches, []):
        with pytest.raises(CorpusError, match="no token to measure"):
            evaluate_dictionary(sae(), model, nothing, site=SITE)


@pytest.mark.parametrize(("where", "words"), [("layers.0", f"at {SITE}"), ("norm", "at its head")])
def test_nan_is_named_with_its_document(base, batches, where, words):
    broken = load_model(base)
    module = dict(broken.model.model.named_modules())[where]

    def poison(_module, _inputs, out):
        new = out.clone()
        new[1:2, 3:4] = torch.nan  # verification and the width's probe have one row
        return new

    module.register_forward_hook(poison)
    document = int(batches[0].document[1, 0])
    with pytest.raises(NumericsError, match=rf"{words}\. .*document {document}\."):
        evaluate_dictionary(sae(), broken, batches[:1], site=SITE)


def test_hooks_are_gone_afterwards(base, model, batches):
    evaluate_dictionary(sae(), model, batches, site=SITE)
    ids = batches[0].input_ids[:1, :5]
    with torch.no_grad():
        assert torch.equal(model.model(input_ids=ids).logits, load_hf(base)(input_ids=ids).logits)


@pytest.fixture
def config(base, text, tmp_path):
    """An evaluation of a saved SAE; keywords change single fields."""
    sae(site=SITE, model=str(base)).save_pretrained(tmp_path / "sae")

    def make(out="out", *, resume=False, overwrite=False, **changes):
        fields = {
            "corpus": (str(text),),
            "model": str(base),
            "run": RunOptions(out=tmp_path / out, resume=resume, overwrite=overwrite),
            "models": ModelOptions(tokens_per_batch=128),
            "corpora": CorpusOptions(max_length=64),
        }
        return EvaluateConfig(str(tmp_path / "sae"), **(fields | changes))

    return make


def test_the_stage_writes_what_it_returns(config, base, model, corpus, tmp_path):
    found = run_evaluate(config())
    folder = open_artifact(tmp_path / "out", stage="evaluation")
    assert Evaluation.from_dict(folder.read_json("evaluation.json")) == found == read_evaluation(folder.path)
    assert folder.inputs["model"]["sha256"] == fingerprint(model)
    assert set(folder.inputs) == {"dictionary", "corpus", "model"}
    assert folder.models == {"model": str(base)} and folder.manifest["summary"] == found.summary
    direct = evaluate_dictionary(sae(), model, corpus.batches(128), site=SITE)
    assert found.models == direct.models and found.masking.startswith("content tokens")
    rows = folder.read_table("density.parquet").to_pydict()
    assert rows["latent"] == list(range(48)) and set(rows["side"]) == {"model"}
    assert sum(count == 0 for count in rows["fires"]) == found.models[0].dead
    assert sum(rows["density"]) == pytest.approx(found.models[0].l0)


def test_the_stage_measures_whole_documents_up_to_its_tokens(config, corpus):
    first = next(documents(corpus))[1]
    found = run_evaluate(config(tokens=1, corpora=CorpusOptions(max_length=64, roles=("text",))))
    assert (found.documents, found.tokens) == (1, int(first.sum()))
    assert found.masking == "tokens of the roles text, no special tokens"
    assert any("too few" in note for note in found.notes)


def test_the_stage_resumes_and_refuses(config, tuned, base, tmp_path, monkeypatch):
    first = run_evaluate(config())
    with pytest.raises(ArtifactError, match="finished"):
        run_evaluate(config())
    with monkeypatch.context() as patch:
        patch.setattr("palimpsest.evaluate.run.measure_dictionary", None)
        assert run_evaluate(config(resume=True)) == first
    with pytest.raises(ArtifactError, match="tokens"):
        run_evaluate(config(resume=True, tokens=5))
    both = run_evaluate(config(overwrite=True, model=None, base=str(base), tuned=str(tuned)))
    assert [one.side for one in both.models] == ["base", "tuned"] and both.models[0].fve == first.models[
        0
    ].fve
    manifest = open_artifact(tmp_path / "out").manifest
    assert set(manifest["inputs"]) == {"dictionary", "corpus", "base", "tuned"}
    split = config(
        "split", model=None, base=str(base), tuned=str(tuned), models=ModelOptions(one_at_a_time=True)
    )
    assert run_evaluate(split).side("tuned").l0 == both.side("tuned").l0


def test_the_stage_says_early_what_a_view_needs(config, base, tuned, tmp_path):
    sae(view="diff", site=SITE).save_pretrained(tmp_path / "sae", overwrite=True)
    with pytest.raises(ConfigError, match="view diff"):
        run_evaluate(config(model="there/is/none"))
    pair = {"model": None, "base": str(base), "tuned": str(tuned)}
    with pytest.raises(ConfigError, match="one-at-a-time"):
        run_evaluate(config(**pair, models=ModelOptions(one_at_a_time=True)))
    with pytest.raises(CorpusError):
        run_evaluate(config(**pair, corpus=("nowhere.jsonl",)))
    assert not (tmp_path / "out").exists()
    assert run_evaluate(config(**pair)).side("tuned").splice.kl["spliced"] > 0


def test_sae_lens_gives_the_same_codes_and_reconstruction(model, corpus, batches, tmp_path):
    """The same weights in SAELens' own class: FVE, L0, norms and cosine of its `forward`."""
    sae_lens = pytest.importorskip("sae_lens")
    from palimpsest.dictionaries import save_saelens

    dictionary = sae(site=SITE)
    save_saelens(dictionary, tmp_path / "peer")
    peer = sae_lens.SAE.load_from_disk(tmp_path / "peer")
    x = torch.cat([acts_of(model.model, ids)[kept] for ids, kept in documents(corpus)])
    with torch.no_grad():
        codes = peer.encode(x)
        made = peer.decode(codes)
    one = evaluate_dictionary(dictionary, model, batches, loss=False).side("model")
    assert one.l0 == pytest.approx(float((codes > 0).sum(1).float().mean()), abs=1e-6)
    variance = float((x - x.mean(0)).square().sum())
    assert one.fve == pytest.approx(1 - float((x - made).square().sum()) / variance, abs=1e-5)
    assert one.norm_ratio == pytest.approx(float((made.norm(dim=1) / x.norm(dim=1)).mean()), abs=1e-5)
